"""Thousands of broken files, the same every time, do no reader harm; and the search finds what is planted.

The search that is guided by coverage takes minutes: `python tools/fuzz_readers.py`, see docs/traces.md.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.formats.azure import AzureFormat
from rota.serving.workload.formats.burstgpt import BurstgptFormat
from rota.serving.workload.formats.columns import CsvRow
from rota.serving.workload.formats.mooncake import _Row as MooncakeRow

TOOL = Path(__file__).parents[3] / "tools" / "fuzz_readers.py"
NUM_RUNS = 10_000


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_readers", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = [*sys.path]
    spec.loader.exec_module(module)
    sys.path[:] = path
    module.READERS = module.import_readers()
    return module


@pytest.fixture(scope="module")
def seeds(fuzz: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    found: list[bytes] = fuzz.inputs(tmp_path_factory.mktemp("seeds"))
    return found


def test_no_reader_comes_to_harm(fuzz: ModuleType, seeds: list[bytes]) -> None:
    assert sum(1 for _ in fuzz.fuzz_blindly(NUM_RUNS, 11, seeds)) == NUM_RUNS


def test_every_seed_is_read_and_every_reader_has_one(fuzz: ModuleType, seeds: list[bytes]) -> None:
    names = fuzz.READERS.formats.FORMATS.names()
    assert {seed[0] % len(names) for seed in seeds} == set(range(len(names)))
    for seed in seeds:
        name, way = names[seed[0] % len(names)], seed[0] // len(names)
        if name != "journal" or way:  # the journal's seed is cut short, which is to be let pass
            assert fuzz.read(name, seed[1:], way), name


def drop_a_row(self: AzureFormat, path: Path, streams: object = None) -> Iterator[Arrival]:
    raise KeyError("a row")
    yield


@pytest.mark.parametrize(
    ("place", "name", "planted"),
    [
        (AzureFormat, "read", drop_a_row),
        (MooncakeRow, "hashes", lambda self, num_prompt_tokens: (-1,)),
        (CsvRow, "whole", lambda self, index, least, most, what="": int(self.fields[index])),
        (BurstgptFormat, "_arrival", lambda self, row, at: Arrival(at, 0, 1)),
    ],
    ids=["another exception", "a broken rule", "no check of a number", "a row of no tokens"],
)
def test_what_is_planted_is_found(
    fuzz: ModuleType, seeds: list[bytes], monkeypatch: pytest.MonkeyPatch, place: type, name: str, planted: object
) -> None:
    monkeypatch.setattr(place, name, planted)
    with pytest.raises((AssertionError, KeyError, ValueError)) as caught:
        for _ in fuzz.fuzz_blindly(4_000, 1, seeds):
            pass
    assert "input b" in "".join(caught.value.__notes__)
