"""The conformance suite of dispatch policies, and the fixed pictures of a cluster that it shows them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import FrozenInstanceError, dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from rota.base.errors import LawBroken
from rota.base.instant import Instant
from rota.serving.api import (
    DecodePlacer,
    DispatchPolicy,
    EndObserver,
    InstanceId,
    InstanceView,
    Pick,
    Request,
    RequestId,
    Role,
    RoleFlipper,
    SequenceReport,
)


@dataclass(frozen=True, slots=True)
class InstanceSample:
    """An `InstanceView` with fixed values; `num_cached_blocks` is how many leading blocks of any request it holds."""

    id: InstanceId
    num_outstanding_requests: int = 0
    num_outstanding_tokens: int = 0
    num_cached_blocks: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int | None = None
    num_blocks: int = 1000
    block_size: int = 16
    observed_at: Instant | None = None
    role: Role = Role.MIXED
    running: tuple[SequenceReport, ...] = ()
    waiting: tuple[SequenceReport, ...] = ()
    max_num_seqs: int = 256
    max_model_len: int = 131_072
    max_num_batched_tokens: int = 2048
    is_draining: bool = False
    num_migrations: int = 0
    num_expected_requests: int = 0
    num_booked_tokens: int = 0

    def num_prefix_tokens(self, request: Request) -> int:
        num_blocks = min(self.num_cached_blocks, len(request.block_hashes))
        return min(num_blocks * self.block_size, request.num_prompt_tokens)


@dataclass(frozen=True, slots=True)
class ClusterSample:
    """A `ClusterView` with fixed values."""

    now: Instant
    instances: Sequence[InstanceView]

    def __iter__(self) -> Iterator[InstanceView]:
        return iter(self.instances)


def requests() -> st.SearchStrategy[Request]:
    """Requests with and without shared blocks."""
    return st.builds(
        _request,
        number=st.integers(0, 999),
        num_prompt_tokens=st.integers(1, 4000),
        share_hashed=st.sampled_from([0.0, 0.5, 1.0]),
        priority=st.integers(-2, 2),
        session=st.none() | st.sampled_from(["s1", "s2"]),
    )


def clusters(*, num_instances_min: int = 1) -> st.SearchStrategy[ClusterSample]:
    """Clusters of up to eight instances by id, idle and loaded, reported and not, with and without cached prefixes and
    roles; some tell of their sequences."""
    instance = instances_that_do_not_tell() | instances_that_tell()
    return st.builds(
        lambda now, samples: ClusterSample(
            Instant(now), tuple(at_position(sample, position, now) for position, sample in enumerate(samples))
        ),
        now=st.integers(0, 10**15),
        samples=st.lists(instance, min_size=num_instances_min, max_size=8),
    )


def instances_that_do_not_tell() -> st.SearchStrategy[InstanceSample]:
    """Instances of which only numbers are known, or not even those."""
    return st.builds(
        InstanceSample,
        id=st.just(InstanceId("")),
        num_outstanding_requests=st.integers(0, 100),
        num_outstanding_tokens=st.integers(0, 5000),
        num_cached_blocks=st.integers(0, 250),
        num_running=st.integers(0, 100),
        num_waiting=st.integers(0, 100),
        num_free_blocks=st.none() | st.integers(0, 1000),
        role=st.sampled_from([Role.MIXED, Role.MIXED, Role.PREFILL, Role.DECODE]),
        num_expected_requests=st.integers(0, 10),
        num_booked_tokens=st.integers(0, 16_000),
    )


def instances_that_tell(
    *, draining: st.SearchStrategy[bool] | None = None, num_running_max: int = 6
) -> st.SearchStrategy[InstanceSample]:
    """Instances that tell of those who run and wait, with numbers that fit them. Block sizes and capacities differ, and
    a queue may wait in front of free blocks, as one does between two steps."""
    sequence = st.tuples(st.integers(1, 1200), st.integers(-2, 2), st.booleans())
    return st.builds(
        _telling,
        running=st.lists(sequence, max_size=num_running_max),
        waiting=st.lists(sequence, max_size=3),
        num_blocks=st.sampled_from([200, 500, 1000]),
        block_size=st.sampled_from([16, 16, 32]),
        max_num_seqs=st.sampled_from([4, 256]),
        num_unknown=st.integers(0, 3),
        is_draining=st.just(False) if draining is None else draining,
    )


def check_dispatch_policy(
    factory: Callable[[], DispatchPolicy], *, ties_by_id: bool = True, max_examples: int = 100
) -> None:
    """Prove that a dispatch policy keeps the contract of its kind; raises `LawBroken` with the first example that does
    not.

    `factory` makes a fresh policy, each time alike: one that draws chance gets a new stream of the same seed and name.
    For any cluster, however loaded, of one instance or more, and for a series of requests:

    * the pick is one of the instances shown, and has a reason; so is where it should decode, if it says so;
    * one that sends a request somewhere for its prefill only says where it decodes, or can be asked (`pick_decode`);
    * scores are in [0, 1] and belong to instances shown, at most one each;
    * two fresh policies that are asked the same give the same answers;
    * one that flips roles names an instance shown, another role than it has, and a reason;
    * nothing that is shown is written to (law 13);
    * a fresh policy prefers the first by id among instances that are alike, unless `ties_by_id` is False, as it is for
      a policy that draws chance or hashes.
    """

    @settings(max_examples=max_examples, deadline=None)
    @given(asked=st.lists(st.tuples(requests(), clusters()), min_size=1, max_size=6))
    def picks_are_sound_and_repeatable(asked: list[tuple[Request, ClusterSample]]) -> None:
        first, second = factory(), factory()
        for request, cluster in asked:
            pick = _ask(first, request, cluster)
            _check_pick(pick, cluster)
            again = _ask(second, request, cluster)
            if again != pick:
                raise LawBroken(f"law 8: asked the same, a fresh policy answered {again}, another one {pick}")
            if pick.prefill_only and pick.decode_at is None:
                places = [_ask_decode(policy, request, pick.instance_id, cluster) for policy in (first, second)]
                _check_pick(places[0], cluster)
                if places[0] != places[1]:
                    raise LawBroken(f"law 8: asked the same, fresh policies answered {places[0]} and {places[1]}")
            if isinstance(first, RoleFlipper) and (flip := first.flip(cluster)) is not None:
                roles = {view.id: view.role for view in cluster.instances}
                if flip.instance_id not in roles or roles[flip.instance_id] is flip.role or not flip.reason:
                    raise LawBroken(f"{flip} is not another role of an instance shown, with a reason")
            for policy in (first, second):
                if isinstance(policy, EndObserver):
                    policy.request_ended(request, None if request.priority < 0 else request.num_prompt_tokens % 700)

    @settings(max_examples=max_examples, deadline=None)
    @given(request=requests(), cluster=clusters(num_instances_min=2))
    def ties_break_by_id(request: Request, cluster: ClusterSample) -> None:
        model = cluster.instances[0]
        assert isinstance(model, InstanceSample)
        alike = tuple(at_position(model, position, cluster.now) for position in range(len(cluster.instances)))
        pick = _ask(factory(), request, ClusterSample(cluster.now, alike))
        if pick.instance_id != alike[0].id:
            raise LawBroken(
                f"among {len(alike)} instances that are alike, {pick.instance_id} was picked before {alike[0].id}"
            )

    picks_are_sound_and_repeatable()
    if ties_by_id:
        ties_break_by_id()


def _ask(policy: DispatchPolicy, request: Request, cluster: ClusterSample) -> Pick:
    try:
        return policy.pick(request, cluster)
    except (FrozenInstanceError, AttributeError, TypeError) as error:
        raise LawBroken(f"the policy wrote to a view (law 13) or used what it does not offer: {error!r}") from error


def _ask_decode(policy: DispatchPolicy, request: Request, at: InstanceId, cluster: ClusterSample) -> Pick:
    if not isinstance(policy, DecodePlacer):
        raise LawBroken("picked for the prefill only; it neither said where to decode nor can be asked (pick_decode)")
    try:
        return policy.pick_decode(request, at, cluster)
    except (FrozenInstanceError, AttributeError, TypeError) as error:
        raise LawBroken(f"the policy wrote to a view (law 13) or used what it does not offer: {error!r}") from error


def _check_pick(pick: Pick, cluster: ClusterSample) -> None:
    shown = [instance.id for instance in cluster.instances]
    if pick.decode_at is not None and pick.decode_at not in shown:
        raise LawBroken(f"would decode at {pick.decode_at!r}, which is not among {shown}")
    if pick.instance_id not in shown:
        raise LawBroken(f"picked {pick.instance_id!r}, which is not among {shown}")
    if not pick.reason:
        raise LawBroken("law 11: picked without a reason")
    scored = [instance_id for instance_id, _ in pick.scores]
    if len(set(scored)) != len(scored) or not set(scored) <= set(shown):
        raise LawBroken(f"scored {scored}, shown were {shown}")
    for instance_id, score in pick.scores:
        if not 0.0 <= score <= 1.0:
            raise LawBroken(f"the score of {instance_id} is {score}, not in [0, 1]")


def _request(number: int, num_prompt_tokens: int, share_hashed: float, priority: int, session: str | None) -> Request:
    num_blocks = int(num_prompt_tokens // 16 * share_hashed)
    return Request(
        RequestId(f"r{number}"),
        Instant(0),
        num_prompt_tokens,
        max_tokens=100,
        priority=priority,
        session=session,
        block_hashes=tuple(range(num_blocks)),
    )


def _telling(
    running: list[tuple[int, int, bool]],
    waiting: list[tuple[int, int, bool]],
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    num_unknown: int,
    is_draining: bool,
) -> InstanceSample:
    """An instance whose numbers fit its sequences: of `running` as many as fit, the others before those who wait."""
    run: list[SequenceReport] = []
    queue: list[SequenceReport] = []
    num_free_blocks, num_outstanding_tokens = num_blocks, 100 * num_unknown
    for num_tokens, priority, in_prefill in running:
        num_needed = -(-num_tokens // block_size)
        if len(run) < max_num_seqs and num_needed <= num_free_blocks:
            num_held = max(1, num_needed // 2) if in_prefill else num_needed
            run.append(SequenceReport(RequestId(""), num_tokens, num_held, priority))
            num_free_blocks -= num_held
            num_outstanding_tokens += num_tokens if num_held < num_needed else 1
        else:
            waiting = [(num_tokens, priority, in_prefill), *waiting]
    for num_tokens, priority, _ in waiting:
        queue.append(SequenceReport(RequestId(""), num_tokens, 0, priority))
        num_outstanding_tokens += num_tokens
    return InstanceSample(
        InstanceId(""),
        len(run) + len(queue) + num_unknown,
        num_outstanding_tokens,
        num_running=len(run),
        num_waiting=len(queue),
        num_free_blocks=num_free_blocks,
        num_blocks=num_blocks,
        block_size=block_size,
        running=tuple(run),
        waiting=tuple(queue),
        max_num_seqs=max_num_seqs,
        is_draining=is_draining,
    )


def at_position(sample: InstanceSample, position: int, now: int) -> InstanceSample:
    """The sample with the id of a position, sequences named after it, and, if it ever reported, a report no later than
    `now`."""
    named = [
        structs.replace(sequence, request_id=RequestId(f"i{position}-{number}"))
        for number, sequence in enumerate((*sample.running, *sample.waiting))
    ]
    return replace(
        sample,
        id=InstanceId(f"i{position}"),
        observed_at=None if sample.num_free_blocks is None else Instant(max(0, now - 1000 * position)),
        running=tuple(named[: len(sample.running)]),
        waiting=tuple(named[len(sample.running) :]),
    )
