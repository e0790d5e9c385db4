"""vLLM's waiting queue, walked by an order policy."""

from collections.abc import Iterable, Iterator
from time import perf_counter_ns
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue

from rota.base.errors import PolicyError
from rota.serving.api import Cursor, EngineView, OnRefusal, OrderPolicy, Pool, Refusal, SequenceView
from rota.serving.engines.vllm.views import VllmSequence
from rota.serving.waiting import WaitingQueue


class PolicyQueue(RequestQueue):
    """Stands where vLLM's own queue stood. Keeps vLLM's queue order (new ones at the end, preempted ones at the front);
    inside a scheduling pass it shows vLLM the requests one by one as the order policy's cursor gives them.

    vLLM's pass peeks, and then does one of three things, which the queue tells apart: it asks for the size of the
    chunk and pops (admitted: the cursor hears `granted`), it pops without having asked (not ready, e.g. its grammar is
    compiling: passed over, and the policy hears nothing, since it is vLLM that is not ready), or it ends the scan
    (`refused`).
    """

    def __init__(self, order: OrderPolicy, sequences: dict[str, VllmSequence]) -> None:
        self.view: Any = WaitingQueue()
        self.decision_ns = 0
        """Time spent in the policy during passes, since it was last set to 0."""
        self._order = order
        self._sequences = sequences
        self._engine: EngineView | None = None
        self._cursor: Cursor | None = None
        self._held: VllmSequence | None = None
        self._chunk: int | None = None
        self._is_exhausted = False
        self._passed_over: dict[str, VllmSequence] = {}
        self._leaving: list[VllmSequence] = []

    # --- the pass ----------------------------------------------------------------------------------------------------

    def open_pass(self, engine: EngineView, *, admits: bool = True) -> None:
        """From here to `close_pass` the queue follows the policy. The cursor is opened when vLLM first looks. Unless
        the pass `admits`, it sees nobody wait, as in a step in which it preempted somebody itself."""
        self._engine = engine
        self._cursor = None
        self._held = None
        self._chunk = None
        self._is_exhausted = not admits

    def note_chunk(self, request: Any, num_tokens: int) -> None:
        """vLLM has settled on this many tokens for the request that it peeked at; only room can refuse it now."""
        if self._held is not None and self._held.vllm is request:
            self._chunk = num_tokens

    def close_pass(self, *, has_slot: bool) -> None:
        """End the pass: tell the cursor of the request that ended vLLM's scan, if one did. Raises `PolicyError` if the
        policy wants to go on past it, which vLLM cannot."""
        self._engine = None
        for sequence in self._leaving:
            self.view.remove(sequence)
        self._leaving.clear()
        for sequence in self._passed_over.values():
            # vLLM moved it to another queue: it waits for keys and values from elsewhere.
            self._remove(sequence)
        self._passed_over.clear()
        held, self._held = self._held, None
        cursor, self._cursor = self._cursor, None
        if held is None or cursor is None:
            return
        shortage = Refusal.NO_BUDGET if has_slot else Refusal.NO_SLOT
        why = Refusal.NO_MEMORY if self._chunk else shortage
        if cursor.refused(held, why) is not OnRefusal.STOP:
            raise PolicyError(
                f"{type(self._order).__name__} wants to go on past {held.id} ({why}), and vLLM 0.32 cannot",
                hint="a policy that skips must require skip_refused, so that it is refused when the engine starts",
            )

    def _next(self) -> VllmSequence | None:
        if self._held is None and not self._is_exhausted:
            started = perf_counter_ns()
            assert self._engine is not None
            if self._cursor is None:
                self._cursor = self._order.open(self._engine, Pool.WAITING)
            given = self._cursor.next()
            self._held = self._checked(given) if given is not None else None
            self._is_exhausted = given is None
            self._chunk = None
            self.decision_ns += perf_counter_ns() - started
        return self._held

    def _checked(self, given: SequenceView) -> VllmSequence:
        sequence = self._sequences.get(given.id)
        if sequence is None or sequence is not given or not sequence.is_queued:
            raise PolicyError(f"{type(self._order).__name__} gave {given!r}, which does not wait here")
        if sequence.id in self._passed_over:
            raise PolicyError(f"{type(self._order).__name__} gave {given!r} twice in one walk")
        return sequence

    # --- RequestQueue ------------------------------------------------------------------------------------------------

    def add_request(self, request: Any) -> None:
        sequence = self._sequences[request.request_id]
        sequence.is_queued = True
        self.view.append(sequence)

    def pop_request(self) -> Any:
        if self._engine is None:
            raise PolicyError("the waiting queue was popped outside a scheduling pass")
        sequence = self._next()
        if sequence is None:
            raise IndexError("pop from an empty queue")
        chunk, self._held, self._chunk = self._chunk, None, None
        if chunk:
            # The cursor may be an iterator over the queue, so that nobody may leave it before the pass ends.
            sequence.is_queued = False
            self._leaving.append(sequence)
            assert self._cursor is not None
            self._cursor.granted(sequence, chunk)
        else:
            # It keeps its place; vLLM hands it back with `prepend_requests`.
            self._passed_over[sequence.id] = sequence
        return sequence.vllm

    def peek_request(self) -> Any:
        sequence = self._next() if self._engine is not None else next(iter(self.view), None)
        if sequence is None:
            raise IndexError("peek from an empty queue")
        return sequence.vllm

    def prepend_request(self, request: Any) -> None:
        sequence = self._sequences[request.request_id]
        sequence.is_queued = True
        self.view.prepend(sequence)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        for request in requests:
            if self._passed_over.pop(request.request_id, None) is None:
                self.prepend_request(request)

    def remove_request(self, request: Any) -> None:
        sequence = self._sequences.get(request.request_id)
        if sequence is None or not sequence.is_queued:
            raise ValueError(f"{request.request_id} does not wait here")
        self._remove(sequence)

    def remove_requests(self, requests: Iterable[Any]) -> None:
        for request in requests:
            sequence = self._sequences.get(request.request_id)
            if sequence is not None and sequence.is_queued:
                self._remove(sequence)

    def _remove(self, sequence: VllmSequence) -> None:
        sequence.is_queued = False
        self.view.remove(sequence)

    def __bool__(self) -> bool:
        return self._next() is not None if self._engine is not None else len(self.view) > 0

    def __len__(self) -> int:
        return len(self.view) - len(self._leaving)

    def __iter__(self) -> Iterator[Any]:
        return iter([sequence.vllm for sequence in self.view if sequence.is_queued])
