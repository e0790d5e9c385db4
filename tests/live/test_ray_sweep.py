"""`rota sweep --on ray` on two nodes: the same results as on this machine, from both of them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.command_line import rota

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from ray.cluster_utils import Cluster  # noqa: E402

from rota.base.errors import ConfigError  # noqa: E402
from rota.serving.studies.runner import RayRunner  # noqa: E402

pytestmark = pytest.mark.slow

WORKLOAD = """
num_requests = 60
[arrivals]
rate = 12.0
[prompt]
quantiles = {"0" = 16, "0.5" = 400, "1" = 2048}
[output]
quantiles = {"0" = 1, "0.5" = 60, "1" = 200}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one core each, on this machine."""
    quiet = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **quiet})
    nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    nodes.wait_for_nodes()
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def where(number: int) -> str:
    """Which node ran this; long enough that one node cannot take all."""
    import time

    import ray

    time.sleep(0.3)
    return str(ray.get_runtime_context().get_node_id())


def refuse(number: int) -> None:
    raise ConfigError(f"number {number} is refused", hint="try another")


def test_both_nodes_work_and_results_come_back_in_place(cluster: Cluster) -> None:
    with RayRunner() as runner:
        found = dict(runner.map(where, list(range(12))))
    assert sorted(found) == list(range(12))
    assert len(set(found.values())) == 2


def test_an_error_comes_back_as_it_was(cluster: Cluster) -> None:
    with RayRunner() as runner, pytest.raises(ConfigError, match="number 3 is refused") as raised:
        list(runner.map(refuse, [3]))
    assert raised.value.hint == "try another"


def test_a_sweep_on_two_nodes_has_the_results_of_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "workload.toml").write_text(WORKLOAD)
    words = (
        "--set",
        f"trace={tmp_path / 'workload.toml'}",
        "--vary",
        "instances=1,2",
        "--vary",
        "seed=0,1,2",
        "--json",
    )
    there = rota("sweep", *words, "--on", "ray", "--out", tmp_path / "there.parquet")
    here = rota("sweep", *words, "--jobs", 1, "--out", tmp_path / "here.parquet")
    assert (there.code, here.code) == (0, 0), there.stderr
    assert json.loads(there.stdout)["num_runs"] == 6
    rows = [pq.read_table(tmp_path / f"{name}.parquet").drop(["cpu_seconds"]).to_pylist() for name in ("there", "here")]
    assert rows[0] == rows[1]
