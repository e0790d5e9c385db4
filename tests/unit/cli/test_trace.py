"""`rota trace`: what it says of a trace, and what it writes, end to end."""

import json
from pathlib import Path

import pytest
from tests.command_line import rota, write_journal
from tests.unit.workload.samples import AGENTS, AZURE, BURSTGPT_SESSIONS, MOONCAKE, TEXTS

from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.formats import WRITTEN, read_trace, recognise


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("azure.csv", AZURE), ("mooncake.jsonl", MOONCAKE), ("agents.csv", AGENTS),
                       ("burst.csv", BURSTGPT_SESSIONS)):  # fmt: skip
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(path: str) -> list[Arrival]:
    return list(read_trace(Path(path), RandomStreams(0)))


def test_help_lists_the_verbs_behind_the_word(folder: Path) -> None:
    listed = rota("trace", "--help")
    assert listed.code == 0 and "  describe  " in listed.stdout and "usage: rota trace VERB" in listed.stdout
    assert rota("trace").code == 2
    assert "rota trace sample" in rota("trace", "sample", "--help").stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("trace descrbe azure.csv", "unknown verb 'trace descrbe'"),
        ("trace --fast", "unknown flag --fast"),
        ("trace describe", "FILE: missing"),
        ("trace describe nowhere.csv", "nowhere.csv: cannot be read"),
        ("trace describe azure.csv --cache-blocks 0", "--cache-blocks: must be at least 1"),
        ("trace describe azure.csv --report no/such/r.html", "--report: no/such/r.html"),
        ("trace sample azure.csv -o x", "--rows or --share: one of them"),
        ("trace sample azure.csv -o x --rows 1 --share 0.5", "--rows or --share: one of them"),
        ("trace sample azure.csv -o x --share 1.5", "--share: must be above 0"),
        ("trace sample azure.csv -o x --rows 0", "--rows: must be at least 1"),
        ("trace sample azure.csv -o azure.csv --share 1", "--output: azure.csv is the trace that is read"),
        ("trace sample azure.csv -o no/x --share 1", "--output: no/x"),
        ("trace scale azure.csv -o x --rate-factor 0", "--rate-factor: must be a number above 0"),
        ("trace scale azure.csv -o x --rate-factor 2 --by thin", "--rate-factor: must be at most 1"),
        ("trace scale azure.csv -o x --rate-factor 0.5 --by superpose", "--rate-factor: must be at least 1"),
        ("trace scale azure.csv -o x --prompt-factor nan", "--prompt-factor: must be a number above 0"),
        ("trace scale mooncake.jsonl -o x --prompt-factor 1.1", "prompts cannot be 1.1 times as long"),
        ("trace split azure.csv --train a --holdout b --share 1", "--share: must be between 0 and 1"),
        ("trace split agents.csv --train a --holdout b", "--share: the trace has no span to cut"),
        ("trace convert azure.csv -o x --to csv", "unknown format 'csv'"),
        ("trace convert azure.csv -o x --to sharegpt", "the sharegpt format is read only"),
        ("trace convert mooncake.jsonl -o x --to azure", "row 1: the azure format does not hold prefixes"),
        ("trace convert azure.csv -o x --to agents", "row 1: the agents format cannot hold the session None"),
        ("trace convert azure.csv -o x --zero two", "--zero: 'two' is not one of"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_left_behind(folder: Path, command: str, said: str) -> None:
    ran = rota(*command.split())
    assert ran.code == 2, ran.stdout
    assert ran.stderr.startswith(f"error: {said}"), ran.stderr
    assert {path.name for path in folder.iterdir()} <= {"azure.csv", "mooncake.jsonl", "agents.csv", "burst.csv"}


@pytest.mark.parametrize("name", TEXTS)
def test_describe_counts_rows_of_every_format(folder: Path, name: str) -> None:
    (folder / "t").write_text(TEXTS[name], newline="")
    ran = rota("trace", "describe", "t", "--json")
    assert ran.code == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["num_rows"] == len(rows("t"))
    assert said["format"] == recognise(Path("t")).name
    assert rota("trace", "describe", "t").code == 0


def test_describe_writes_a_report_that_opens_offline(folder: Path) -> None:
    assert rota("trace", "describe", "mooncake.jsonl", "--report", "r.html").code == 0
    page = Path("r.html").read_text()
    assert "Arrivals over time" in page and "Prefix sharing" in page
    assert "<script src=" not in page and '<link rel="stylesheet"' not in page


@pytest.mark.parametrize("to", WRITTEN)
@pytest.mark.parametrize("source", ["azure.csv", "mooncake.jsonl", "agents.csv", "burst.csv"])
def test_any_trace_goes_to_any_format_that_can_hold_it(folder: Path, source: str, to: str) -> None:
    ran = rota("trace", "convert", source, "-o", "x", "--to", to, "--json")
    before = rows(source)
    if ran.code == 0:
        assert json.loads(ran.stdout)["lost"] == {}
        after = rows("x")
        if to != "mooncake":  # which names blocks that nobody shares
            assert after == before
    else:
        assert ("row " in ran.stderr and "hint: " in ran.stderr) or to == "agents", ran.stderr
    assert to not in ("rota", "parquet") or ran.code == 0
    if to != "agents":
        lossy = rota("trace", "convert", source, "-o", "x", "--to", to, "--lossy", "--json")
        assert lossy.code == 0, lossy.stderr
        assert bool(json.loads(lossy.stdout)["lost"]) == (ran.code != 0)
        assert sorted((r.num_prompt_tokens, r.num_output_tokens) for r in rows("x")) == sorted(
            (r.num_prompt_tokens, r.num_output_tokens) for r in before
        )


def test_a_journal_becomes_a_trace(folder: Path) -> None:
    write_journal(folder / "run.jsonl")
    refused = rota("trace", "convert", "run.jsonl", "-o", "x")
    assert refused.code == 2 and "its output length is not known" in refused.stderr
    ran = rota("trace", "convert", "run.jsonl", "-o", "x", "--skip-unfinished", "--json")
    said = json.loads(ran.stdout)
    assert said["num_rows"] + said["not_taken"]["rows left out"] == 60
    assert len(rows("x")) == said["num_rows"]
    assert "warning: " in ran.stderr and "rows left out" in ran.stderr


def test_rows_out_of_order_are_sorted_when_asked(folder: Path) -> None:
    lines = AZURE.splitlines(keepends=True)
    (folder / "t").write_text("".join([lines[0], lines[3], lines[1], lines[2]]), newline="")
    refused = rota("trace", "convert", "t", "-o", "x", "--to", "azure")
    assert refused.code == 2 and "--sort" in refused.stderr
    assert rota("trace", "convert", "t", "-o", "x", "--to", "azure", "--sort").code == 0
    assert rows("x") == rows("azure.csv")


def test_splitting_keeps_every_row_once(folder: Path) -> None:
    for extra in ([], ["--at-random", "--seed", "3"]):
        source = "mooncake.jsonl" if not extra else "agents.csv"
        ran = rota("trace", "split", source, "--train", "a", "--holdout", "b", "--share", "0.5", *extra, "--json")
        if ran.code:
            assert "no row is left" in ran.stderr
            continue
        parts = json.loads(ran.stdout)["parts"]
        assert sum(part["num_rows"] for part in parts) == len(rows(source))
        assert rows("a")[0].at == rows("b")[0].at == 0
