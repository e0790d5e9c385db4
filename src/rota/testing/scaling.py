"""The conformance suite of scaling policies, and a picture of a fleet whose wishes come true at once."""

from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import LawBroken
from rota.base.instant import Duration, Instant, after, seconds
from rota.serving.api import (
    SLO,
    Capability,
    Heard,
    InstanceId,
    Outcome,
    Request,
    ScalingPolicy,
    Start,
    StartingInstance,
    StartOffer,
    StartSource,
    Stop,
    WorkTotals,
)
from rota.testing.dispatch import (
    ClusterSample,
    InstanceSample,
    at_position,
    instances_that_do_not_tell,
    instances_that_tell,
    requests,
)

_MONTH = seconds(30 * 24 * 3600)
_NUM_ROUNDS = 400


@dataclass(frozen=True)
class FleetSample(ClusterSample):
    """A `FleetView` with any contents."""

    starting: Sequence[StartingInstance] = ()
    num_aside: int = 0
    offers: Sequence[StartOffer] = ()
    min_instances: int = 1
    max_instances: int = 8
    num_held: int = 0
    waits: Sequence[Duration] = ()
    outcomes: Sequence[Outcome] = ()
    totals: WorkTotals = WorkTotals()


def fleets() -> st.SearchStrategy[FleetSample]:
    """Fleets by id, crowded and idle, with some that drain or start, and requests that were answered, late or lost."""
    telling = instances_that_tell(draining=st.sampled_from([False, False, False, True]), num_running_max=6)
    return st.builds(
        _sample,
        now=st.integers(10**12, 10**15),
        samples=st.lists(telling | instances_that_do_not_tell(), min_size=0, max_size=5),
        num_starting=st.integers(0, 2),
        num_held=st.sampled_from([0, 0, 0, 3]),
        start_up=st.none() | st.integers(10**6, 10**12),
        outcomes=st.lists(
            st.tuples(requests(), st.sampled_from(list(Heard)), st.none() | st.integers(0, 10**11)), max_size=6
        ),
        num_arrived=st.integers(0, 1000),
        max_instances=st.integers(1, 12),
    )


def check_scaling_policy(factory: Callable[[], ScalingPolicy], *, max_examples: int = 100) -> None:
    """Prove that a scaling policy keeps the contract of its kind; raises `LawBroken` with the first example that does
    not.

    `factory` makes a fresh policy, each time alike. For any fleet, however loaded, and for a series of rounds in which
    anything can happen between two:

    * a wish is a `Start` or a `Stop`; a stop names an instance that is shown, does not drain, and is named once; each
      has a reason (law 11), and one answer does not wish for both;
    * it wishes for no more starts than there may be instances;
    * two fresh policies that are asked the same give the same answers, and so does one at another time (law 8);
    * nothing that is shown is written to (law 13);
    * in a world in which nothing is asked of it, and in one whose load stands still, with wishes that come true at
      once, it comes to rest: no instance comes and goes for ever (law 7).
    """
    policy = factory()
    if not isinstance(policy.requires, frozenset) or not all(isinstance(each, Capability) for each in policy.requires):
        raise LawBroken(f"requires must be a frozenset of Capability values, not {policy.requires!r}")
    if not 0 <= policy.interval_seconds < float("inf"):
        raise LawBroken(f"interval_seconds must be at least 0, and finite, not {policy.interval_seconds}")

    @settings(max_examples=max_examples, deadline=None)
    @given(asked=st.lists(fleets(), min_size=1, max_size=6))
    def wishes_are_sound_and_repeatable(asked: list[FleetSample]) -> None:
        first, second, later = factory(), factory(), factory()
        for fleet in _in_order(asked, policy.interval_seconds):
            wishes = _ask(first, fleet)
            check_wishes(wishes, fleet)
            if _ask(second, fleet) != wishes:
                raise LawBroken("law 8: asked the same, a fresh policy answered otherwise")
            if _ask(later, _later(fleet)) != wishes:
                raise LawBroken("law 8: asked the same a month later, a fresh policy answered otherwise")

    @settings(max_examples=max(10, max_examples // 5), deadline=None)
    @given(num_instances=st.integers(1, 5), num_requests=st.sampled_from([0, 0, 1, 7, 40, 200]))
    def it_comes_to_rest(num_instances: int, num_requests: int) -> None:
        settled(factory(), num_instances, num_requests)

    wishes_are_sound_and_repeatable()
    if policy.interval_seconds:
        it_comes_to_rest()


def check_wishes(wishes: Sequence[Start | Stop], fleet: FleetSample) -> None:
    """Raise `LawBroken` unless the wishes of one round can be meant for the fleet that was shown."""
    views = {view.id: view for view in fleet.instances}
    seen: set[InstanceId] = set()
    for wish in wishes:
        if not isinstance(wish, Start | Stop):
            raise LawBroken(f"{wish!r} is neither Start nor Stop")
        if not wish.reason:
            raise LawBroken(f"law 11: {wish} has no reason")
        if isinstance(wish, Stop):
            if wish.instance_id not in views:
                raise LawBroken(f"{wish} names an instance that is not among {sorted(views)}")
            if views[wish.instance_id].is_draining:
                raise LawBroken(f"{wish} names an instance that drains already")
            if wish.instance_id in seen:
                raise LawBroken(f"{wish} is the second of the same instance in one round")
            seen.add(wish.instance_id)
    num_starts = len(wishes) - len(seen)
    if num_starts and seen:
        raise LawBroken(f"wishes for {num_starts} more and for {len(seen)} less at once")
    if num_starts > fleet.max_instances:
        raise LawBroken(f"law 12: wishes for {num_starts} more, {fleet.max_instances} may be")


def settled(policy: ScalingPolicy, num_instances: int, num_requests: int) -> int:
    """How many instances there are when the policy has come to rest, with so many requests that are always under way,
    dealt out evenly. Raises `LawBroken` if it never does."""
    now = Instant(seconds(1_000_000))
    num, num_named = num_instances, num_instances
    names = [f"i{number}" for number in range(num)]
    num_quiet = 0
    for _ in range(_NUM_ROUNDS):
        now = after(now, seconds(policy.interval_seconds))
        share, rest = divmod(num_requests, max(1, len(names)))
        views = [_steady(name, share + (place < rest), now) for place, name in enumerate(sorted(names))]
        wishes = _ask(policy, FleetSample(now, views, max_instances=6))
        stopped = {wish.instance_id for wish in wishes if isinstance(wish, Stop)}
        names = [name for name in names if name not in stopped] or names[:1]
        for _ in range(min(len(wishes) - len(stopped), 6 - len(names))):
            names.append(f"i{num_named}")
            num_named += 1
        # After long enough everything that is measured over time has been.
        num_quiet = num_quiet + 1 if len(names) == num and not stopped else 0
        num = len(names)
        if num_quiet * policy.interval_seconds > 1200 or num_quiet > _NUM_ROUNDS // 2:
            return num
    raise LawBroken(f"law 7: after {_NUM_ROUNDS} rounds in a world that stands still it goes on, with {num} instances")


def _steady(name: str, num_requests: int, now: Instant) -> InstanceSample:
    num_blocks = 1000
    return InstanceSample(
        InstanceId(name),
        num_requests,
        num_requests,
        num_running=num_requests,
        num_free_blocks=max(0, num_blocks - 10 * num_requests),
        num_blocks=num_blocks,
        observed_at=now,
    )


def _ask(policy: ScalingPolicy, fleet: FleetSample) -> list[Start | Stop]:
    try:
        return list(policy.plan(fleet))
    except (FrozenInstanceError, AttributeError, TypeError) as error:
        raise LawBroken(f"the policy wrote to a view (law 13) or used what it does not offer: {error!r}") from error


def _sample(
    now: int,
    samples: list[InstanceSample],
    num_starting: int,
    num_held: int,
    start_up: int | None,
    outcomes: list[tuple[Request, Heard, int | None]],
    num_arrived: int,
    max_instances: int,
) -> FleetSample:
    placed = [at_position(sample, position, now) for position, sample in enumerate(samples)]
    starting = [StartingInstance(InstanceId(f"s{number}"), StartSource.COLD, Instant(now - 1)) for number in range(2)]
    told = [
        Outcome(_with_slo(request, took), what, None if took is None or what is Heard.LOST else Duration(took))
        for request, what, took in outcomes
    ]
    return FleetSample(
        Instant(now),
        placed,
        starting=starting[:num_starting],
        offers=() if start_up is None else (StartOffer(StartSource.COLD, Duration(start_up)),),
        max_instances=max_instances,
        num_held=num_held,
        waits=[Duration(took) for _, _, took in outcomes if took is not None][:3],
        outcomes=told,
        totals=WorkTotals(num_arrived, num_arrived * 100, num_arrived // 2, num_arrived * 20),
    )


def _with_slo(request: Request, took: int | None) -> Request:
    """Every other request has an SLO of its own."""
    if took is None or took % 2:
        return request
    slo = SLO(ttft=seconds(1), tpot=Duration(50_000_000))
    return Request(request.id, request.arrived_at, request.num_prompt_tokens, request.max_tokens, slo=slo)


def _in_order(fleets_drawn: list[FleetSample], interval_seconds: float) -> list[FleetSample]:
    """The fleets as rounds that follow each other: time and totals only grow."""
    rounds = []
    now, num_arrived = int(fleets_drawn[0].now), 0
    for fleet in fleets_drawn:
        now += max(1, seconds(interval_seconds))
        num_arrived += fleet.totals.num_arrived
        moved = [_observed(view, now - fleet.now) for view in fleet.instances]
        totals = WorkTotals(num_arrived, 100 * num_arrived, num_arrived // 2, 20 * num_arrived)
        rounds.append(replace(fleet, now=Instant(now), instances=moved, totals=totals))
    return rounds


def _observed(view: object, later: int) -> InstanceSample:
    assert isinstance(view, InstanceSample)
    if view.observed_at is None:
        return view
    return replace(view, observed_at=Instant(max(0, view.observed_at + later)))


def _later(fleet: FleetSample) -> FleetSample:
    """The same fleet a month later."""
    return replace(
        fleet,
        now=after(fleet.now, _MONTH),
        instances=[_observed(view, _MONTH) for view in fleet.instances],
        starting=[replace(each, ordered_at=after(each.ordered_at, _MONTH)) for each in fleet.starting],
    )
