"""What the live host asks of an engine, whatever it is made of. `rota.testing.engine.check_engine` proves it."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import msgspec

from rota.base.errors import EngineError
from rota.base.instant import Duration
from rota.serving.engines.vllm.tickets import Ticket
from rota.serving.model.instance import InstanceId, InstanceReport, InstanceSpec
from rota.serving.model.request import Request, RequestId

Headers = list[tuple[bytes, bytes]]


class EngineCall(msgspec.Struct, frozen=True, gc=False):
    """One request as an engine is sent it: the facts, and the client's own bytes."""

    request: Request
    path: str
    """`/v1/chat/completions` or `/v1/completions`."""
    headers: Headers
    """To be sent along, with those of the connection itself left out."""
    body: bytes
    stream: bool
    has_arguments: bool = True
    """False where the body is known to have no `vllm_xargs`."""
    num_arguments_bytes: int = 0
    """Up to the end of `vllm_xargs`, where the body begins with them; else 0."""
    waited: Duration = Duration(0)
    """From its arrival until it was sent on, where that is worth telling an engine; else 0."""


class AnswerSink(Protocol):
    """Who hears an answer: `on_head` once, `on_data` any number of times, then `on_end`; or `on_failed` in the place of
    any of them, and nothing after it. Never called from within `submit` or `abort`."""

    def on_head(self, status: int, headers: Headers) -> None:
        """The answer begins. Header names are lower-case."""
        ...

    def on_data(self, data: bytes) -> None:
        """Bytes of the body, as many as came at once."""
        ...

    @property
    def on_chunks(self) -> Callable[[bytes], bool] | None:
        """Takes bytes of the body in place of `on_data` where they are whole HTTP/1.1 chunks, framing included; False
        leaves them to `on_data` after all. An engine that has such may ask after each `on_data`. None wants none (any
        more or yet)."""
        ...

    def on_end(self) -> None:
        """The answer is whole."""
        ...

    def on_failed(self, reason: str) -> None:
        """The engine cannot be reached, was lost, or broke off."""
        ...


class EngineStatus(msgspec.Struct, frozen=True):
    """A healthy engine, as a probe found it."""

    spec: InstanceSpec
    models: tuple[dict[str, object], ...] = ()
    """Entries of its `/v1/models`."""


class StepTotals(msgspec.Struct, frozen=True):
    """What the steps of an engine added up to since it was started."""

    num_steps: int = 0
    step_time: Duration = Duration(0)
    decision_time: Duration = Duration(0)
    """Of that, what our policies took."""
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache."""
    num_preempted: int = 0
    num_displaced: int = 0


class Engine(Protocol):
    """One engine instance."""

    @property
    def id(self) -> InstanceId: ...

    async def start(self) -> None:
        """Get hold of what the engine needs; for an engine process, start it. Does not wait until it is ready."""
        ...

    async def stop(self) -> None:
        """Give everything back. Answers under way fail."""
        ...

    async def probe(self) -> EngineStatus:
        """What the engine is, if it is healthy now. Raises `EngineError` if it is not."""
        ...

    async def report(self) -> InstanceReport | None:
        """Its load now, or None where it does not say. `observed_at` is left 0: the host stamps it."""
        ...

    def submit(self, call: EngineCall, sink: AnswerSink) -> None:
        """Send a request. What comes of it, the sink hears."""
        ...

    def abort(self, request_id: RequestId) -> None:
        """Stop working on a request; its sink hears nothing more. Unknown ids are ignored."""
        ...

    def pause(self, request_id: RequestId, paused: bool) -> None:
        """Hold an answer back while its client reads too slowly, or let it go on. An engine may ignore it."""
        ...


@runtime_checkable
class SupervisedEngine(Engine, Protocol):
    """An engine that is started anew when it ends."""

    @property
    def given_up(self) -> str | None:
        """Why it will not be started again, once that is so."""
        ...

    def on_exit(self, heard: Callable[[str], None]) -> None:
        """Have `heard(reason)` called whenever it ends unasked."""
        ...

    def kill(self) -> None:
        """End it at once, as a crash would."""
        ...


@runtime_checkable
class TellsText(Protocol):
    """An engine with `RESUME_FROM_TOKENS`: it says what tokens say."""

    async def text_of(self, token_ids: list[int]) -> str:
        """The text; what begins a character and does not end it is U+FFFD. Raises `EngineError`."""
        ...


class RequestStays(EngineError):
    """An engine did not let go of a request: it goes on there, or is not there. The message says why."""


@runtime_checkable
class LetsGo(Protocol):
    """An engine with `HAND_OVER_KV`: it can be told to let go of a running request."""

    async def hand_off(self, request_id: RequestId, *, timeout_seconds: float) -> Ticket:
        """Have a request end at its next token, and get the ticket with which it goes on at another engine. Its answer
        ends with the ticket's last token and `finish_reason` "length", before or after this returns.

        Raises `RequestStays` if it goes on here as if nobody had asked. Raises `EngineError` if there is no answer:
        then either may be.
        """
        ...
