"""Names to classes, looked up when asked for: a table of `"module:Class"` plus whatever other packages entered.

A table is data. Nothing is imported before it is loaded, so that listing names is free and optional dependencies stay
optional. Other packages add names through the entry-point group; a class that has no name yet goes by `"module:Class"`.
"""

import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import msgspec

from rota.base.errors import ConfigError
from rota.base.nearest import did_you_mean


class Registry:
    """All plug-ins of one kind."""

    def __init__(self, kind: str, table: Mapping[str, str], entry_point_group: str | None = None) -> None:
        """`kind` is what messages call the thing, e.g. `"order policy"`."""
        self.kind = kind
        self.table = dict(table)
        self._group = entry_point_group
        self._outside: dict[str, EntryPoint] | None = None

    def names(self) -> list[str]:
        """Every name that `load` knows, sorted."""
        return sorted(self.table.keys() | self._entry_points().keys())

    def load(self, name: str, *, where: str = "") -> type[Any]:
        """Import and return the class behind a name, or at `module:Class`. A `ConfigError` begins with `where`, the
        spot that named it."""
        prefix = f"{where}: " if where else ""
        outside = self._entry_points().get(name)
        spec = self.table.get(name)
        if spec is not None and outside is not None:
            raise ConfigError(
                f"{prefix}{self.kind} {name!r} is built in, and entry point {outside.value!r} claims the same name",
                hint="rename or uninstall the package that brings the entry point",
            )
        target = spec or (outside.value if outside else name if ":" in name else None)
        if target is None:
            raise ConfigError(f"{prefix}unknown {self.kind} {name!r}", hint=did_you_mean(name, self.names()))
        module_name, _, class_name = target.partition(":")
        try:
            loaded = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{prefix}{self.kind} {name!r} cannot be imported from {target}: {error}",
                hint="modules are looked for where Python looks; PYTHONPATH adds a folder",
            ) from error
        if not isinstance(loaded, type):
            raise ConfigError(f"{prefix}{self.kind} {name!r}: {target} is not a class")
        return loaded

    def create(
        self,
        name: str,
        parameters: Mapping[str, object] | None = None,
        *,
        services: Mapping[str, object] | None = None,
        where: str = "",
    ) -> Any:
        """Build the object behind a name from keyword parameters that a user wrote.

        Every parameter is checked against the constructor's signature and annotations. `services` are objects that only
        the assembler can give (a random stream, a predictor): a constructor gets those that it names, and no user can
        set them.
        """
        factory = self.load(name, where=where)
        spot = f"{where}: {self.kind} {name!r}" if where else f"{self.kind} {name!r}"
        arguments = checked_arguments(factory, parameters or {}, services or {}, spot)
        try:
            return factory(**arguments)
        except ConfigError as error:
            raise ConfigError(f"{spot}: {error.message}", hint=error.hint) from error
        except ValueError as error:
            raise ConfigError(f"{spot}: {error}") from error

    def _entry_points(self) -> Mapping[str, EntryPoint]:
        if self._outside is None:
            found = entry_points(group=self._group) if self._group else ()
            self._outside = {point.name: point for point in found}
        return self._outside


def checked_arguments(
    factory: type[Any], parameters: Mapping[str, object], services: Mapping[str, object], spot: str
) -> dict[str, object]:
    """Keyword arguments for `factory`: the user's parameters, converted to their annotated types, and the services it
    names. Raises `ConfigError` for a parameter that is unknown, missing or of the wrong type."""
    signature = inspect.signature(factory, eval_str=True)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    named = {
        parameter.name: parameter
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    settable = named.keys() - services.keys()
    arguments: dict[str, object] = {key: value for key, value in services.items() if key in named}
    for key, value in parameters.items():
        if key in settable:
            arguments[key] = _converted(value, named[key].annotation, f"{spot}: parameter {key!r}")
        elif takes_any and key not in named:
            arguments[key] = value
        else:
            raise ConfigError(f"{spot}: unknown parameter {key!r}", hint=did_you_mean(key, settable))
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise ConfigError(f"{spot}: parameter {key!r} is missing")
    return arguments


def _converted(value: object, annotation: Any, spot: str) -> object:
    if annotation is inspect.Parameter.empty:
        return value
    try:
        return msgspec.convert(value, annotation)
    except msgspec.ValidationError as error:
        message = str(error)
        raise ConfigError(f"{spot}: {message[:1].lower()}{message[1:]}, in {value!r}") from None
    except TypeError:
        raise ConfigError(f"{spot}: cannot be set from a configuration") from None
