"""A server that answers at once and writes a step into its facts for every answer."""

import time
from pathlib import Path

import msgspec
from aiohttp import web
from tests.unit.bench.stub import StubServer
from tests.unit.calibration.fabricated import ENGINE, facts, straight

from rota.serving.engines.vllm.facts import FactsFile

_LIKE = facts(straight, num_stretches=1, num_steps=1)[0]


class FakeEngine(StubServer):
    """An engine as calibration sees one. `num_at_once` is the most that it was asked at the same time."""

    def __init__(self, path: Path, *, delay_seconds: float = 0.0, model: str = "ok") -> None:
        super().__init__((model,), delay_seconds)
        self.num_at_once = 0
        self._num_open = 0
        self._facts = FactsFile(path, engine=ENGINE)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self._num_open += 1
        self.num_at_once = max(self.num_at_once, self._num_open)
        at = time.monotonic_ns()
        try:
            return await super()._answer(request)
        finally:
            self._num_open -= 1
            self._facts.append(msgspec.structs.replace(_LIKE, at=at, step_ns=time.monotonic_ns() - at))
            self._facts.flush()
