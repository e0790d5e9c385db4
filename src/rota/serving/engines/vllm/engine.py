"""A vLLM that we run with the plug-in inside: what its steps were is known from its facts, not asked for."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from rota.base.errors import EngineError
from rota.base.instant import Duration, Instant
from rota.serving.engines.engine import RequestStays, StepTotals
from rota.serving.engines.managed import ManagedEngine
from rota.serving.engines.process import ProcessSpec
from rota.serving.engines.vllm.control import Command, ask
from rota.serving.engines.vllm.facts import EngineFacts, StepRecord
from rota.serving.engines.vllm.follower import FactsFollower
from rota.serving.engines.vllm.tickets import Ticket
from rota.serving.model.capabilities import NOTHING, EngineCapabilities
from rota.serving.model.instance import InstanceId, InstanceReport
from rota.serving.model.request import RequestId

FOLLOW_SECONDS = 0.1


Heard = Callable[[InstanceReport, Duration, StepTotals], None]


class VllmEngine(ManagedEngine):
    """A vLLM process that writes facts. As long as steps run, its load comes from them, several times a second;
    when none ran since the last look, its `/metrics` say so, as for any server."""

    def __init__(
        self,
        instance_id: InstanceId,
        url: str,
        process: ProcessSpec,
        facts: Path,
        *,
        control: Path | None = None,
        capabilities: EngineCapabilities = NOTHING,
    ) -> None:
        """`facts` is the file that the plug-in was told to write, `control` the socket that it listens at."""
        super().__init__(instance_id, url, process, capabilities=capabilities)
        self._facts = facts
        self._control = control
        self._heard: Heard = lambda report, age, steps: None
        self._totals = StepTotals()
        self._has_told = False
        self._following: asyncio.Task[None] | None = None

    def on_report(self, heard: Heard) -> None:
        """Have `heard(report, age, totals)` called after steps; `age` is how long ago the report was true."""
        self._heard = heard

    async def start(self) -> None:
        follower = FactsFollower(self._facts)
        await super().start()
        self._following = asyncio.create_task(self._follow(follower), name=f"facts of {self.id}")

    async def stop(self) -> None:
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        await super().stop()

    async def hand_off(self, request_id: RequestId, *, timeout_seconds: float = 10.0) -> Ticket:
        """Have a running request end with its next token (one later where that would fall on the boundary of a block),
        and get the ticket with which it goes on elsewhere: `live.resumption` makes the call of it.

        `request_id` is the `X-Request-Id` that it was submitted with. The answer under way ends with the ticket's last
        token and `finish_reason` "length", before or after this returns; whoever owns the client's stream passes on
        each token once, by its index, and keeps that finish to itself. The source forgets the request at once, but
        keeps its blocks until they are pulled, or for 30 s. If the destination refuses or fails, go on by replay at any
        engine, this one too (its prefix cache most likely has the blocks yet). A pull that fails inside the destination
        is no matter: it computes the tokens anew.

        Raises `RequestStays` if it was not let go of: it waits, was preempted meanwhile, ended by itself, or has what
        does not travel (`hand_off.why_it_stays`). Raises `EngineError` if there is no answer; then the command is taken
        back as soon as the engine's next step begins, so that either the request goes on, or its answer ends with
        "length" before its time and the ticket is lost: go on by replay.
        """
        if self._control is None:
            raise EngineError(f"{self.id} has no control socket", hint="start it with VllmServer(control=…)")
        reply = await ask(self._control, Command(hand_off=request_id), timeout_seconds=timeout_seconds)
        if reply.ticket is None:
            raise RequestStays(f"{request_id} stays: {reply.stays.reason if reply.stays else 'no reason was given'}")
        return reply.ticket

    async def report(self) -> InstanceReport | None:
        """Its load as its metrics have it, unless its facts told since this was asked last."""
        has_told, self._has_told = self._has_told, False
        return None if has_told else await super().report()

    async def _follow(self, follower: FactsFollower) -> None:
        try:
            while True:
                await asyncio.sleep(FOLLOW_SECONDS)
                last: StepRecord | None = None
                for line in follower.read_new():
                    if isinstance(line, EngineFacts):
                        self._totals, last = StepTotals(), None  # the engine was started again
                    else:
                        self._totals, last = plus(self._totals, line), line
                if last is not None:
                    age = Duration(max(0, time.monotonic_ns() - last.at - last.step_ns))
                    self._has_told = True
                    self._heard(report_of(self.id, last, self._totals), age, self._totals)
        finally:
            follower.close()


def report_of(instance_id: InstanceId, record: StepRecord, totals: StepTotals) -> InstanceReport:
    """The instance at the end of a step. Blocks that ended sequences gave back are counted with the next step only,
    unless nobody is left."""
    num_running = max(0, record.num_running - record.num_finished)
    is_idle = num_running == 0 and record.num_waiting == 0
    return InstanceReport(
        instance_id=instance_id,
        observed_at=Instant(0),
        num_running=num_running,
        num_waiting=record.num_waiting,
        num_free_blocks=record.num_blocks if is_idle else record.num_free_blocks,
        num_blocks=record.num_blocks,
        num_preemptions=totals.num_preempted + totals.num_displaced,
    )


def plus(totals: StepTotals, record: StepRecord) -> StepTotals:
    """The totals after one more step."""
    return msgspec.structs.replace(
        totals,
        num_steps=totals.num_steps + 1,
        step_time=Duration(totals.step_time + record.step_ns),
        decision_time=Duration(totals.decision_time + record.decision_ns),
        num_prefill_tokens=totals.num_prefill_tokens + record.num_prefill_tokens,
        num_decode_tokens=totals.num_decode_tokens + record.num_decodes,
        num_cached_tokens=totals.num_cached_tokens + record.num_cached_tokens,
        num_preempted=totals.num_preempted + record.num_preempted,
        num_displaced=totals.num_displaced + record.num_displaced,
    )
