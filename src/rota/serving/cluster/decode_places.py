"""Where a request decodes that was dispatched for its prefill: begun when its first token has come.

The place is chosen by the dispatch policy, either with the dispatch (then it is booked, and its blocks may go there
while the prompt is computed) or when the first token has come. The way there is an ordinary migration; where none can
be begun, or it is given up, the request goes on where it is."""

from rota.base.errors import PolicyError
from rota.base.instant import Instant
from rota.serving.api import DecodePlacer, DispatchPolicy, EndObserver, Move, Pick, Request
from rota.serving.cluster.answers import ask_decode, tell_end
from rota.serving.cluster.instances import InstanceBook
from rota.serving.cluster.lifecycles import InstanceState
from rota.serving.cluster.migration import Dropped, MigrationBook
from rota.serving.cluster.tracked import TrackedRequest
from rota.serving.model.commands import Migrate, Stay


class DecodePlaces:
    """Notes who is to decode elsewhere, and sends them there. Changes the bookings of the instances, and begins
    migrations."""

    def __init__(self, policy: DispatchPolicy, instances: InstanceBook, migrations: MigrationBook) -> None:
        self._policy = policy if isinstance(policy, DecodePlacer) else None
        self._observer = policy if isinstance(policy, EndObserver) else None
        self._name = type(policy).__name__
        self._instances = instances
        self._migrations = migrations

    def note(self, tracked: TrackedRequest, pick: Pick) -> None:
        """A request was dispatched. Who may not move, or ends with its first token, is not sent anywhere."""
        tracked.prefill_only = False
        if not pick.prefill_only and pick.decode_at in (None, pick.instance_id):
            return
        request = tracked.request
        if not request.movable or request.max_tokens - tracked.num_output_tokens <= 1:
            return
        if pick.decode_at is None and self._policy is None:
            raise PolicyError(
                f"{self._name} picked {pick.instance_id!r} for the prefill of request {request.id} only, and neither "
                "said where it decodes nor can be asked",
                hint="set decode_at, or give the policy a method pick_decode",
            )
        tracked.prefill_only = True
        if pick.decode_at not in (None, pick.instance_id):
            self._instances.book(tracked, pick.decode_at)

    def ended(self, request: Request, num_output_tokens: int | None) -> None:
        """A request ended, in whatever way: tell the policy, if it wants to hear."""
        if self._observer is not None:
            tell_end(self._observer, request, num_output_tokens)

    def first_token(self, tracked: TrackedRequest, now: Instant) -> tuple[Migrate | Stay, ...]:
        """The next token of a request has come where it was dispatched: send it on, if it is to decode elsewhere."""
        if not tracked.prefill_only or tracked.instance_id is None:
            return ()
        tracked.prefill_only = False
        request, source = tracked.request, tracked.instance_id
        destination, reason = tracked.decode_at, "chosen with the dispatch"
        if destination is None and self._policy is not None:
            pick = ask_decode(self._policy, request, source, self._instances.ready_views, now)
            destination, reason = pick.instance_id, pick.reason
            if destination != source and self._instances.ledgers[destination].state == InstanceState.READY:
                self._instances.book(tracked, destination)
        if destination is None or destination == source:
            return (Stay(request.id, source, reason),)
        begun = self._migrations.begin_decode(Move(request.id, source, destination, reason), tracked, now)
        if isinstance(begun, Dropped):
            self._instances.unbook(tracked)
            return (Stay(request.id, source, f"it cannot go to {destination}: {begun}"),)
        return (begun,)
