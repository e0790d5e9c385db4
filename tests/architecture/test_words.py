"""The base, the drivers and the exporters know no tokens: a second library must be able to stand on them.

The words of serving are looked for in code, comments, docstrings, and inside names (`num_tokens`, `KVCache`).
"""

import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "rota"
ROOMS = ("base", "runtime", "export")
FORBIDDEN = {
    "token",
    "tokens",
    "prefill",
    "prefills",
    "decode",
    "decodes",
    "decoder",
    "decoded",
    "decoding",
    "kv",
    "gpu",
    "gpus",
}
# Names of msgspec's, which have nothing to do with the step of an engine.
EXEMPT = re.compile(r"msgspec\.json\.Decoder\([^()]*\)\.decode\b|tomllib\.TOMLDecodeError|\bUnicodeDecodeError\b")
PART_OF_A_NAME = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def words(text):
    """Lower-case words of a text, with names split at underscores and humps."""
    return [part.lower() for part in PART_OF_A_NAME.findall(text)]


def found_in(text):
    return [
        f"{number}: {word}"
        for number, line in enumerate(text.splitlines(), start=1)
        for word in words(EXEMPT.sub("", line))
        if word in FORBIDDEN
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_the_room_does_not_say_the_words_of_serving(room):
    files = sorted((SOURCE / room).rglob("*.py"))
    assert files
    said = [f"{path.relative_to(SOURCE)}:{found}" for path in files for found in found_in(path.read_text("utf-8"))]
    assert not said, said


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("num_tokens = 3", "tokens"),
        ("class KVCache:", "kv"),
        ("# the GPU", "gpu"),
        ("maxPrefills", "prefills"),
        ("x.decode()", "decode"),
        ("isDecoding", "decoding"),
        ("class TokenBudget", "token"),
        ("kv_blocks", "kv"),
    ],
)
def test_the_search_finds_words_inside_names(text, word):
    assert found_in(f"fine\n{text}") == [f"2: {word}"]


@pytest.mark.parametrize(
    "text", ["parse = msgspec.json.Decoder(Header).decode", "tokenless", "akv", "except UnicodeDecodeError:"]
)
def test_the_search_finds_nothing_else(text):
    assert found_in(text) == []
