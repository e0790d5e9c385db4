"""A whole load run: connect, send the plan, report."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterable

import aiohttp
import msgspec

from rota.runtime.clocks import SystemClock
from rota.serving.bench.client import Endpoint, Sent, Target, first_model
from rota.serving.bench.load import send_load
from rota.serving.bench.plan import Planned
from rota.serving.bench.prompts import Prompts
from rota.serving.bench.report import LoadReport, report_of


class LoadOptions(msgspec.Struct, frozen=True):
    """Where a plan is sent, and how."""

    url: str
    """Without `/v1`."""
    model: str | None = None
    """None asks the server for its first."""
    endpoint: Endpoint = "chat"
    ignore_eos: bool = False
    timeout_seconds: float = 600.0
    num_warmups: int = 0
    seed: int = 0


class LoadResult(msgspec.Struct, frozen=True):
    """The report, and what it was made of."""

    report: LoadReport
    sent: list[Sent]


def run_load(
    plan: Iterable[Planned], prompts: Prompts, options: LoadOptions, *, on_ended: Callable[[int], None] | None = None
) -> LoadResult:
    """Send a plan and report; an interrupt (Ctrl-C) ends the run early, and the report is of what was measured.

    Raises `EngineError` if the server cannot be reached at all, `ConfigError` for a URL that is none.
    """
    return asyncio.run(_run(plan, prompts, options, on_ended))


async def _run(
    plan: Iterable[Planned], prompts: Prompts, options: LoadOptions, on_ended: Callable[[int], None] | None
) -> LoadResult:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Without limits of its own the client cannot become the queue that it is to measure.
    connector = aiohttp.TCPConnector(limit=0)
    key = os.environ.get("OPENAI_API_KEY")
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"authorization": f"Bearer {key}"} if key else None,
    ) as session:
        model = options.model or await first_model(session, options.url)
        clock = SystemClock().now
        target = Target(
            session,
            options.url,
            clock,
            model=model,
            endpoint=options.endpoint,
            ignore_eos=options.ignore_eos,
            timeout_seconds=options.timeout_seconds,
        )

        def text_of(planned: Planned) -> str:
            return prompts.text(
                planned.index, planned.num_prompt_tokens, planned.prefix_hashes, planned.hash_block_tokens
            )

        if sys.platform != "win32":
            loop.add_signal_handler(signal.SIGINT, stop.set)
        try:
            sent = await send_load(plan, target, text_of, clock, stop=stop, on_ended=on_ended)
        finally:
            if sys.platform != "win32":
                loop.remove_signal_handler(signal.SIGINT)
    report = report_of(
        sent,
        url=options.url,
        model=model,
        seed=options.seed,
        num_warmups=options.num_warmups,
        is_interrupted=stop.is_set(),
    )
    return LoadResult(report, sent)
