"""`rota deploy` writes files that Ray's own launcher takes, and a manifest whose parts fit together."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from tests.command_line import rota

yaml = pytest.importorskip("yaml", reason="comes with the extra ray")


def written(path: Path, *words: object) -> Any:
    ran = rota("deploy", "-o", path, *words)
    assert ran.code == 0, ran.stderr
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    "words",
    [
        ("--node", "10.0.0.1"),
        ("--node", "10.0.0.1", "--node", "host-2", "--user", "me: too", "--engine", "simulated"),
        ("--provider", "aws", "--instances", 3, "--max-instances", 9, "--model", "/models/it's $HOME"),
        ("--provider", "aws", "--gpus-per-instance", 0),
    ],
)
def test_rays_launcher_takes_the_cluster_file(tmp_path: Path, words: tuple[object, ...]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = written(tmp_path / "rota.yaml", "--to", "ray", *words)
    whole = prepare_config(config)
    validate_config(whole)
    assert whole["cluster_name"] == "rota"
    assert whole["setup_commands"][0].startswith("pip install 'rota[ray")


def test_a_cluster_file_is_for_the_machines_that_were_named(tmp_path: Path) -> None:
    config = written(tmp_path / "rota.yaml", "--to", "ray", "--node", "a", "--node", "b", "--node", "c")
    assert (config["provider"]["head_ip"], config["provider"]["worker_ips"]) == ("a", ["b", "c"])
    assert config["max_workers"] == 2


def test_the_command_that_a_file_names_is_one_that_serve_takes(tmp_path: Path) -> None:
    model = '/it\'s "my" $model'
    ran = rota("deploy", "--to", "ray", "--node", "a", "--json", "-o", tmp_path / "rota.yaml", "--model", model)
    words = json.loads(ran.stdout)["serve"]
    assert words[:2] == ["rota", "serve"]
    assert words[-1] == model
    (line,) = [line for line in (tmp_path / "rota.yaml").read_text().splitlines() if "ray exec" in line]
    assert shlex.split(shlex.split(line.removeprefix("#"))[-1]) == words
    # It gets as far as the cluster, which is not there.
    refused = rota("serve", *["ray=127.0.0.1:1" if word == "ray=auto" else word for word in words[2:]])
    assert "no cluster answers" in refused.stderr


def test_the_rayservice_hangs_together(tmp_path: Path) -> None:
    words = ("--image", "registry/rota:1", "--instances", 3, "--max-instances", 5, "--name", "chat")
    manifest = written(tmp_path / "rota.yaml", "--to", "kubernetes", *words)
    assert (manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]) == (
        "ray.io/v1",
        "RayService",
        "chat",
    )
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    module, _, function = application["import_path"].partition(":")
    app = pytest.importorskip(module)
    assert callable(getattr(app, function))
    cluster = manifest["spec"]["rayClusterConfig"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert app.PORT in {port["containerPort"] for port in head["ports"]}
    assert f"http://chat-head-svc:{app.PORT}/v1" in (tmp_path / "rota.yaml").read_text()
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 5)
    (worker,) = group["template"]["spec"]["containers"]
    limits, flags = worker["resources"]["limits"], application["args"]["flags"]
    assert limits["nvidia.com/gpu"] == flags[flags.index("--gpus-per-instance") + 1]
    assert limits["cpu"] == flags[flags.index("--cpus-per-instance") + 1]
    assert flags[flags.index("--scale") + 1] == "3:5"


def test_the_rayservice_has_what_kuberay_demands(tmp_path: Path) -> None:
    """What the schema of its custom resource requires or types, and what its operator refuses or adds besides."""
    manifest = written(tmp_path / "rota.yaml", "--to", "kubernetes", "--image", "registry/rota:1", "--name", "a" * 40)
    spec = manifest["spec"]
    cluster = spec["rayClusterConfig"]
    assert isinstance(spec["serveConfigV2"], str)
    assert isinstance(cluster["rayVersion"], str)
    assert cluster["enableInTreeAutoscaling"] is True
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "registry/rota:1"
        for amounts in container["resources"].values():
            assert all(isinstance(amount, str) for amount in amounts.values())
        # Ray's autoscaler restarts no pod by itself; version 2 of it refuses pods that do.
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"
    for group in cluster["workerGroupSpecs"]:
        assert group["groupName"]
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    ports = {port["name"]: port["containerPort"] for port in groups[0]["template"]["spec"]["containers"][0]["ports"]}
    assert ports["gcs-server"] == 6379
    assert ports["serve"] == 8000
    # The operator adds this one, and a service with a port twice is refused.
    ports.setdefault("metrics", 8080)
    assert len(set(ports.values())) == len(ports)
    assert len(manifest["metadata"]["name"]) <= 47


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "kubernetes"), "--image: missing"),
        (("--to", "ray"), "--node: which machines?"),
        (("--to", "ray", "--node", "a", "--name", "A b"), "--name: "),
        (("--to", "ray", "--node", "a", "--name", "rota-"), "--name: "),
        (("--to", "ray", "--node", "a", "--name", "röta"), "--name: "),
        (("--to", "ray", "--node", "a", "--engine", "http://x"), "--engine: must be vllm or simulated"),
        (("--to", "ray", "--node", "a", "--instances", 3, "--max-instances", 2), "--max-instances: "),
        (
            ("--to", "kubernetes", "--image", "x", "--gpus-per-instance", 0.5),
            "--gpus-per-instance: Kubernetes gives whole",
        ),
        (("--to", "ray", "--node", "a", "-o", "/no/such/folder/x"), "--out: "),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, words: tuple[object, ...], said: str) -> None:
    ran = rota("deploy", "-o", tmp_path / "rota.yaml", *words)
    assert ran.code == 2
    assert ran.stderr.startswith(f"error: {said}"), ran.stderr
    assert not (tmp_path / "rota.yaml").exists()
