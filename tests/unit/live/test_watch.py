"""An engine that does not get ready is taken to be hung, once for each of its starts."""

from types import SimpleNamespace
from typing import Any

import pytest

from rota.base.errors import EngineError
from rota.base.instant import Instant, seconds
from rota.serving.live.watch import EngineWatch, WatchSettings


class Scripted:
    """An engine whose probes fail, and the little of a cluster that its watch needs."""

    id = "e"

    def __init__(self) -> None:
        self.now, self.statuses, self.is_well = Instant(0), {}, False
        self.loop = SimpleNamespace(now=lambda: self.now)
        self.watch = EngineWatch(self, self, WatchSettings(start_seconds=100.0))  # type: ignore[arg-type]
        self.num_hung = 0
        self.watch.on_hung = self.hung

    def hung(self) -> None:
        self.num_hung += 1

    async def probe(self) -> Any:
        if not self.is_well:
            raise EngineError("nobody answers")

    async def report(self) -> None:
        return None

    async def look_at(self, *at: float) -> int:
        for each in at:
            self.now = Instant(seconds(each))
            await self.watch._look()
        return self.num_hung

    # --- the cluster -------------------------------------------------------------------------------------------------

    def streams_at(self, instance_id: str) -> dict[str, bytes]:
        return {}

    def num_in_flight(self) -> dict[str, int]:
        return {"e": 0}

    def try_again(self, instance_id: str) -> None: ...

    def started(self, status: object) -> None:
        self.statuses["e"] = status

    def lost(self, instance_id: str, reason: str) -> None:
        self.statuses.pop("e", None)


@pytest.mark.asyncio
async def test_a_start_without_an_end_is_hung() -> None:
    engine = Scripted()
    assert await engine.look_at(5, 50, 104) == 0
    assert await engine.look_at(105, 106, 150) == 1
    assert "nobody answers" in (engine.watch.last_error or "")
    assert await engine.look_at(206) == 2, "the next start is given as long"


@pytest.mark.asyncio
async def test_the_time_counts_from_the_start_and_not_from_the_loss() -> None:
    engine = Scripted()
    await engine.look_at(1)
    engine.is_well = True
    await engine.look_at(90, 500)
    engine.is_well = False
    engine.watch.engine_exited("it died")
    assert await engine.look_at(501, 600) == 0
    engine.watch.engine_exited("it died again")
    assert await engine.look_at(601, 700) == 0
    assert await engine.look_at(701) == 1
