"""Flags that several verbs share, and checks of values whose errors begin with the flag."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from rota.base.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of every random draw.")]

Jobs = Annotated[
    int | None, typer.Option("--jobs", metavar="N", min=1, help="Runs side by side; as many as there are cores.")
]


def positive(flag: str, value: float) -> float:
    """The value, if it is a finite number above 0."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{flag}: must be a number above 0, not {value:g}")
    return value


def at_least_zero(flag: str, value: float) -> float:
    """The value, if it is a finite number that is not negative."""
    if not 0 <= value < math.inf:
        raise ConfigError(f"{flag}: must be a number that is not negative, not {value:g}")
    return value


def at_least(flag: str, value: int, least: int) -> int:
    """The value, if it is not below `least`."""
    if value < least:
        raise ConfigError(f"{flag}: must be at least {least}, not {value}")
    return value


def between(flag: str, value: float, least: float, most: float) -> float:
    """The value, if it lies between the two."""
    if not least <= value <= most:
        raise ConfigError(f"{flag}: must be from {least:g} to {most:g}, not {value:g}")
    return value


@contextmanager
def writing(flag: str, path: Path) -> Iterator[None]:
    """Turn a failure to write the file that a flag names into an error that names both."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{flag}: {path} cannot be written: {error.strerror or error}") from None


def refuse_unwritable(flag: str, path: Path | None) -> None:
    """Before the work, not after it: an error that names the flag, where its file cannot be written."""
    if path is not None:
        with writing(flag, path):
            path.open("ab").close()
