"""`rota simulate` says how far it has come, of how many requests."""

from pathlib import Path

import pytest
from tests.command_line import rota

from rota.cli import simulate

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02d}.0000000,10,3\n" for second in range(7)
)
MOONCAKE = '{"timestamp": 0, "input_length": 5, "output_length": 2, "hash_ids": [0]}\n' * 4
SYNTHETIC = """
num_requests = 9
[arrivals]
rate = 6.0
[prompt]
quantiles = {"0" = 16, "1" = 64}
[output]
quantiles = {"0" = 1, "1" = 8}
"""
ONE_JSON = '[{"id": "a", "conversations": []}]'


@pytest.mark.parametrize(
    ("text", "asked", "total"),
    [
        (AZURE, None, 7),
        (AZURE.rstrip("\n"), None, 7),
        (AZURE, 3, 3),
        (AZURE, 300, 7),
        (MOONCAKE, None, 4),
        (SYNTHETIC, None, 9),
        (SYNTHETIC, 2, 2),
        (ONE_JSON, None, None),
        (ONE_JSON, 5, 5),
    ],
)
def test_the_total_is_known_before_the_run(text: str, asked: int | None, total: int | None, tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(text)
    assert simulate._num_requests(tmp_path / "trace", asked) == total


def test_a_run_without_a_number_counts_in_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trace.csv").write_text(AZURE)
    totals: list[int | None] = []

    class Watched(simulate.Progress):
        def __init__(self, what: str, *, total: int | None, unit: str) -> None:
            totals.append(total)
            super().__init__(what, total=total, unit=unit)

    monkeypatch.setattr(simulate, "Progress", Watched)
    assert rota("simulate", "--trace", str(tmp_path / "trace.csv"), "--json").code == 0
    assert totals == [7]


def test_rows_that_were_not_taken_as_they_are_are_counted(tmp_path: Path) -> None:
    calls = (
        "kind,session,call,t_rel_s,gap_since_prev_call_s,input_tokens,output_tokens,common_prefix_tokens_with_prev\n"
    )
    (tmp_path / "agents.csv").write_text(calls + "a,s,0,0.0,0,100,0,0\na,s,1,2.0,2.0,120,5,100\n")
    run = rota("simulate", "--trace", str(tmp_path / "agents.csv"), "--json")
    assert run.code == 0
    assert "1 rows with a length of 0 read as 1" in " ".join(run.stderr.split())
