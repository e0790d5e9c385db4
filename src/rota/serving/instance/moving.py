"""Sequences on their way: room kept for those that may come with their KV, and those that rest here until they go.

A resting sequence neither runs nor waits. It keeps its blocks and its slot, so that it can go on here whatever becomes
of its journey; kept room takes blocks and a slot in the same way. Neither is ever preempted or evicted: whoever asked
for it owes the word that ends it.
"""

from bisect import insort
from operator import attrgetter
from typing import TYPE_CHECKING

from rota.base.errors import LawBroken
from rota.serving.instance.ledger import BlockLedger, Holding
from rota.serving.instance.sequence import Sequence
from rota.serving.model.commands import InstanceCommand, RoomKept, RoomRefused, SequenceStopped, StopRefused
from rota.serving.model.events import (
    RoomAsked,
    RoomGivenUp,
    SequenceAdopted,
    SequenceLeft,
    SequenceResumed,
    StopAsked,
)
from rota.serving.model.request import RequestId

if TYPE_CHECKING:
    from rota.serving.instance.machine import InstanceMachine

MovingEvent = RoomAsked | RoomGivenUp | SequenceAdopted | StopAsked | SequenceResumed | SequenceLeft


class Moving:
    """What one instance has set aside for sequences that come and go."""

    def __init__(self, machine: "InstanceMachine", ledger: BlockLedger) -> None:
        self.rooms: dict[RequestId, Holding] = {}
        """Blocks that are kept, by who may come."""
        self.resting: dict[RequestId, Sequence] = {}
        self.stopping: dict[RequestId, None] = {}
        """Who shall rest when the step in flight has ended."""
        self._machine = machine
        self._ledger = ledger

    @property
    def num_slots(self) -> int:
        """Slots that are set aside."""
        return len(self.rooms) + len(self.resting)

    def handle(self, event: MovingEvent) -> list[InstanceCommand]:
        """Take one fact and answer it. The machine plans afterwards, if it is idle."""
        match event:
            case RoomAsked():
                return [self._keep_room(event.request_id, event.num_tokens)]
            case RoomGivenUp():
                self._give_up_room(event.request_id)
            case SequenceAdopted():
                self._adopt(event)
            case StopAsked():
                return self._ask_to_stop(event.request_id)
            case SequenceResumed():
                self._resume(event.request_id)
            case SequenceLeft():
                self._let_go(event.request_id)
        return []

    def step_ended(self) -> list[InstanceCommand]:
        """Have those rest that were asked to. Call when the tokens of the step are given out, before the next plan."""
        asked, self.stopping = list(self.stopping), {}
        return [self._stop(request_id) for request_id in asked]

    def aborted(self, sequence: Sequence) -> list[InstanceCommand]:
        """A sequence that was aborted does not rest any more, nor will it. The machine has taken it from its own
        lists."""
        if self.resting.pop(sequence.id, None) is not None:
            self._ledger.release(sequence, sequence.num_computed_tokens, will_return=False)
        if sequence.id not in self.stopping:
            return []
        del self.stopping[sequence.id]
        return [StopRefused(sequence.id, "it was aborted")]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _keep_room(self, request_id: RequestId, num_tokens: int) -> InstanceCommand:
        room = self.rooms.get(request_id)
        reason = self._why_no_room(request_id, num_tokens, room)
        if reason is not None:
            self._give_up_room(request_id)
            return RoomRefused(request_id, reason)
        if room is None:
            room = self.rooms[request_id] = Holding(request_id, ())
        self._ledger.extend(room, num_tokens)
        return RoomKept(request_id, num_tokens)

    def _why_no_room(self, request_id: RequestId, num_tokens: int, room: Holding | None) -> str | None:
        machine = self._machine
        limits = machine.limits
        if machine.sequence(request_id) is not None:
            return "the request is here already"
        if num_tokens >= machine.max_model_len:
            return f"it has {num_tokens} tokens, and this instance takes {machine.max_model_len - 1} at most"
        if room is None and len(machine.running) + self.num_slots >= limits.max_num_seqs:
            return f"all {limits.max_num_seqs} slots are taken"
        num_new = -(-num_tokens // limits.block_size) - (0 if room is None else room.num_blocks)
        headroom = limits.watermark_blocks if room is None and machine.running else 0
        if num_new + headroom > self._ledger.num_available:
            return f"it needs {num_new} blocks, and {self._ledger.num_available} can be had"
        return None

    def _give_up_room(self, request_id: RequestId) -> None:
        room = self.rooms.pop(request_id, None)
        if room is not None:
            self._ledger.release(room, 0, will_return=False)

    def _adopt(self, event: SequenceAdopted) -> None:
        request = event.request
        room = self.rooms.pop(request.id, None)
        num_tokens = request.num_prompt_tokens + event.num_output_tokens
        if room is None or room.num_blocks * self._ledger.block_size < num_tokens - 1:
            raise LawBroken(f"law 3: {request.id} came with {num_tokens} tokens, and no room is kept for so many")
        if event.num_output_tokens < 1:
            raise LawBroken(f"law 2: {request.id} came with its KV and without a token")
        sequence = Sequence(request, self._ledger.block_size)
        sequence.num_blocks = room.num_blocks
        sequence.num_tokens = num_tokens
        sequence.num_computed_tokens = num_tokens - 1
        # The block that its next token may need is taken by the step that computes it, as everybody's is.
        self._ledger.trim(sequence, num_tokens - 1)
        self._ledger.publish(sequence, num_tokens - 1)
        sequence.move("adopted")
        self._machine.take_in(sequence)

    def _ask_to_stop(self, request_id: RequestId) -> list[InstanceCommand]:
        sequence = self._machine.sequence(request_id)
        if sequence is not None and sequence.state == "running" and self._machine.is_in_step:
            self.stopping[request_id] = None
            return []
        return [self._stop(request_id)]

    def _stop(self, request_id: RequestId) -> InstanceCommand:
        sequence = self._machine.sequence(request_id)
        if sequence is None:
            return StopRefused(request_id, "it has ended")
        if sequence.state == "resting":
            return SequenceStopped(request_id, sequence.num_tokens)
        if sequence.state != "running":
            return StopRefused(request_id, "it waits")
        if sequence.num_pending_tokens != 1 or not sequence.num_output_tokens:
            return StopRefused(request_id, f"{sequence.num_pending_tokens} of its tokens are not computed yet")
        self._machine.take_out(sequence)
        sequence.move("stopped")
        self.resting[request_id] = sequence
        return SequenceStopped(request_id, sequence.num_tokens)

    def _resume(self, request_id: RequestId) -> None:
        self.stopping.pop(request_id, None)
        sequence = self.resting.pop(request_id, None)
        if sequence is not None:
            sequence.move("resumed")
            self._machine.put_back(sequence)

    def _let_go(self, request_id: RequestId) -> None:
        sequence = self.resting.pop(request_id, None)
        if sequence is None:
            return
        self._ledger.release(sequence, sequence.num_computed_tokens, will_return=False)
        sequence.move("left")
        self._machine.forget(sequence)


def in_order_of_admission(sequences: list[Sequence], sequence: Sequence) -> None:
    """Put a sequence back where it stood."""
    insort(sequences, sequence, key=attrgetter("admitted_seq"))
