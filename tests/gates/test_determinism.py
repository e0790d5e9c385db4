"""Journals are equal to the byte across processes and hash seeds, and where instances tie as well."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rota.base.instant import Instant, milliseconds
from rota.base.journal import Journal
from rota.serving.api import ClusterView, Pick, Request
from rota.serving.assemble import header_of
from rota.serving.model.request import Request as Arrived
from rota.serving.model.request import RequestId
from rota.serving.policies.dispatch.prefix_then_load import PrefixThenLoad
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.sim.cluster import SimulatedCluster
from rota.serving.sim.run import SimulationConfig, simulate, system_config
from rota.serving.stack import Parameters, StackConfig

REPOSITORY = Path(__file__).parents[2]
TRACES = Path(os.environ.get("ROTA_DATA") or REPOSITORY.parent / "shared") / "traces"
AZURE = TRACES / "azure2023" / "AzureLLMInferenceTrace_conv.csv"
MOONCAKE = TRACES / "mooncake" / "conversation_trace.jsonl"
HASH_SEEDS = ("0", "1", "4294967295")


class CountsTies(PrefixThenLoad):
    """The shipped policy; counts the choices in which two instances were equally good."""

    num_ties = 0

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        pick = super().pick(request, cluster)
        ranks = [(-score, cluster_load(cluster, instance_id)) for instance_id, score in pick.scores]
        CountsTies.num_ties += ranks.count(min(ranks)) > 1
        return pick


class PicksFromASet(PrefixThenLoad):
    """A planted leak: among equals it takes the first of a set."""

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        best = super().pick(request, cluster)
        load = cluster_load(cluster, best.instance_id)
        equals = {each.id for each in cluster.instances if each.num_outstanding_tokens == load}
        return Pick(next(iter(equals)), "whichever comes first", best.scores)


def cluster_load(cluster: ClusterView, instance_id: str) -> int:
    return next(each.num_outstanding_tokens for each in cluster.instances if each.id == instance_id)


# No herding on one instance, so that several come to hold the same prefix.
STACK = StackConfig(dispatch=f"{__name__}:CountsTies", parameters=Parameters(dispatch={"balance_absolute": 0}))
CONFIGS = {
    "W1-like": SimulationConfig(trace=AZURE, num_requests=600, rate=6.0),
    "prefix routing": SimulationConfig(trace=MOONCAKE, num_requests=500, num_instances=8, stack=STACK),
    "equal bursts": SimulationConfig(trace=MOONCAKE, num_instances=8, stack=STACK),
    "leak": SimulationConfig(trace=MOONCAKE, num_instances=8, stack=StackConfig(dispatch=f"{__name__}:PicksFromASet")),
}


def bursts() -> Iterator[tuple[Arrived, int]]:
    """Groups that arrive at one instant, at instances that are all equal; every other prompt begins like others."""
    for number in range(400):
        group = number // 10
        request = Arrived(
            RequestId(f"r{number}"),
            Instant(milliseconds(2_000 * group)),
            112,
            64,
            block_hashes=tuple(f"family {group % 5}, block {block}" for block in range(6)) if number % 2 else (),
        )
        yield request, 1 + 7 * number % 40


def play(name: str, path: Path) -> None:
    config = CONFIGS[name]
    if name in ("W1-like", "prefix routing"):
        simulate(config, journal_path=path)
        return
    system = system_config(config)
    with Journal(header_of(system), path=path) as journal:
        SimulatedCluster(system, bursts(), AffineStepTime(), journal=journal).run()


def in_another_process(name: str, hash_seed: str, path: Path) -> dict[str, object]:
    program = (
        "import json, sys; from pathlib import Path; from tests.gates import test_determinism as gate; "
        "gate.play(sys.argv[1], Path(sys.argv[2])); print(json.dumps(gate.CountsTies.num_ties))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, name, str(path)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {
        "digest": hashlib.sha256(path.read_bytes()).hexdigest(),
        "num_bytes": path.stat().st_size,
        "num_ties": json.loads(done.stdout),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ties_min"), [("W1-like", 0), ("prefix routing", 20), ("equal bursts", 100)])
def test_journals_are_equal_to_the_byte(name: str, ties_min: int, tmp_path: Path) -> None:
    runs = [in_another_process(name, hash_seed, tmp_path / hash_seed) for hash_seed in HASH_SEEDS]
    assert runs[0] == runs[1] == runs[2]
    assert int(str(runs[0]["num_ties"])) >= ties_min, "a run without ties proves nothing about them"
    assert int(str(runs[0]["num_bytes"])) > 100_000


def test_a_tie_that_is_broken_by_a_set_is_caught(tmp_path: Path) -> None:
    digests = {in_another_process("leak", hash_seed, tmp_path / hash_seed)["digest"] for hash_seed in HASH_SEEDS}
    assert len(digests) > 1
