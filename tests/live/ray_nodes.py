"""A Ray cluster of several nodes on this machine, small, and gone after the test."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from rota.serving.engines.managed import free_port
from rota.serving.engines.ray.cluster import NAMESPACE

STORE = 80 * 2**20
TOLD = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would end engines where other work on this machine leaves it little memory.
    "RAY_memory_monitor_refresh_ms": "0",
}


@contextmanager
def nodes(num_nodes: int, **resources: Any) -> Iterator[Cluster]:
    """So many nodes, the head among them, with the driver joined to the head."""
    before = {name: os.environ.get(name) for name in TOLD}
    os.environ.update(TOLD)
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


@contextmanager
def autoscaled(num_nodes_max: int, num_cpus: int) -> Iterator[str]:
    """A head without CPUs and Ray's own autoscaler, which starts up to so many nodes on this machine when they are
    wanted and ends those that are idle for 3 s; the driver has joined. Gives the address.

    As `ray.cluster_utils.AutoscalingCluster`, but beside other clusters of this machine: that one ends them all."""
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        config = Path(folder) / "autoscaler.json"
        config.write_text(json.dumps(_autoscaler(address, num_nodes_max, num_cpus)))
        head = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0"),
                *(f"--port={address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"),
                *(f"--autoscaling-config={config}", f"--object-store-memory={STORE}", "--include-dashboard=false"),
            ],
            env={**os.environ, **TOLD, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                 "RAY_AUTH_MODE": "disabled"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            _wait_for(address)
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
            yield address
        finally:
            ray.shutdown()
            head.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(20)
            # The nodes are children of the autoscaler, which is gone.
            for pid in pids(folder):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


HEAD = "ray.head.default"
"""What Ray's provider of local nodes takes the head for, whatever the file calls it. Under another name it is never
there, and one is started and ended without end."""


def _autoscaler(address: str, num_nodes_max: int, num_cpus: int) -> dict[str, Any]:
    provider = {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    worker = {"CPU": num_cpus, "object_store_memory": STORE}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    nothing: dict[str, Any] = {f"{name}_commands": [] for name in commands}
    nothing |= {"docker": {}, "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "rsync_exclude": []}
    return nothing | {
        "cluster_name": "nodes",
        "max_workers": num_nodes_max,
        "provider": {"type": "fake_multinode", "gcs_address": address, **provider},
        "available_node_types": {
            HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": num_nodes_max},
        },
        "head_node_type": HEAD,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.05,
        "file_mounts_sync_continuously": False,
    }


def _wait_for(address: str, seconds: float = 60.0) -> None:
    host, _, port = address.rpartition(":")
    ends_at = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
            return
        except OSError:
            if time.monotonic() > ends_at:
                raise AssertionError("the head of the Ray cluster never came") from None
            time.sleep(0.1)


def alive() -> set[str]:
    """Nodes of the cluster, the head among them."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def standing_request() -> list[dict[str, float]]:
    """The bundles that the autoscaler is to keep room for."""
    from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
    from ray.experimental.internal_kv import _internal_kv_get

    return list(json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)))


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
