"""What an instance writes of its steps is what the router knows of its load, and says on its own metrics."""

import re
import sys
import time
from pathlib import Path

import msgspec
import pytest
from tests.unit.vllm.test_facts import record
from tests.worlds.test_router_processes import WATCH, until

from rota.serving.engines.http_client import HttpClient
from rota.serving.engines.managed import free_port
from rota.serving.engines.process import ProcessSpec
from rota.serving.engines.vllm.engine import VllmEngine
from rota.serving.engines.vllm.facts import EngineFacts, FactsFile
from rota.serving.frontdoor.serve import ServeConfig
from rota.serving.model.events import InstanceReported
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceReport
from rota.testing.router import RunningRouter, running_router

ENGINE = EngineFacts("vLLM", "m", "cpu", "bfloat16", InstanceLimits(num_blocks=64))


def engine_with(facts: Path) -> VllmEngine:
    """A server that knows nothing of the facts; they are written by the test."""
    port = free_port()
    command = (sys.executable, "-m", "rota.serving.frontdoor.simulated_server", "--port", str(port))
    spec = ProcessSpec("a", command, str(facts.with_name("a.log")))
    return VllmEngine(InstanceId("a"), f"http://127.0.0.1:{port}", spec, facts)


async def metrics(running: RunningRouter) -> dict[str, float]:
    client = HttpClient(running.url)
    text = (await client.fetch("GET", "/metrics", timeout_seconds=5)).decode()
    client.close()
    return {name: float(value) for name, value in re.findall(r"^rota:instance_(\S+?) (\S+)$", text, re.MULTILINE)}


def reports(running: RunningRouter) -> list[InstanceReport]:
    return [row.event.report for row in running.journal.rows if isinstance(row.event, InstanceReported)]


@pytest.mark.asyncio
async def test_load_comes_from_the_facts_while_steps_run_and_from_probes_otherwise(tmp_path: Path) -> None:
    engine = engine_with(tmp_path / "facts")
    async with running_router(num_simulated=0, engines=[engine], serve=ServeConfig(port=0, watch=WATCH)) as running:
        (watch,) = running.router.watches
        await until(lambda: watch.num_reports["probe"] > 1, "idle, it is asked for its load")
        facts = FactsFile(tmp_path / "facts", engine=ENGINE)
        step = msgspec.structs.replace(record(1), num_running=5, num_waiting=3, num_free_blocks=17, num_blocks=64)
        for number in range(20):
            at = time.monotonic_ns() - 5_000_000_000
            facts.append(msgspec.structs.replace(step, step=number, at=at, step_ns=1000, num_displaced=1))
        before = running.router.cluster.loop.now()
        facts.flush()
        await until(lambda: watch.num_reports["facts"] == 1, "the facts are read")
        (report,) = [each for each in reports(running) if each.num_running]
        assert (report.num_running, report.num_waiting, report.num_free_blocks, report.num_blocks) == (5, 3, 17, 64)
        assert report.num_preemptions == 20
        assert report.observed_at < before, "as old as the step, not as our look at it"
        engine._has_told = True
        assert await engine.report() is None, "it has told, so it need not be asked"

        shown = await metrics(running)
        assert shown['steps_total{instance="a"}'] == 20
        assert shown['prefill_tokens_total{instance="a"}'] == 60
        assert shown['displacements_total{instance="a"}'] == 20
        assert shown['reports_total{instance="a",source="facts"}'] == 1
        num_probes = watch.num_reports["probe"]
        await until(lambda: watch.num_reports["probe"] > num_probes, "no step ran since, so it is asked again")

        again = FactsFile(tmp_path / "facts", engine=ENGINE)  # as an engine that was started again
        again.append(step)
        again.flush()
        await until(lambda: watch.num_reports["facts"] == 2, "the new engine's facts are read")
        assert (await metrics(running))['steps_total{instance="a"}'] == 1
        facts.close()
        again.close()
