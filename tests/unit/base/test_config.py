"""Every way in which a configuration can be wrong names file, line and key."""

from enum import StrEnum
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.base.config import config_hash, load_toml, parse_toml
from rota.base.errors import ConfigError


class Colour(StrEnum):
    RED = "red"
    GREEN = "green"


class Part(msgspec.Struct, forbid_unknown_fields=True):
    length: int = 1
    colour: Colour = Colour.RED

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ValueError("length must not be negative")


class Plan(msgspec.Struct, forbid_unknown_fields=True):
    order: Literal["first_come", "shortest"] = "first_come"
    num_ovens: int = 2
    rate: float = 1.0
    part: Part = msgspec.field(default_factory=Part)
    spare: Part | None = None
    parts: list[Part] = []
    named: dict[str, Part] = {}


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    seed: int


BAD = [
    ("order = 'shortst'", "plan.toml:1: order: 'shortst' is not an option", "did you mean 'shortest'?"),
    ("\nnum_ovens = 'two'", "plan.toml:2: num_ovens: expected `int`, got `str`", None),
    ("num_ovens = true", "plan.toml:1: num_ovens: expected `int`, got `bool`", None),
    ("num_ovens = 1.5", "plan.toml:1: num_ovens: expected `int`, got `float`", None),
    ("# a comment\nnum_oven = 3", "plan.toml:2: num_oven: unknown key", "did you mean 'num_ovens'?"),
    ("rate = nan", "plan.toml:1: rate: nan is not a finite number", None),
    ("rate = -inf", "plan.toml:1: rate: -inf is not a finite number", None),
    ("part = 3", "plan.toml:1: part: expected `object`, got `int`", None),
    ("[part]\nlenght = 3", "plan.toml:2: part.lenght: unknown key", "did you mean 'length'?"),
    ("[part]\nlength = -3", "plan.toml:1: part: length must not be negative", None),
    ("part = { colour = 'rde' }", "plan.toml:1: part.colour: 'rde' is not an option", "did you mean 'red'?"),
    ("[spare]\ncolour = 'pink'", "plan.toml:2: spare.colour: 'pink' is not an option", "known: green, red"),
    ("[[parts]]\n[[parts]]\nlong = 1", "plan.toml:3: parts[1].long: unknown key", "did you mean 'length'?"),
    ("[[parts]]\nlength = 1\n[[parts]]\nlength = 'x'", "plan.toml:4: parts[1].length: expected `int`", None),
    ("[named.a]\n[named.'b c']\nsize = 1", "plan.toml:3: named.b c.size: unknown key", "known: colour, length"),
    ("named.x.length = 'x'", "plan.toml:1: named.x.length: expected `int`, got `str`", None),
    ("[whole]\nx = 1", "plan.toml:1: whole: unknown key", "known: "),
    ("order = ", "plan.toml:1: invalid value", "valid TOML"),
    ("order = 'a'\nnum_ovens 3\n", "plan.toml:2:11: expected '='", "valid TOML"),
    ("num_ovens = 1\nnum_ovens = 2\n", "plan.toml:2", "valid TOML"),
    ("a = " + "[" * 3000 + "]" * 3000, "plan.toml: nested too deeply", None),
]


@pytest.mark.parametrize(("text", "message", "hint"), BAD, ids=[text[:30] for text, _, _ in BAD])
def test_a_bad_file_names_the_spot(text, message, hint):
    with pytest.raises(ConfigError) as caught:
        parse_toml(text, Plan, "plan.toml")
    assert message.lower() in str(caught.value).lower()
    assert (caught.value.hint is None) if hint is None else (hint in caught.value.hint)


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"plan.toml: object missing required field `seed`"):
        parse_toml("", Strict, "plan.toml")


def test_files_that_cannot_be_read(tmp_path):
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, complaint in ((tmp_path / "none.toml", "no such file"), (tmp_path, "directory"), (binary, "not UTF-8")):
        with pytest.raises(ConfigError, match=complaint) as caught:
            load_toml(path, Plan)
        assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_toml("nul\0byte", Plan)


def test_a_good_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_bytes(b"\xef\xbb\xbforder = 'shortest'\nrate = 2\n[[parts]]\ncolour = 'green'\n")
    plan = load_toml(path, Plan)
    assert (plan.order, plan.rate, plan.parts[0].colour) == ("shortest", 2.0, Colour.GREEN)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), values, max_size=5))
def test_the_hash_does_not_see_the_order_of_keys(config):
    backwards = dict(reversed(config.items()))
    assert config_hash(config) == config_hash(backwards)
    assert config_hash(config) != config_hash({**config, "one more": 1})
    assert len(config_hash(config)) == 16


@given(st.text(max_size=60))
def test_no_text_gives_anything_but_a_plan_or_a_config_error(text):
    try:
        plan = parse_toml(text, Plan, "plan.toml")
    except ConfigError as error:
        assert str(error).startswith("plan.toml")
    else:
        assert isinstance(plan, Plan)
