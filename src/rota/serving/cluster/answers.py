"""Policies are asked here, and what they answer is checked: an answer that was not offered ends in `PolicyError`."""

from collections.abc import Sequence, Set

from rota.base.errors import PolicyError, RotaError
from rota.base.instant import Instant
from rota.serving.api import (
    AdmissionPolicy,
    DecodePlacer,
    DispatchPolicy,
    EndObserver,
    FirstTokenObserver,
    FleetView,
    Flip,
    InstanceView,
    MigrationPolicy,
    Move,
    Pick,
    ReportObserver,
    RoleFlipper,
    ScalingPolicy,
    Start,
    Stop,
)
from rota.serving.api.decisions import Admission
from rota.serving.cluster.ledger import ClusterReading
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request, RequestId


class Asked:
    """One question to a policy. What it raises, but for errors of ours, becomes a `PolicyError`."""

    __slots__ = ("_about", "_policy")

    def __init__(self, policy: object, about: str) -> None:
        self._policy = policy
        self._about = about

    def __enter__(self) -> "Asked":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, RotaError):
            raise self.broken(f"raised {error!r}") from error

    def broken(self, what: str) -> PolicyError:
        return PolicyError(
            f"{type(self._policy).__name__} {what}, asked about {self._about}",
            hint="run the conformance suite of its kind on the policy; see rota.testing",
        )


def ask_admission(
    policy: AdmissionPolicy, request: Request, ready: Sequence[InstanceView], num_unfinished: int, now: Instant
) -> Admission:
    """Whether a request may enter. A refusal has a reason."""
    with Asked(policy, f"request {request.id}") as asked:
        admission = policy.admit(request, ClusterReading(now, ready), num_unfinished)
    if not admission.admitted and not admission.reason:
        raise asked.broken("refused without a reason (law 11)")
    return admission


def ask_dispatch(policy: DispatchPolicy, request: Request, candidates: Sequence[InstanceView], now: Instant) -> Pick:
    """Which of the candidates a request goes to."""
    with Asked(policy, f"request {request.id}") as asked:
        pick = policy.pick(request, ClusterReading(now, candidates))
    _check_pick(asked, pick, candidates)
    return pick


def ask_decode(
    policy: DecodePlacer, request: Request, at: InstanceId, ready: Sequence[InstanceView], now: Instant
) -> Pick:
    """Where a request decodes whose first token has come. Without a ready instance it stays, and nobody is asked."""
    if not ready:
        return Pick(at, "no instance is ready")
    with Asked(policy, f"where request {request.id} decodes") as asked:
        pick = policy.pick_decode(request, at, ClusterReading(now, ready))
    if pick.instance_id != at:
        _check_pick(asked, pick, ready)
    return pick


def ask_flip(policy: RoleFlipper, ready: Sequence[InstanceView], now: Instant) -> Flip | None:
    """Which of the ready instances should have another role, if any."""
    with Asked(policy, "roles") as asked:
        flip = policy.flip(ClusterReading(now, ready))
    if flip is not None and not any(view.id == flip.instance_id for view in ready):
        offered = ", ".join(view.id for view in ready)
        raise asked.broken(f"would flip {flip.instance_id!r}, which is not among {offered}")
    if flip is not None and not flip.reason:
        raise asked.broken(f"would flip {flip.instance_id!r} without a reason")
    return flip


def tell_end(policy: EndObserver, request: Request, num_output_tokens: int | None) -> None:
    """A request ended, with so many output tokens if that is known."""
    with Asked(policy, f"the end of request {request.id}"):
        policy.request_ended(request, num_output_tokens)


def tell_first_token(policy: FirstTokenObserver, request: Request) -> None:
    """A request's prompt is computed."""
    with Asked(policy, f"the first token of request {request.id}"):
        policy.first_token_seen(request)


def tell_report(policy: ReportObserver, instance: InstanceView) -> None:
    """What is shown of an instance's sequences has changed."""
    with Asked(policy, f"what {instance.id} reports"):
        policy.instance_reported(instance)


def _check_pick(asked: Asked, pick: Pick, candidates: Sequence[InstanceView]) -> None:
    for picked in (pick.instance_id, pick.decode_at):
        if picked is not None and not any(view.id == picked for view in candidates):
            offered = ", ".join(view.id for view in candidates)
            raise asked.broken(f"picked {picked!r}, which is not among {offered}")
    if not pick.reason:
        raise asked.broken(f"picked {pick.instance_id!r} without a reason")


def ask_migration(
    policy: MigrationPolicy, shown: Sequence[InstanceView], moving: Set[RequestId], now: Instant
) -> Sequence[Move]:
    """The moves to begin now, between instances that were shown. Whether they can be begun is not looked at here."""
    with Asked(policy, "what to move") as asked:
        moves = list(policy.plan(ClusterReading(now, shown), moving))
    ids = {view.id for view in shown}
    for move in moves:
        if not isinstance(move, Move):
            raise asked.broken(f"answered {move!r}, which is no Move")
        for instance_id in (move.source, move.destination):
            if instance_id not in ids:
                raise asked.broken(f"named {instance_id!r}, which is not among {', '.join(sorted(ids))}")
        if not move.reason:
            raise asked.broken(f"would move {move.request_id!r} without a reason")
    return moves


def ask_scaling(policy: ScalingPolicy, fleet: FleetView) -> Sequence[Start | Stop]:
    """What to start and to stop now. Whether the rules of the fleet allow it is not looked at here."""
    with Asked(policy, "how many instances there should be") as asked:
        wishes = list(policy.plan(fleet))
    ids = {view.id for view in fleet.instances}
    for wish in wishes:
        if not isinstance(wish, Start | Stop):
            raise asked.broken(f"answered {wish!r}, which is neither Start nor Stop")
        if isinstance(wish, Stop) and wish.instance_id not in ids:
            raise asked.broken(f"would stop {wish.instance_id!r}, which is not among {', '.join(sorted(ids))}")
        if not wish.reason:
            raise asked.broken(f"answered {wish!r} without a reason")
    return wishes
