"""The HTTP surface under a property-based fuzzer, against the router's own OpenAPI description, over a real socket."""

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from rota.serving.frontdoor.admin import PATHS
from rota.serving.model.instance import InstanceLimits
from rota.testing.router import RunningRouter, running_router

NUM_EXAMPLES = 30
MOST_TOKENS = 2**31 - 1
"""The largest bound that the description states; the router refuses more."""


class RouterThread:
    """A router on a loop of its own, so that a blocking client can be let loose on it."""

    def __init__(self) -> None:
        self.running: RunningRouter | None = None
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._run()), daemon=True)

    async def _run(self) -> None:
        # Large enough that what the fuzzer thinks up fits: a refusal for length would be right, but teaches nothing.
        async with running_router(num_simulated=2, limits=InstanceLimits(num_blocks=65_536)) as self.running:
            self._ready.set()
            await self._stop.wait()

    def start(self) -> RunningRouter:
        self._thread.start()
        assert self._ready.wait(20)
        assert self.running is not None
        return self.running

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)


@pytest.fixture(scope="module")
def running() -> Iterator[RunningRouter]:
    thread = RouterThread()
    yield thread.start()
    thread.stop()


RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("label", "mode", "num_examples"),
    [
        ("POST /v1/chat/completions", RIGHT, NUM_EXAMPLES),
        ("POST /v1/chat/completions", WRONG, NUM_EXAMPLES),
        ("POST /v1/completions", RIGHT, NUM_EXAMPLES),
        ("POST /v1/completions", WRONG, NUM_EXAMPLES),
        # There is nothing to get wrong in a request without parameters.
        ("GET /v1/models", RIGHT, 1),
        ("GET /health", RIGHT, 1),
        ("GET /metrics", RIGHT, 1),
        ("GET /admin/instances", RIGHT, 1),
        # Names that it thinks up are no instance's, so it drains none under the others' feet.
        ("POST /admin/instances/{instance_id}/drain", RIGHT, NUM_EXAMPLES),
        ("POST /admin/instances/{instance_id}/undrain", RIGHT, NUM_EXAMPLES),
        ("POST /admin/requests/{request_id}/migrate", RIGHT, NUM_EXAMPLES),
        ("POST /admin/requests/{request_id}/migrate", WRONG, NUM_EXAMPLES),
    ],
)
def test_every_answer_is_one_that_the_description_promises(
    label: str, mode: GenerationMode, num_examples: int, running: RunningRouter
) -> None:
    schema = schemathesis.openapi.from_url(running.url + "/openapi.json")
    num_finished_before = running.router.cluster.machine.counts().num_finished
    operation = next(found.ok() for found in schema.get_all_operations() if found.ok().label == label)

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def fuzz(case: schemathesis.Case) -> None:
        # An answer of two thousand million words takes long. What is beyond all bounds stays, since it must be refused.
        for field in ("max_tokens", "max_completion_tokens"):
            wished = case.body.get(field) if isinstance(case.body, dict) else None
            if isinstance(wished, int) and 20 < wished <= MOST_TOKENS:
                case.body[field] = 20
        case.call_and_validate(timeout=20)

    fuzz()
    # The router is whole after it, and what was right got through to an engine.
    machine = running.router.cluster.machine
    machine.check()
    counts = machine.counts()
    assert not running.router.cluster.flights
    assert counts.num_failed == 0
    if mode == RIGHT and label.endswith("completions"):
        assert counts.num_finished - num_finished_before > 10, "the fuzzer hardly got through to an engine"


def test_the_description_is_valid_and_names_what_is_served(running: RunningRouter) -> None:
    from rota.serving.frontdoor.http1 import HttpLimits
    from rota.serving.frontdoor.openapi import describe

    description = json.loads(json.dumps(describe(HttpLimits())))
    assert set(description["paths"]) == {*running.router.door._routes, *PATHS}
