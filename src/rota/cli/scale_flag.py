"""`--scale MIN:MAX`: how many engines `rota serve` may start and stop."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rota.base.errors import ConfigError

if TYPE_CHECKING:
    from rota.serving.stack import StackConfig

Scale = Annotated[
    str | None,
    typer.Option(metavar="MIN:MAX", help="Start and stop engines within these numbers, by the stack's policy."),
]


def scaled(path: Path | None, words: str | None, num_instances: int, *, can_start: bool) -> tuple["StackConfig", int]:
    """The stack of a file with a fleet within these bounds, and how many instances there are at first. A stack that
    names no scaling policy gets the one that needs to be told least. Raises `ConfigError` where engines cannot be
    started."""
    from rota.serving.stack import load_stack

    stack = load_stack(path)
    if words is not None:
        stack = _bounded(stack, words)
    if stack.scaling == "none":
        return stack, num_instances
    if not can_start:
        raise ConfigError(
            f"--scale: scaling policy {stack.scaling!r} needs engines that can be started",
            hint="scale --engine vllm or simulated; servers that run already are not Rota's to start or stop",
        )
    return stack, min(max(num_instances, stack.fleet.min_instances), stack.fleet.max_instances)


def _bounded(stack: "StackConfig", words: str) -> "StackConfig":
    import msgspec

    least, colon, most = words.partition(":")
    if not (colon and least.isdecimal() and most.isdecimal()):
        raise ConfigError(f"--scale: {words!r} is not of the form MIN:MAX", hint="such as 1:4")
    try:
        fleet = msgspec.structs.replace(stack.fleet, min_instances=int(least), max_instances=int(most))
    except ValueError as error:
        raise ConfigError(f"--scale: {error}") from None
    scaling = "slo_attainment" if stack.scaling == "none" else stack.scaling
    return msgspec.structs.replace(stack, fleet=fleet, scaling=scaling)
