"""Moves of running requests between simulated instances: who is told what, and what travels on the links.

There is one decider. A request that has stopped rests at its source until the cluster's machine says `Commit`, and only
then does its destination take it up: so it never runs at two instances, whatever message is late, lost or told twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from rota.base.errors import LawBroken
from rota.base.instant import Duration, Instant, after, milliseconds
from rota.runtime.simulation import SimulationLoop
from rota.serving.model.commands import (
    AbortMigration,
    Commit,
    CopyOut,
    HandOver,
    InstanceCommand,
    Migrate,
    RoomKept,
    RoomRefused,
    SequenceStopped,
    StopRefused,
    Way,
)
from rota.serving.model.events import (
    CopyCaughtUp,
    CopyStarted,
    HandedOver,
    MigrationFailed,
    RoomAsked,
    RoomGivenUp,
    RoomReserved,
    SequenceLeft,
    StopAsked,
)
from rota.serving.model.instance import InstanceId, InstanceLimits
from rota.serving.model.request import Request, RequestId
from rota.serving.sim.instance import SequenceState, SimulatedInstance

MigrationCommand = Migrate | CopyOut | HandOver | Commit | AbortMigration
MigrationFact = RoomReserved | CopyStarted | CopyCaughtUp | HandedOver | MigrationFailed

RANK_COPIED = 2
"""At one instant steps end and requests arrive before a copy does, so that leaping and stepping agree."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """How blocks travel. The defaults are those of Llumnix's testbed and code where they were published."""

    latency: Duration = milliseconds(1)
    """From the moment that a link is free for a copy until its first byte has arrived. An assumption."""
    bytes_per_second: float = 8e9
    """Of each instance, out and in apart. 64 Gb/s: the network between the machines of Llumnix's testbed."""
    kv_bytes_per_token: int = 131_072
    """Llama-3.1-8B in 16 bits: 2 (keys and values) x 32 layers x 8 heads x 128 x 2 bytes."""
    last_stage_max_blocks: int = 16
    """A request stops for its last blocks once it has no more left than these. Llumnix's default."""
    max_stages: int = 3
    """Or after so many stages, however much it has produced meanwhile. Llumnix's default."""
    share_sent_in_prefill: float = 0.9
    """Of the blocks of a request whose place to decode is known when its prefill begins: they go there layer by layer
    while the prompt is computed, and the rest once it is. Splitwise's simulator takes ten times the bandwidth for such
    a transfer, which is the same; as there, what goes meanwhile takes no turn on the links."""


class Links:
    """The ends of the network: what leaves an instance goes one copy after the other, and what enters it likewise.

    First come, first served, rather than equal shares: transfers that are posted to one queue pair are worked off in
    order, every copy takes what it would alone once its turn comes, and none needs to be timed again when another
    begins. The price is that a short last stage waits behind a long first one of another request. A copy that was
    given up has its turn all the same."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._out_free_at: dict[InstanceId, int] = {}
        self._in_free_at: dict[InstanceId, int] = {}

    def send(self, source: InstanceId, destination: InstanceId, num_bytes: int, now: Instant) -> Instant:
        """When that many bytes, ready now, will have arrived; both ends are taken for their turn."""
        begins_at = max(now, self._out_free_at.get(source, 0), self._in_free_at.get(destination, 0))
        free_at = begins_at + round(num_bytes * 1e9 / self._transfer.bytes_per_second)
        self._out_free_at[source] = self._in_free_at[destination] = free_at
        return after(Instant(free_at), self._transfer.latency)


Phase = Literal["asking", "kept", "staging", "caught_up", "stopping", "last", "handed"]


@dataclass(slots=True)
class _Move:
    """One migration under way, as the world sees it."""

    id: int
    request: Request
    source: SimulatedInstance
    destination: SimulatedInstance
    way: Way
    num_preemptions: int
    """At the source, when it began: one more and its blocks are others."""
    rests: bool
    """Whether it rested already when it began: it was dispatched for its prefill."""
    share_to_send: float
    """Of its blocks; the others are there already."""
    phase: Phase = "asking"
    num_stages: int = 0
    num_tokens: int = 0
    """Known when the stage under way began, or when it stopped."""
    num_blocks_copied: int = 0
    num_bytes: int = 0
    stopped_at: Instant = Instant(0)
    copying: int | None = None
    """Handle of the copy that is on the link."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """Whom the moves tell of what."""

    say: Callable[[MigrationFact, InstanceId, InstanceId], None]
    """Tell the cluster's machine a fact of a move between these two."""
    stopped: Callable[[RequestId, Instant], None]
    """A request gives no tokens from now on."""
    handed_over: Callable[[RequestId, SequenceState, InstanceId], None]
    """A request, as its source knew it last, is another instance's."""


class Moves:
    """All moves under way. Carries out what the cluster's machine orders, and tells it what came of that."""

    def __init__(
        self,
        loop: SimulationLoop,
        transfer: Transfer,
        instances: Mapping[InstanceId, SimulatedInstance],
        hooks: Hooks,
    ) -> None:
        self._loop = loop
        self._transfer = transfer
        self._links = Links(transfer)
        self._instances = instances
        self._hooks = hooks
        self._moves: dict[int, _Move] = {}
        self._of_request: dict[RequestId, _Move] = {}

    def __len__(self) -> int:
        return len(self._moves)

    # --- from the router ---------------------------------------------------------------------------------------------

    def carry_out(
        self, command: MigrationCommand, request: Request | None, now: Instant, decode_at: InstanceId | None = None
    ) -> None:
        """Do what the machine ordered. `request` is None for one that has ended; `decode_at` is where its blocks went
        while its prompt was computed."""
        if isinstance(command, Migrate):
            self._begin(command, request, decode_at)
            return
        move = self._moves.get(command.migration_id)
        if isinstance(command, AbortMigration):
            if move is not None:
                self._drop(move)
        elif isinstance(command, Commit):
            if move is None or move.phase != "handed":
                raise LawBroken(f"law 1: migration {command.migration_id} was committed, and was not handed over")
            self._commit(move)
        elif move is None:
            return  # its failure was told already
        elif isinstance(command, CopyOut):
            self._copy_out(move, now)
        else:
            move.phase = "stopping"
            move.source.tell(StopAsked(move.request.id))

    def request_ended(self, request_id: RequestId) -> None:
        """A request ended, however it did: nothing is left to move."""
        move = self._of_request.get(request_id)
        if move is not None:
            self._drop(move)

    def instance_lost(self, instance: SimulatedInstance) -> None:
        """An instance died, and with it what came from there or was to come."""
        for move in list(self._moves.values()):
            if instance in (move.source, move.destination):
                self._fail(move, f"instance {instance.spec.id} is gone")

    # --- from the instances ------------------------------------------------------------------------------------------

    def on_answer(self, instance: SimulatedInstance, command: InstanceCommand, now: Instant) -> None:
        """An instance answered about a request that moves, or no longer does."""
        assert isinstance(command, RoomKept | RoomRefused | SequenceStopped | StopRefused)
        move = self._of_request.get(command.request_id)
        if isinstance(command, RoomKept):
            if move is not None and instance is move.destination:
                self._room_kept(move, now)
        elif isinstance(command, RoomRefused):
            if move is not None and instance is move.destination:
                self._fail(move, command.reason)
        elif move is None or instance is not move.source or move.phase != "stopping":
            return  # whoever dropped the move has told the source to go on
        elif isinstance(command, StopRefused):
            self._fail(move, command.reason)
        else:
            self._stopped(move, command.num_tokens, now)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _begin(self, command: Migrate, request: Request | None, decode_at: InstanceId | None) -> None:
        source = self._instances.get(command.source)
        destination = self._instances.get(command.destination)
        reason = None
        sequence = None
        if source is None or destination is None:
            reason = f"instance {command.destination if destination is None else command.source} is gone"
        elif source is destination:
            reason = "it is there already"
        elif command.request_id in self._of_request:
            reason = "it moves already"
        else:
            source.catch_up()
            sequence = source.machine.sequence(command.request_id)
            reason = _why_not(request, sequence, command.way, source.spec.limits, destination.spec.limits)
        if reason is not None or request is None or source is None or destination is None or sequence is None:
            failed = MigrationFailed(command.migration_id, reason or "the request has ended")
            if source is not None and command.request_id not in self._of_request:
                source.resume(command.request_id)
            self._hooks.say(failed, command.source, command.destination)
            return
        rests = sequence.state == "resting"
        share = 1.0
        if rests and command.destination == decode_at:
            share -= self._transfer.share_sent_in_prefill
        num_preemptions = sequence.num_preemptions
        move = _Move(command.migration_id, request, source, destination, command.way, num_preemptions, rests, share)
        self._moves[move.id] = self._of_request[request.id] = move
        if move.way is Way.REPLAY:
            move.phase = "kept"
            self._say(move, RoomReserved(move.id))
        else:
            destination.tell(RoomAsked(request.id, sequence.num_tokens))

    def _room_kept(self, move: _Move, now: Instant) -> None:
        if move.phase == "asking":
            move.phase = "kept"
            self._say(move, RoomReserved(move.id))
        elif move.phase == "staging":
            num_full = (move.num_tokens - 1) // move.source.spec.limits.block_size
            self._send(move, num_full, now, self._stage_copied)
            if move.num_stages == 0:
                self._say(move, CopyStarted(move.id))
        elif move.phase == "last":
            num_blocks = -(-(move.num_tokens - 1) // move.source.spec.limits.block_size)
            self._send(move, num_blocks, now, self._all_copied)

    def _copy_out(self, move: _Move, now: Instant) -> None:
        if move.way is Way.COPY:
            sequence = self._still_decoding(move)
            if sequence is None:
                return
            if sequence.num_tokens > move.source.spec.limits.block_size:
                self._begin_stage(move, sequence)
                return
        move.phase = "caught_up"
        self._say(move, CopyStarted(move.id))
        self._say(move, CopyCaughtUp(move.id))

    def _begin_stage(self, move: _Move, sequence: SequenceState) -> None:
        """Copy the blocks that are full by now, all but the one that is being written."""
        move.phase = "staging"
        move.num_tokens = sequence.num_tokens
        move.destination.tell(RoomAsked(move.request.id, move.num_tokens))

    def _stage_copied(self, move: _Move, now: Instant) -> None:
        sequence = self._still_decoding(move)
        if sequence is None:
            return
        move.num_stages += 1
        num_left = -(-(sequence.num_tokens - 1) // move.source.spec.limits.block_size) - move.num_blocks_copied
        if num_left <= self._transfer.last_stage_max_blocks or move.num_stages >= self._transfer.max_stages:
            move.phase = "caught_up"
            self._say(move, CopyCaughtUp(move.id))
        else:
            self._begin_stage(move, sequence)

    def _still_decoding(self, move: _Move) -> SequenceState | None:
        """The request at its source; None, and the move has failed, where its blocks are no longer there."""
        move.source.catch_up()
        sequence = move.source.machine.sequence(move.request.id)
        if sequence is None:
            self._fail(move, "the request has ended")
        elif sequence.state not in ("running", "resting") or sequence.num_preemptions != move.num_preemptions:
            self._fail(move, "the request was preempted")
        else:
            return sequence
        return None

    def _stopped(self, move: _Move, num_tokens: int, now: Instant) -> None:
        move.stopped_at = now
        move.num_tokens = num_tokens
        self._hooks.stopped(move.request.id, now)
        sequence = move.source.machine.sequence(move.request.id)
        if sequence is not None and sequence.num_preemptions != move.num_preemptions:
            # Computed anew, its blocks are others than those that were copied.
            move.num_blocks_copied = 0
        if move.way is Way.REPLAY:
            move.phase = "handed"
            self._say(move, HandedOver(move.id, Duration(0)))
        else:
            move.phase = "last"
            move.destination.tell(RoomAsked(move.request.id, num_tokens))

    def _all_copied(self, move: _Move, now: Instant) -> None:
        move.phase = "handed"
        self._say(move, HandedOver(move.id, Duration(now - move.stopped_at), move.num_bytes))

    def _send(self, move: _Move, num_blocks: int, now: Instant, arrived: Callable[["_Move", Instant], None]) -> None:
        """Put the blocks that are not there yet on the link."""
        per_block = move.source.spec.limits.block_size * self._transfer.kv_bytes_per_token
        num_bytes = (num_blocks - move.num_blocks_copied) * per_block
        num_left = round(num_bytes * move.share_to_send)
        at = self._links.send(move.source.spec.id, move.destination.spec.id, num_left, now)

        def arrive(later: Instant) -> None:
            move.copying = None
            move.num_blocks_copied = num_blocks
            move.num_bytes += num_bytes
            arrived(move, later)

        move.copying = self._loop.call_at(at, arrive, RANK_COPIED)

    def _commit(self, move: _Move) -> None:
        request = move.request
        sequence = move.source.machine.sequence(request.id)
        if sequence is None:
            raise LawBroken(f"law 1: {request.id} is no longer where it rested")
        self._forget(move)
        self._hooks.handed_over(request.id, sequence, move.destination.spec.id)
        num_output_tokens = move.num_tokens - request.num_prompt_tokens
        move.source.tell(SequenceLeft(request.id))
        if move.way is Way.REPLAY:
            move.destination.submit(request, num_output_tokens)
        else:
            move.destination.adopt(request, num_output_tokens)

    def _fail(self, move: _Move, reason: str) -> None:
        self._drop(move)
        self._say(move, MigrationFailed(move.id, reason))

    def _drop(self, move: _Move) -> None:
        """Give a move up: the destination gets its room back, and the request goes on at its source."""
        self._forget(move)
        if move.copying is not None:
            self._loop.cancel(move.copying)
        if move.way is not Way.REPLAY:
            move.destination.tell(RoomGivenUp(move.request.id))
        if move.rests or move.phase in ("stopping", "last", "handed"):
            move.source.resume(move.request.id)

    def _forget(self, move: _Move) -> None:
        del self._moves[move.id]
        del self._of_request[move.request.id]

    def _say(self, move: _Move, fact: MigrationFact) -> None:
        self._hooks.say(fact, move.source.spec.id, move.destination.spec.id)


def _why_not(
    request: Request | None, sequence: SequenceState | None, way: Way, here: InstanceLimits, there: InstanceLimits
) -> str | None:
    if request is None or sequence is None:
        return "the request is not at its source"
    if sequence.state not in ("running", "resting") or sequence.num_tokens == request.num_prompt_tokens:
        return "the request does not decode"
    if way is not Way.REPLAY and here.block_size != there.block_size:
        return f"blocks of {here.block_size} tokens do not fit into blocks of {there.block_size}"
    longest = min(there.max_model_len, there.num_blocks * there.block_size)
    largest = min(here.max_model_len, here.num_blocks * here.block_size, request.num_prompt_tokens + request.max_tokens)
    if largest > longest:
        return f"it may have {largest} tokens, and the destination takes {longest}"
    return None
