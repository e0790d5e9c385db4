"""The conformance suite of migration policies, and a picture of a cluster in which moves come off at once."""

from collections.abc import Callable, Sequence, Set
from dataclasses import FrozenInstanceError, replace

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from rota.base.errors import LawBroken
from rota.base.instant import Instant, after, seconds
from rota.serving.api import Capability, InstanceId, MigrationPolicy, Move, ReportObserver, RequestId, SequenceReport
from rota.testing.dispatch import (
    ClusterSample,
    InstanceSample,
    at_position,
    instances_that_do_not_tell,
    instances_that_tell,
)

Shown = tuple[ClusterSample, frozenset[RequestId]]
"""A cluster, and the requests that are on their way."""

_MONTH = seconds(30 * 24 * 3600)


def clusters_of_movable(
    *, num_instances_min: int = 1, num_instances_max: int = 6, all_tell: bool = False, some_move: bool = True
) -> st.SearchStrategy[Shown]:
    """Clusters by id, crowded and idle, some instances draining, with requests on their way."""
    telling = instances_that_tell(draining=st.sampled_from([False, False, False, True]), num_running_max=8)
    return st.builds(
        _shown,
        now=st.integers(10**10, 10**15),
        samples=st.lists(
            telling if all_tell else telling | instances_that_do_not_tell(),
            min_size=num_instances_min,
            max_size=num_instances_max,
        ),
        which_move=st.sets(st.integers(0, 20), max_size=4) if some_move else st.just(set()),
    )


def check_migration_policy(factory: Callable[[], MigrationPolicy], *, max_examples: int = 100) -> None:
    """Prove that a migration policy keeps the contract of its kind; raises `LawBroken` with the first example that does
    not.

    `factory` makes a fresh policy, each time alike. For any cluster, however loaded, with instances that drain and
    instances that do not tell of their sequences, and for a series of rounds:

    * a move names a request that runs at the source, as it is shown, that is not on its way and is named once;
    * its destination is shown, is not the source, and does not drain; it has a reason (law 11);
    * there is no move where none can be: with one instance, with nobody who runs, with everybody on the way;
    * two fresh policies that are asked the same give the same answers, and so does one at another time (law 8);
    * where it reads ahead (`ReportObserver`), it answers as one that was told nothing, also if what it read has changed
      since without a word to it (law 8);
    * nothing that is shown is written to (law 13);
    * in a world that stands still, in which moves come off at once where there is room, it comes to rest: nobody is
      sent to and fro for ever (law 7).
    """
    policy = factory()
    if not isinstance(policy.requires, frozenset) or not all(isinstance(each, Capability) for each in policy.requires):
        raise LawBroken(f"requires is {policy.requires!r}, not a frozenset of Capability values")
    if not policy.interval_seconds >= 0.0:
        raise LawBroken(f"interval_seconds is {policy.interval_seconds!r}, not a number of at least 0")

    @settings(max_examples=max_examples, deadline=None)
    @given(asked=st.lists(clusters_of_movable(), min_size=1, max_size=4))
    def moves_are_sound_and_repeatable(asked: list[Shown]) -> None:
        first, second, later = factory(), factory(), factory()
        for cluster, moving in asked:
            moves = _ask(first, cluster, moving)
            check_moves(moves, cluster, moving)
            again = _ask(second, cluster, moving)
            if again != moves:
                raise LawBroken(f"law 8: asked the same, a fresh policy answered {again}, another one {moves}")
            at_another_time = _ask(later, _later(cluster), moving)
            if at_another_time != moves:
                raise LawBroken(f"law 8: at another time it answered {at_another_time}, before that {moves}")

    @settings(max_examples=max_examples, deadline=None)
    @given(asked=st.lists(clusters_of_movable(), min_size=1, max_size=4))
    def reading_ahead_changes_nothing(asked: list[Shown]) -> None:
        ahead, anew = factory(), factory()
        assert isinstance(ahead, ReportObserver)
        for cluster, moving in asked:
            for view in cluster.instances:
                ahead.instance_reported(view)
            for shown in (cluster, _one_ended(cluster)):
                moves, told_nothing = _ask(ahead, shown, moving), _ask(anew, shown, moving)
                if moves != told_nothing:
                    raise LawBroken(f"law 8: having read ahead it answered {moves}, else {told_nothing}")

    @settings(max_examples=max_examples, deadline=None)
    @given(shown=clusters_of_movable(all_tell=True, some_move=False))
    def nothing_moves_where_nothing_can(shown: Shown) -> None:
        cluster, _ = shown
        alone = ClusterSample(cluster.now, cluster.instances[:1])
        _expect_none(_ask(factory(), alone, frozenset()), "there is one instance")
        _expect_none(_ask(factory(), ClusterSample(cluster.now, _nobody_runs(cluster)), frozenset()), "nobody runs")
        everybody = frozenset(each.request_id for view in cluster.instances for each in view.running)
        _expect_none(_ask(factory(), cluster, everybody), "everybody who runs is on the way")

    @settings(max_examples=max_examples, deadline=None)
    @given(shown=clusters_of_movable(num_instances_min=2, all_tell=True, some_move=False))
    def comes_to_rest(shown: Shown) -> None:
        settled(factory(), shown[0])

    moves_are_sound_and_repeatable()
    if isinstance(policy, ReportObserver):
        reading_ahead_changes_nothing()
    nothing_moves_where_nothing_can()
    comes_to_rest()


def check_moves(moves: Sequence[Move], cluster: ClusterSample, moving: Set[RequestId]) -> None:
    """Raise `LawBroken` unless all moves of one round are of requests and instances as they are shown."""
    views = {view.id: view for view in cluster.instances}
    seen: set[RequestId] = set()
    for move in moves:
        if move.source not in views or move.destination not in views:
            raise LawBroken(f"{move} names an instance that is not among {sorted(views)}")
        if not any(sequence.request_id == move.request_id for sequence in views[move.source].running):
            raise LawBroken(f"{move} names a request that does not run at its source")
        if move.source == move.destination:
            raise LawBroken(f"{move} goes nowhere")
        if views[move.destination].is_draining:
            raise LawBroken(f"{move} goes to an instance that drains")
        if move.request_id in moving:
            raise LawBroken(f"{move} names a request that is on its way already")
        if move.request_id in seen:
            raise LawBroken(f"{move} is the second of the same request in one round")
        if not move.reason:
            raise LawBroken(f"law 11: {move} has no reason")
        seen.add(move.request_id)


def settled(policy: MigrationPolicy, cluster: ClusterSample) -> ClusterSample:
    """The cluster after as many rounds as the policy wants, each carried out and reported before the next. Raises
    `LawBroken` if that has no end."""
    num_running = sum(len(view.running) for view in cluster.instances)
    for _ in range(4 * num_running + 4):
        moves = _ask(policy, cluster, frozenset())
        check_moves(moves, cluster, frozenset())
        if not moves:
            return cluster
        cluster = carried_out(cluster, moves)
    raise LawBroken(f"law 7: still at it after {4 * num_running + 4} rounds in a world that stands still: {moves[0]}")


def carried_out(cluster: ClusterSample, moves: Sequence[Move]) -> ClusterSample:
    """The cluster two seconds later, all instances having reported a second ago: who moved runs at its destination, if
    there was a slot and blocks for it. Nobody else starts, ends, or gets a token."""
    now = after(cluster.now, seconds(2))
    samples: dict[InstanceId, InstanceSample] = {}
    for view in cluster.instances:
        assert isinstance(view, InstanceSample)
        samples[view.id] = replace(view, observed_at=after(cluster.now, seconds(1)))
    for move in moves:
        source, destination = samples[move.source], samples[move.destination]
        sequence = next(each for each in source.running if each.request_id == move.request_id)
        num_blocks = -(-sequence.num_tokens // destination.block_size)
        free = destination.num_free_blocks or 0
        if num_blocks <= free and len(destination.running) < destination.max_num_seqs:
            samples[source.id] = _changed(source, tuple(each for each in source.running if each is not sequence))
            arrived = structs.replace(sequence, num_blocks=num_blocks)
            samples[destination.id] = _changed(destination, (*destination.running, arrived))
    return ClusterSample(now, tuple(samples.values()))


def _changed(sample: InstanceSample, running: tuple[SequenceReport, ...]) -> InstanceSample:
    """The sample with others who run, and numbers that fit them."""
    num_more = len(running) - len(sample.running)
    num_more_blocks = sum(each.num_blocks for each in running) - sum(each.num_blocks for each in sample.running)
    return replace(
        sample,
        running=running,
        num_running=len(running),
        num_free_blocks=(sample.num_free_blocks or 0) - num_more_blocks,
        num_outstanding_requests=sample.num_outstanding_requests + num_more,
        num_outstanding_tokens=sample.num_outstanding_tokens + num_more,
    )


def _ask(policy: MigrationPolicy, cluster: ClusterSample, moving: frozenset[RequestId]) -> list[Move]:
    try:
        return list(policy.plan(cluster, moving))
    except (FrozenInstanceError, AttributeError, TypeError) as error:
        raise LawBroken(f"the policy wrote to a view (law 13) or used what it does not offer: {error!r}") from error


def _expect_none(moves: Sequence[Move], why: str) -> None:
    if moves:
        raise LawBroken(f"nothing can move where {why}, and it wants {moves[0]}")


def _shown(now: int, samples: list[InstanceSample], which_move: set[int]) -> Shown:
    placed = [at_position(sample, position, now) for position, sample in enumerate(samples)]
    running = sorted(each.request_id for sample in placed for each in sample.running)
    moving = frozenset(running[number] for number in which_move if number < len(running))
    counted = tuple(
        replace(sample, num_migrations=sum(each.request_id in moving for each in sample.running)) for sample in placed
    )
    return ClusterSample(Instant(now), counted), moving


def _later(cluster: ClusterSample) -> ClusterSample:
    """The same cluster a month later."""
    instances = []
    for view in cluster.instances:
        assert isinstance(view, InstanceSample)
        observed_at = None if view.observed_at is None else after(view.observed_at, _MONTH)
        instances.append(replace(view, observed_at=observed_at))
    return ClusterSample(after(cluster.now, _MONTH), tuple(instances))


def _one_ended(cluster: ClusterSample) -> ClusterSample:
    """The same cluster at the same time, after the first who runs ended at each instance, with no report since."""
    instances = []
    for view in cluster.instances:
        assert isinstance(view, InstanceSample)
        ended = len(view.running[:1])
        instances.append(
            replace(
                view,
                running=view.running[1:],
                num_outstanding_requests=view.num_outstanding_requests - ended,
                num_outstanding_tokens=view.num_outstanding_tokens - ended,
            )
        )
    return ClusterSample(cluster.now, tuple(instances))


def _nobody_runs(cluster: ClusterSample) -> tuple[InstanceSample, ...]:
    return tuple(_changed(view, ()) for view in cluster.instances if isinstance(view, InstanceSample))
