"""Policies are asked here, and what they answer is checked: an answer that was not offered ends in `PolicyError`."""

from collections.abc import Sequence, Set

from rota.base.errors import PolicyError, RotaError
from rota.base.instant import Instant
from rota.serving.api import (
    AdmissionPolicy,
    DecodePlacer,
    DispatchPolicy,
    EndObserver,
    FleetView,
    Flip,
    InstanceView,
    MigrationPolicy,
    Move,
    Pick,
    RoleFlipper,
    ScalingPolicy,
    Start,
    Stop,
)
from rota.serving.api.decisions import Admission
from rota.serving.cluster.ledger import ClusterReading
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request, RequestId


def ask_admission(
    policy: AdmissionPolicy, request: Request, ready: Sequence[InstanceView], num_unfinished: int, now: Instant
) -> Admission:
    """Whether a request may enter. A refusal has a reason."""
    try:
        admission = policy.admit(request, ClusterReading(now, ready), num_unfinished)
    except RotaError:
        raise
    except Exception as error:
        raise _broken(policy, f"raised {error!r}", f"request {request.id}") from error
    if not admission.admitted and not admission.reason:
        raise _broken(policy, "refused without a reason (law 11)", f"request {request.id}")
    return admission


def ask_dispatch(policy: DispatchPolicy, request: Request, candidates: Sequence[InstanceView], now: Instant) -> Pick:
    """Which of the candidates a request goes to."""
    about = f"request {request.id}"
    try:
        pick = policy.pick(request, ClusterReading(now, candidates))
    except RotaError:
        raise
    except Exception as error:
        raise _broken(policy, f"raised {error!r}", about) from error
    _check_pick(policy, pick, candidates, about)
    return pick


def ask_decode(
    policy: DecodePlacer, request: Request, at: InstanceId, ready: Sequence[InstanceView], now: Instant
) -> Pick:
    """Where a request decodes whose first token has come. Without a ready instance it stays, and nobody is asked."""
    about = f"where request {request.id} decodes"
    if not ready:
        return Pick(at, "no instance is ready")
    try:
        pick = policy.pick_decode(request, at, ClusterReading(now, ready))
    except RotaError:
        raise
    except Exception as error:
        raise _broken(policy, f"raised {error!r}", about) from error
    if pick.instance_id != at:
        _check_pick(policy, pick, ready, about)
    return pick


def ask_flip(policy: RoleFlipper, ready: Sequence[InstanceView], now: Instant) -> Flip | None:
    """Which of the ready instances should have another role, if any."""
    about = "roles"
    try:
        flip = policy.flip(ClusterReading(now, ready))
    except RotaError:
        raise
    except Exception as error:
        raise _broken(policy, f"raised {error!r}", about) from error
    if flip is not None and not any(view.id == flip.instance_id for view in ready):
        offered = ", ".join(view.id for view in ready)
        raise _broken(policy, f"would flip {flip.instance_id!r}, which is not among {offered}", about)
    if flip is not None and not flip.reason:
        raise _broken(policy, f"would flip {flip.instance_id!r} without a reason", about)
    return flip


def tell_end(policy: EndObserver, request: Request, num_output_tokens: int | None) -> None:
    """A request ended, with so many output tokens if that is known."""
    try:
        policy.request_ended(request, num_output_tokens)
    except RotaError:
        raise
    except Exception as error:
        raise _broken(policy, f"raised {error!r}", f"the end of request {request.id}") from error


def _check_pick(policy: object, pick: Pick, candidates: Sequence[InstanceView], about: str) -> None:
    for picked in (pick.instance_id, pick.decode_at):
        if picked is not None and not any(view.id == picked for view in candidates):
            offered = ", ".join(view.id for view in candidates)
            raise _broken(policy, f"picked {picked!r}, which is not among {offered}", about)
    if not pick.reason:
        raise _broken(policy, f"picked {pick.instance_id!r} without a reason", about)


def ask_migration(
    policy: MigrationPolicy, shown: Sequence[InstanceView], moving: Set[RequestId], now: Instant
) -> Sequence[Move]:
    """The moves to begin now, between instances that were shown. Whether they can be begun is not looked at here."""
    about = "what to move"
    try:
        moves = list(policy.plan(ClusterReading(now, shown), moving))
    except RotaError:
        raise
    except Exception as error:
        raise _broken(policy, f"raised {error!r}", about) from error
    ids = {view.id for view in shown}
    for move in moves:
        if not isinstance(move, Move):
            raise _broken(policy, f"answered {move!r}, which is no Move", about)
        for instance_id in (move.source, move.destination):
            if instance_id not in ids:
                raise _broken(policy, f"named {instance_id!r}, which is not among {', '.join(sorted(ids))}", about)
        if not move.reason:
            raise _broken(policy, f"would move {move.request_id!r} without a reason", about)
    return moves


def ask_scaling(policy: ScalingPolicy, fleet: FleetView) -> Sequence[Start | Stop]:
    """What to start and to stop now. Whether the rules of the fleet allow it is not looked at here."""
    about = "how many instances there should be"
    try:
        wishes = list(policy.plan(fleet))
    except RotaError:
        raise
    except Exception as error:
        raise _broken(policy, f"raised {error!r}", about) from error
    ids = {view.id for view in fleet.instances}
    for wish in wishes:
        if not isinstance(wish, Start | Stop):
            raise _broken(policy, f"answered {wish!r}, which is neither Start nor Stop", about)
        if isinstance(wish, Stop) and wish.instance_id not in ids:
            raise _broken(
                policy, f"would stop {wish.instance_id!r}, which is not among {', '.join(sorted(ids))}", about
            )
        if not wish.reason:
            raise _broken(policy, f"answered {wish!r} without a reason", about)
    return wishes


def _broken(policy: object, what: str, about: str) -> PolicyError:
    return PolicyError(
        f"{type(policy).__name__} {what}, asked about {about}",
        hint="run the conformance suite of its kind on the policy; see rota.testing",
    )
