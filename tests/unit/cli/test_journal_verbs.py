"""What the verbs that read journals say: the same as the world that wrote them."""

import csv
import json
from pathlib import Path

import pytest
from tests.command_line import rota, write_journal

from rota.base.errors import DataError
from rota.base.journal import read_journal
from rota.base.timeline import AsyncSpan, Sample, Span
from rota.serving.assemble import ROW_TYPES
from rota.serving.explain import explain
from rota.serving.model.commands import RunStep
from rota.serving.model.events import SequenceArrived, StepFinished
from rota.serving.sim.cluster import SimulatedCluster
from rota.serving.timelines import STEPS, timeline_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SimulatedCluster]:
    path = tmp_path_factory.mktemp("journal") / "run.jsonl"
    return path, write_journal(path)


def rows_of(path: Path):  # type: ignore[no-untyped-def]
    return list(read_journal(path, ROW_TYPES))


def test_the_run_is_worth_reading(run: tuple[Path, SimulatedCluster]) -> None:
    _, world = run
    assert sum(machine.statistics().num_preemptions for machine in world.machines()) >= 5
    assert {record.status for record in world.records} == {"finished", "aborted", "failed"}
    assert len(world.machines()) == 3, "an instance crashed and came back"


# --- replay -----------------------------------------------------------------------------------------------------------


def test_a_journal_replays_identically_through_a_restart(run: tuple[Path, SimulatedCluster]) -> None:
    path, _ = run
    num_rows = len(rows_of(path))
    assert rota("replay", path) == (0, f"{num_rows:,} rows, identical\n", "")
    told = json.loads(rota("replay", path, "--json").stdout)
    assert (told["num_rows"], told["is_identical"], told["is_complete"]) == (num_rows, True, True)


def test_a_difference_is_shown_and_is_exit_code_1(run: tuple[Path, SimulatedCluster], tmp_path: Path) -> None:
    path, _ = run
    lines = path.read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if '"Dispatch"' in line and '"instance_id":"i0"' in line)
    lines[at] = lines[at].replace('"instance_id":"i0"', '"instance_id":"i1"')
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join(lines) + "\n")
    ran = rota("replay", changed)
    assert ran.code == 1
    assert ran.stdout.startswith(f"{at - 1:,} rows identical, then a difference:\nrow {at - 1}: cluster at ")
    assert "expected: " in ran.stdout and "got: " in ran.stdout
    told = json.loads(rota("replay", changed, "--json").stdout)
    assert told["difference"]["row"] == at - 1
    assert told["is_identical"] is False


def test_a_run_that_was_cut_off_says_so(run: tuple[Path, SimulatedCluster], tmp_path: Path) -> None:
    path, _ = run
    cut = tmp_path / "cut.jsonl"
    cut.write_text("\n".join(path.read_text().splitlines()[:100]) + "\n")
    ran = rota("replay", cut)
    assert (ran.code, ran.stdout) == (0, "99 rows, identical\n")
    assert ran.stderr.startswith("warning: ") and "no end mark" in ran.stderr


# --- explain ----------------------------------------------------------------------------------------------------------


def test_every_story_agrees_with_the_world(run: tuple[Path, SimulatedCluster]) -> None:
    path, world = run
    rows = rows_of(path)
    for record in world.records:
        story = explain(rows, record.id)
        assert story.end == record.status
        assert story.moments[0].what == "arrived"
        assert [moment.at for moment in story.moments] == sorted(moment.at for moment in story.moments)
        granted = [moment for moment in story.moments if moment.what == "granted"]
        if record.first_token_at is not None:
            assert story.ttft_ms is not None
            assert record.first_token_at - record.arrived_at == round(story.ttft_ms * 1e6)
            assert granted
        if record.status == "finished":
            assert story.num_output_tokens == record.num_output_tokens
            assert 1 <= len(granted) <= story.num_preemptions + story.num_attempts
            assert len(story.waits) == story.num_preemptions + story.num_attempts


def test_all_preemptions_are_told_and_the_displaced_know_by_whom(run: tuple[Path, SimulatedCluster]) -> None:
    path, world = run
    rows = rows_of(path)
    stories = [explain(rows, record.id) for record in world.records]
    preempted = [moment for story in stories for moment in story.moments if moment.what == "preempted"]
    assert len(preempted) == sum(machine.statistics().num_preemptions for machine in world.machines())
    displaced = [moment.text for moment in preempted if "displaced by" in moment.text]
    assert displaced and all("(class -1)" in text for text in displaced)


def test_waits_count_every_step_that_began_without_the_request(run: tuple[Path, SimulatedCluster]) -> None:
    path, world = run
    rows = rows_of(path)
    for record in world.records[::7]:
        for wait in explain(rows, record.id).waits:
            steps = [
                command
                for row in rows
                if row.machine.removeprefix("instance/").partition("#")[0] == wait.instance_id
                and wait.began_at <= row.at < wait.ended_at
                and isinstance(row.event, SequenceArrived | StepFinished)
                for command in row.commands
                if isinstance(command, RunStep) and record.id not in dict(command.grants)
            ]
            # A step that began at the very instant of the begin or the end may be on either side of it.
            assert abs(len(steps) - wait.num_steps) <= 1
            assert sum(wait.held_by.values()) == wait.num_steps


def test_the_story_of_a_crash_and_a_retry(run: tuple[Path, SimulatedCluster]) -> None:
    path, world = run
    stories = [explain(rows_of(path), record.id) for record in world.records]
    retried = [story for story in stories if story.num_attempts == 2]
    assert retried
    text = "\n".join(retried[0].lines())
    assert "the attempt at i1 failed: instance i1 crashed" in text
    assert "attempt 2 of 3" in text


def test_the_command_prints_the_story(run: tuple[Path, SimulatedCluster]) -> None:
    path, _ = run
    ran = rota("explain", path, "r-20")
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.stdout.startswith("r-20: aborted; class 0, tenant default, ")
    assert "the client left" in ran.stdout
    told = json.loads(rota("explain", path, "r-20", "--json").stdout)
    assert told["end"] == "aborted"
    assert told["request"]["id"] == "r-20"


def test_an_unknown_request_names_a_near_one(run: tuple[Path, SimulatedCluster]) -> None:
    with pytest.raises(DataError, match="no request 'r-200'") as caught:
        explain(rows_of(run[0]), "r-200")
    assert caught.value.hint == "did you mean 'r-20'?"


# --- timelines --------------------------------------------------------------------------------------------------------


def test_a_timeline_holds_every_step_and_request(run: tuple[Path, SimulatedCluster]) -> None:
    path, world = run
    rows = rows_of(path)
    timeline = timeline_of(rows)
    assert timeline.resources() == ["router", "i0", "i1", "i1#1"]
    steps = [item for item in timeline if isinstance(item, Span)]
    ordered = [command for row in rows for command in row.commands if isinstance(command, RunStep)]
    assert len(steps) == len(ordered)
    assert sum(item.args["num_tokens"] for item in steps) == sum(n for step in ordered for _, n in step.grants)
    by_resource: dict[str, int] = {}
    for item in steps:
        assert item.track == STEPS
        assert item.start >= by_resource.get(item.resource, 0), "steps of one instance never overlap"
        by_resource[item.resource] = item.end
    requests = {item.id: item for item in timeline if isinstance(item, AsyncSpan) and item.name == "request"}
    assert {record.id: record.status for record in world.records} == {
        name: item.args["end"] for name, item in requests.items()
    }
    for item in timeline:
        if isinstance(item, AsyncSpan) and item.resource != "router":
            assert requests[item.id].start <= item.start <= item.end
    free = [item.value for item in timeline if isinstance(item, Sample) and item.name == "free blocks"]
    assert min(free) >= 0 and max(free) <= 120
    waiting = {item.resource: item.value for item in timeline if isinstance(item, Sample) and item.name == "waiting"}
    assert waiting["i0"] == waiting["i1#1"] == 0, "nobody waits when the last step begins"


def test_what_had_not_ended_is_closed_and_says_so(run: tuple[Path, SimulatedCluster]) -> None:
    rows = rows_of(run[0])[:200]
    open_items = [item for item in timeline_of(rows) if getattr(item, "args", {}).get("end") == "unfinished"]
    assert open_items
    assert {item.end for item in open_items if isinstance(item, Span | AsyncSpan)} == {rows[-1].at}


def test_export_writes_what_viewers_open(run: tuple[Path, SimulatedCluster], tmp_path: Path) -> None:
    path, _ = run
    trace, table = tmp_path / "run.json", tmp_path / "run.csv"
    ran = rota("export", path, "--perfetto", trace, "--csv", table, "--json")
    assert ran.code == 0
    told = json.loads(ran.stdout)
    document = json.loads(trace.read_text())
    assert (
        document["otherData"]["journal_digest"] == json.loads(rota("replay", path, "--json").stdout)["journal_digest"]
    )
    assert {event["ph"] for event in document["traceEvents"]} >= {"M", "X", "b", "e", "i", "C"}
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == told["num_items"]
