"""A calibrated profile as a file that people read and `--profile` takes."""

import math
from pathlib import Path
from typing import Any

import msgspec

from rota.serving.predictors.step_time.profiles import Profile

_HEAD = """\
# Fitted by `rota calibrate` to the steps of one live engine. Its error on steps that the fit never saw is in
# [calibration]; `rota simulate --profile` takes this file.
"""


def profile_text(profile: Profile) -> str:
    """The profile as TOML; reading it back gives the same profile."""
    return _HEAD + "\n".join(_lines(msgspec.to_builtins(profile), ())) + "\n"


def write_profile(profile: Profile, path: Path) -> None:
    """Write the profile, whole or not at all. Raises OSError."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(profile_text(profile), encoding="utf-8")
    beside.replace(path)


def _lines(table: dict[str, Any], name: tuple[str, ...]) -> list[str]:
    """Values first, tables after, as TOML wants it; what is None is left out."""
    lines: list[str] = []
    tables: list[str] = []
    for key, value in table.items():
        if isinstance(value, dict):
            inner = (*name, key)
            tables += ["", f"[{'.'.join(inner)}]", *_lines(value, inner)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for each in value:
                inner = (*name, key)
                tables += ["", f"[[{'.'.join(inner)}]]", *_lines(each, inner)]
        elif value is not None:
            lines.append(f"{key} = {_value(value)}")
    return lines + tables


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no number that a profile may hold")
        return repr(value)
    if isinstance(value, str):
        # A JSON string is a TOML basic string too, but for a character that JSON leaves as it is.
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    return "[" + ", ".join(_value(each) for each in value) + "]"
