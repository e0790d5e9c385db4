"""Registries import on demand, and turn every mistake of a user into a message with a hint."""

import sys
from importlib.metadata import EntryPoint
from typing import Literal

import pytest

from rota.base import registry as registry_module
from rota.base.errors import ConfigError
from rota.base.random_streams import RandomStreams, Stream
from rota.base.registry import Registry


class Plain:
    pass


class Tuned:
    def __init__(
        self,
        *,
        factor: float = 1.0,
        mode: Literal["soft", "hard"] = "soft",
        num_slots: int | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        if factor <= 0:
            raise ValueError(f"factor must be positive, not {factor}")
        if factor > 9:
            raise ConfigError(f"factor must be at most 9, not {factor}", hint="8 is good")
        self.settings = (factor, mode, num_slots, names)


class Needy:
    def __init__(self, num_choices: int, *, stream: Stream) -> None:
        self.num_choices = num_choices
        self.stream = stream


class Open:
    def __init__(self, **anything: object) -> None:
        self.anything = anything


sys.modules.setdefault("registry_plugins", sys.modules[__name__])
TABLE = {
    "plain": "registry_plugins:Plain",
    "tuned": "registry_plugins:Tuned",
    "needy": "registry_plugins:Needy",
    "open": "registry_plugins:Open",
    "no_module": "registry_plugins.missing:Plain",
    "no_class": "registry_plugins:Missing",
    "no_type": "registry_plugins:TABLE",
}
REGISTRY = Registry("scheduling rule", TABLE)


def test_names_are_listed_without_importing_anything():
    lazy = Registry("rule", {"b": "no.such.module:B", "a": "no.such.module:A"})
    assert lazy.names() == ["a", "b"]


def test_values_are_checked_and_converted():
    built = REGISTRY.create("tuned", {"factor": 2, "mode": "hard", "num_slots": 3, "names": ["x"]})
    assert built.settings == (2.0, "hard", 3, ("x",))
    assert isinstance(built.settings[0], float)
    assert isinstance(REGISTRY.create("plain"), Plain)
    assert REGISTRY.create("open", {"a": 1}).anything == {"a": 1}


def test_services_are_given_to_those_who_name_them_and_cannot_be_set_by_a_user():
    stream = RandomStreams(1).stream("needy")
    assert REGISTRY.create("needy", {"num_choices": 2}, services={"stream": stream}).stream is stream
    assert isinstance(REGISTRY.create("plain", services={"stream": stream}), Plain)
    with pytest.raises(ConfigError, match="unknown parameter 'stream'"):
        REGISTRY.create("needy", {"num_choices": 2, "stream": 3}, services={"stream": stream})


@pytest.mark.parametrize(
    ("name", "parameters", "message", "hint"),
    [
        ("tunde", {}, "stack.toml:3: unknown scheduling rule 'tunde'", "did you mean 'tuned'?"),
        ("zzzzzz", {}, "unknown scheduling rule 'zzzzzz'", "known: needy, no_class, no_module"),
        ("tuned", {"facter": 1.0}, "unknown parameter 'facter'", "did you mean 'factor'?"),
        ("plain", {"x": 1}, "unknown parameter 'x'", "none to choose from"),
        ("tuned", {"factor": "big"}, "parameter 'factor': expected `float`, got `str`, in 'big'", None),
        ("tuned", {"factor": True}, "parameter 'factor': expected `float`, got `bool`", None),
        ("tuned", {"num_slots": 1.5}, "parameter 'num_slots': expected `int | null`, got `float`", None),
        ("tuned", {"mode": "sotf"}, "parameter 'mode': invalid enum value 'sotf'", None),
        ("tuned", {"names": "x"}, "parameter 'names': expected `array`, got `str`", None),
        ("tuned", {"factor": -1.0}, "factor must be positive, not -1.0", None),
        ("tuned", {"factor": 10.0}, "scheduling rule 'tuned': factor must be at most 9, not 10.0", "8 is good"),
        ("needy", {"num_choices": 2}, "parameter 'stream' is missing", None),
        ("needy", {"stream": 1, "num_choices": 2}, "parameter 'stream': expected `Stream`", None),
        ("no_module", {}, "cannot be imported from registry_plugins.missing:Plain", None),
        ("no_class", {}, "cannot be imported from registry_plugins:Missing", None),
        ("no_type", {}, "registry_plugins:TABLE is not a class", None),
    ],
)
def test_mistakes(name, parameters, message, hint):
    with pytest.raises(ConfigError) as caught:
        REGISTRY.create(name, parameters, where="stack.toml:3")
    assert str(caught.value).startswith("stack.toml:3: ")
    assert message in str(caught.value)
    if hint is not None:
        assert hint in caught.value.hint


def test_other_packages_add_names_through_entry_points(monkeypatch):
    points = [EntryPoint("foreign", "registry_plugins:Tuned", "rota.rules"), EntryPoint("plain", "x:Y", "rota.rules")]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points if group == "rota.rules" else [])
    registry = Registry("rule", TABLE, "rota.rules")
    assert "foreign" in registry.names()
    assert isinstance(registry.create("foreign"), Tuned)
    with pytest.raises(ConfigError, match=r"built in, and entry point 'x:Y' claims"):
        registry.load("plain")
