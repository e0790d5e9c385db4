"""TOML in, a checked struct out. Every way in which a file can be wrong is a `ConfigError` that names the spot.

A field that the type does not know is an error, never ignored: a misspelt setting must not run with the default.
"""

import hashlib
import inspect
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from rota.base.errors import ConfigError
from rota.base.nearest import did_you_mean

T = TypeVar("T")
Step = str | int
"""One step down into a document: a key or an index."""

_HEADER = re.compile(r"^\s*(\[\[?)\s*(.+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")
_PATH_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.+)`")
_BAD_OPTION = re.compile(r"Invalid enum value '?(.+?)'?$")


def load_toml(path: str | Path, type: type[T]) -> T:
    """Read a TOML file as `type`, a msgspec struct with `forbid_unknown_fields=True`."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory, not a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return parse_toml(text, type, str(path))


def parse_toml(text: str, type: type[T], source: str) -> T:
    """Read TOML text as `type`; `source` is what error messages call the text."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_spot_of_syntax_error(str(error), text, source), hint="the file must be valid TOML") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
    _refuse_non_finite(document, (), text, source)
    try:
        return msgspec.convert(document, type)
    except msgspec.ValidationError as error:
        raise _explain(str(error), document, type, text, source) from None


def config_hash(config: object) -> str:
    """16 hex digits that are equal for equal configurations, whatever the order of their keys."""
    return hashlib.sha256(msgspec.json.encode(config, order="deterministic")).hexdigest()[:16]


# --- from an error to a spot ------------------------------------------------------------------------------------------


def _spot_of_syntax_error(message: str, text: str, source: str) -> str:
    found = re.search(r"\(at line (\d+), column (\d+)\)", message)
    if found is None:  # at the end of the document
        return f"{source}:{len(text.splitlines())}: {message}"
    return f"{source}:{found[1]}:{found[2]}: {message[: found.start()].strip()}"


def _refuse_non_finite(value: object, path: tuple[Step, ...], text: str, source: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{_spot(path, text, source)}{_dotted(path)}: {value} is not a finite number")
    if isinstance(value, (dict, list)):
        pairs: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
        for step, inner in pairs:
            _refuse_non_finite(inner, (*path, step), text, source)


def _explain(message: str, document: Mapping[str, Any], type: Any, text: str, source: str) -> ConfigError:
    problem, _, raw_path = message.partition(" - at `$")
    path = _resolve(raw_path.rstrip("`"), document, type)
    inner_type = _type_at(type, path)
    unknown = _UNKNOWN_FIELD.fullmatch(problem)
    if unknown:
        field = unknown[1]
        path = (*path, field)
        spot = _spot(path, text, source)
        return ConfigError(f"{spot}{_dotted(path)}: unknown key", hint=did_you_mean(field, _field_names(inner_type)))
    hint = None
    bad_option = _BAD_OPTION.fullmatch(problem)
    options = _options(inner_type)
    if bad_option and options:
        problem = f"{bad_option[1]!r} is not an option"
        hint = did_you_mean(bad_option[1], options)
    where = f"{_dotted(path)}: " if path else ""
    return ConfigError(f"{_spot(path, text, source)}{where}{problem[:1].lower()}{problem[1:]}", hint=hint)


def _resolve(raw_path: str, document: Any, type: Any) -> tuple[Step, ...]:
    """The steps of a msgspec path. It writes `[...]` for a mapping's key; the key is the first whose value is bad."""
    path: list[Step] = []
    value = document
    for key, index in _PATH_STEP.findall(raw_path):
        step: Step = key
        if index == "...":
            value_type = _type_at(type, (*path, ""))
            step = next((str(name) for name, inner in value.items() if not _fits(inner, value_type)), "")
        elif index:
            step = int(index)
        path.append(step)
        value = value[step]
    return tuple(path)


def _fits(value: object, type: Any) -> bool:
    try:
        msgspec.convert(value, type)
    except msgspec.ValidationError:
        return False
    return True


def _type_at(type: Any, path: tuple[Step, ...]) -> Any:
    """The declared type of the value at `path`, or None where that cannot be told."""
    for step in path:
        candidates = [_child_type(member, step) for member in _members(type)]
        type = next((candidate for candidate in candidates if candidate is not None), None)
    return type


def _members(type: Any) -> tuple[Any, ...]:
    return typing.get_args(type) if isinstance(type, types.UnionType) or _is_typing_union(type) else (type,)


def _is_typing_union(type: Any) -> bool:
    return typing.get_origin(type) is typing.Union


def _child_type(type: Any, step: Step) -> Any:
    if isinstance(step, str) and _is_struct(type):
        return next((field.type for field in msgspec.structs.fields(type) if field.encode_name == step), None)
    arguments = typing.get_args(type)
    origin = typing.get_origin(type)
    if origin in (list, tuple) and arguments and isinstance(step, int):
        return arguments[0]
    if origin in (dict, Mapping) and len(arguments) == 2 and isinstance(step, str):
        return arguments[1]
    return None


def _is_struct(type: Any) -> bool:
    return isinstance(type, msgspec.StructMeta)


def _field_names(type: Any) -> list[str]:
    structs = [member for member in _members(type) if _is_struct(member)]
    return [field.encode_name for struct in structs for field in msgspec.structs.fields(struct)]


def _options(type: Any) -> list[str]:
    names: list[str] = []
    for member in _members(type):
        if typing.get_origin(member) is typing.Literal:
            names += map(str, typing.get_args(member))
        elif inspect.isclass(member) and issubclass(member, Enum):
            names += [str(option.value) for option in member]
    return names


def _dotted(path: tuple[Step, ...]) -> str:
    """The path as a reader would write it: `a.b[0].c`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _spot(path: tuple[Step, ...], text: str, source: str) -> str:
    line = _find_line(path, text)
    return f"{source}:{line}: " if line else f"{source}: "


def _find_line(path: tuple[Step, ...], text: str) -> int | None:
    """The line of the deepest part of `path` that has a line of its own.

    A scan by line, not a parser: keys inside a multi-line value may mislead it by some lines.
    """
    best_depth, best_line = 0, None
    table: tuple[Step, ...] = ()
    num_seen: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        header = _HEADER.match(line)
        if header and "=" not in header[2]:
            names = _parts(header[2])
            if header[1] == "[[":
                num_seen[names] = num_seen.get(names, -1) + 1
            table = _with_indices(names, num_seen)
            spot = table
        else:
            key = _KEY.match(line)
            if not key:
                continue
            spot = (*table, *_parts(key[1]))
        if len(spot) > best_depth and path[: len(spot)] == spot:
            best_depth, best_line = len(spot), number
    return best_line


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))


def _with_indices(names: tuple[str, ...], num_seen: Mapping[tuple[str, ...], int]) -> tuple[Step, ...]:
    """A table's name with the index of the current element after each array of tables."""
    path: list[Step] = []
    for length, name in enumerate(names, start=1):
        path.append(name)
        if names[:length] in num_seen:
            path.append(num_seen[names[:length]])
    return tuple(path)
