"""The published traces, read whole: what is known of them holds, and nothing is lost on the way out and in."""

import os
from pathlib import Path

import pytest

from rota.base.instant import Instant
from rota.base.random_streams import RandomStreams
from rota.serving.instance.sequence import Sequence
from rota.serving.workload.arrivals import Arrival, to_request
from rota.serving.workload.formats import read_trace
from rota.serving.workload.formats.azure import AzureFormat
from rota.serving.workload.formats.mooncake import MooncakeFormat

DATA = Path(os.environ.get("ROTA_DATA", Path(__file__).parents[4] / "shared")) / "traces"


def rows_of(name: str) -> list[Arrival]:
    path = DATA / name
    assert path.exists(), f"{path} is absent; set ROTA_DATA to the folder that holds traces/"
    return list(read_trace(path, RandomStreams(0)))


@pytest.fixture(scope="module")
def azure() -> list[Arrival]:
    return rows_of("azure2023/AzureLLMInferenceTrace_conv.csv")


@pytest.fixture(scope="module")
def mooncake() -> list[Arrival]:
    return rows_of("mooncake/conversation_trace.jsonl")


def test_azure_facts(azure: list[Arrival]) -> None:
    assert len(azure) == 19_366
    assert azure[1].at == 4_314_579_000  # exact: 50.9951690 - 46.6805900 s
    assert azure[-1].at == 3_501_721_937_000
    assert round(sum(a.num_prompt_tokens for a in azure) / len(azure)) == 1155
    assert round(sum(a.num_output_tokens for a in azure) / len(azure)) == 211
    first = azure[:10_000]
    assert sum(a.num_prompt_tokens for a in first) == 12_424_297
    assert sum(a.num_output_tokens for a in first) == 2_184_052
    assert min(a.num_output_tokens for a in azure) == 7, "no row has zero, so zero is an error"


def test_mooncake_facts(mooncake: list[Arrival]) -> None:
    assert len(mooncake) == 12_031
    assert mooncake[-1].at == 3_536_999_000_000
    assert round(sum(a.num_prompt_tokens for a in mooncake) / len(mooncake)) == 12_035
    assert sum(a.num_output_tokens for a in mooncake) == 4_122_048
    assert min(a.num_output_tokens for a in mooncake) == 1


def test_mooncake_prefixes_as_blocks_of_16(mooncake: list[Arrival]) -> None:
    """An infinite cache hits 37.4 % of tokens by the trace's own blocks; by full blocks of 16 it can hit no more."""
    seen: set[int] = set()
    num_hit, num_tokens = 0, 0
    for arrival in mooncake:
        request, _ = to_request(arrival, "r", Instant(0), max_model_len=200_000)
        sequence = Sequence(request, 16)
        assert sequence.num_hashed == arrival.num_prompt_tokens // 16
        hashes = arrival.prefix_hashes
        hit = next((i for i, block in enumerate(hashes) if block not in seen), len(hashes))
        num_hit += min(hit * 32, sequence.num_hashed) * 16
        num_tokens += arrival.num_prompt_tokens
        seen.update(hashes[hit:])
    assert 0.373 < num_hit / num_tokens < 0.3737


def test_round_trip(azure: list[Arrival], mooncake: list[Arrival], tmp_path: Path) -> None:
    AzureFormat().write(tmp_path / "a", azure)
    assert list(read_trace(tmp_path / "a", RandomStreams(0))) == azure
    MooncakeFormat().write(tmp_path / "m", mooncake)
    assert list(read_trace(tmp_path / "m", RandomStreams(0))) == mooncake
