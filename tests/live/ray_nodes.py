"""A Ray cluster of several nodes on this machine, small, and gone after the test."""

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from rota.serving.engines.ray.cluster import NAMESPACE

STORE = 80 * 2**20


@contextmanager
def nodes(num_nodes: int, **resources: Any) -> Iterator[Cluster]:
    """So many nodes, the head among them, with the driver joined to the head."""
    # Ray would end engines where other work on this machine leaves it little memory.
    told = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    options = {"object_store_memory": STORE, **resources}
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **options})
    try:
        for _ in range(num_nodes - 1):
            cluster.add_node(**options)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def kill(cluster: Cluster, node_id: str) -> None:
    """End a node as a machine ends: nothing on it gets to say anything."""
    (node,) = [each for each in cluster.worker_nodes if each.node_id == node_id]
    cluster.remove_node(node, allow_graceful=False)


def pids(words: str) -> list[int]:
    """Processes of this machine whose command line has these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words in path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"):
                found.append(int(path.parent.name))
    return found


def members(session: int) -> list[int]:
    """Processes of a session, whatever became of the one that began it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


async def until(holds: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not holds():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"never came true: {what}") from None
