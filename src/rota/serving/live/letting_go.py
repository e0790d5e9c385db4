"""One hand-off at its source: from the order to let a request go until it is certain what came of that.

The ticket comes by the engine's control socket, the end of its part by the stream, in any order. Whoever has both knows
every token up to there, and may ask the next engine to pull. An engine that was told to let go may do so at any later
step, so giving up is no matter of not listening any more: the reply is waited for, and says where the request is.
"""

import asyncio
from collections.abc import Callable

from rota.base.errors import EngineError
from rota.serving.engines.engine import LetsGo, RequestStays
from rota.serving.engines.vllm.tickets import Ticket
from rota.serving.live.attempt import FollowedAttempt
from rota.serving.model.request import RequestId

REPLY_SECONDS = 60.0
"""An engine that does not say anything for so long, and did not become lost meanwhile, is not believed in any more."""


class LettingGo:
    """Calls one of three, once, unless the attempt ends otherwise: `on_left` with the ticket, the stream's end kept and
    when it came; `on_stays` with the reason: it goes on at its source; `on_cut` with the reason: its source stopped it,
    or may have, and there is no ticket to go by, or nobody wants it any more."""

    def __init__(
        self,
        attempt: FollowedAttempt,
        *,
        on_left: Callable[[Ticket, float], None],
        on_stays: Callable[[str], None],
        on_cut: Callable[[str], None],
    ) -> None:
        self.attempt = attempt
        self._on_left = on_left
        self._on_stays = on_stays
        self._on_cut = on_cut
        self._ticket: Ticket | None = None
        self._ended_at: float | None = None
        self._given_up: str | None = None
        self._asking: asyncio.Task[None] | None = None

    def begin(self, engine: LetsGo, request_id: RequestId) -> None:
        """Ask."""
        self.attempt.keep_end(self._ended)
        self._asking = asyncio.create_task(self._ask(engine, request_id), name=f"hand off {request_id}")

    def give_up(self, reason: str) -> None:
        """It shall go on at its source after all. If its source has stopped it already, that is by its tokens, whether
        or not a ticket comes."""
        self._given_up = reason
        if self._ended_at is not None:
            self.forget()
            self._on_cut(reason)

    def forget(self) -> None:
        """Its attempt is over: nothing is to be said any more."""
        if self._asking is not None:
            self._asking.cancel()

    async def _ask(self, engine: LetsGo, request_id: RequestId) -> None:
        try:
            self._ticket = await engine.hand_off(request_id, timeout_seconds=REPLY_SECONDS)
        except RequestStays as error:
            self._on_stays(error.message)
        except EngineError as error:
            self._on_cut(error.message)
        else:
            self._go_on_if_both()

    def _ended(self) -> None:
        self._ended_at = asyncio.get_running_loop().time()
        self._go_on_if_both()

    def _go_on_if_both(self) -> None:
        if self._ticket is None or self._ended_at is None:
            return
        if self._given_up is not None:
            self._on_cut(self._given_up)
        else:
            self._on_left(self._ticket, self._ended_at)
