"""A description as TOML text, which `rota.base.config` reads back equal."""

from typing import Any

import msgspec

_STRING = msgspec.json.Encoder().encode


def toml_of(value: msgspec.Struct) -> str:
    """The struct as a TOML document: plain values first, then tables. Fields that are None or empty are left out."""
    return "\n".join(_table(msgspec.to_builtins(value), "")).strip() + "\n"


def _table(values: dict[str, Any], path: str) -> list[str]:
    lines: list[str] = []
    tables: list[str] = []
    for key, value in values.items():
        if value is None or value in ((), []):
            continue
        inner = f"{path}.{key}" if path else key
        if isinstance(value, dict) and key != "quantiles":
            tables += ["", f"[{inner}]", *_table(value, inner)]
        elif isinstance(value, (list, tuple)) and isinstance(value[0], dict):
            for each in value:
                tables += ["", f"[[{inner}]]", *_table(each, inner)]
        else:
            lines.append(f"{key} = {_plain(value)}")
    return lines + tables


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)} = {_plain(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return _text(value) if isinstance(value, str) else repr(value)


def _text(value: str) -> str:
    # A basic string of TOML has the escapes of JSON, and one more that must be escaped.
    return _STRING(value).decode().replace("\x7f", "\\u007f")
