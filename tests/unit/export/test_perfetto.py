"""The trace file is valid JSON in the trace-event format, and holds everything that the timeline does."""

import json

import jsonschema
from hypothesis import given
from hypothesis import strategies as st

from rota.base.timeline import AsyncSpan, Flow, Mark, Sample, Span, Timeline
from rota.export.perfetto import trace_events, write_perfetto

NUMBER = {"type": "number"}
STRING = {"type": "string"}
INTEGER = {"type": "integer"}


def event(phase, required, **properties):
    return {
        "type": "object",
        "required": ["ph", "pid", *required],
        "properties": {"ph": {"const": phase}, "pid": INTEGER, "args": {"type": "object"}, **properties},
    }


TIMED = {"name": STRING, "cat": STRING, "ts": NUMBER, "tid": INTEGER}
SCHEMA = {
    "type": "object",
    "required": ["traceEvents"],
    "properties": {
        "displayTimeUnit": {"enum": ["ms", "ns"]},
        "otherData": {"type": "object"},
        "traceEvents": {
            "type": "array",
            "items": {
                "oneOf": [
                    event("M", ["name", "args"], name={"enum": ["process_name", "process_sort_index", "thread_name"]}),
                    event("X", ["name", "ts", "dur", "tid"], dur={"type": "number", "minimum": 0}, **TIMED),
                    event("b", ["name", "cat", "ts", "id"], id=STRING, **TIMED),
                    event("e", ["name", "cat", "ts", "id"], id=STRING, **TIMED),
                    event("i", ["name", "ts", "tid", "s"], s={"enum": ["t", "p", "g"]}, **TIMED),
                    event("C", ["name", "ts", "args"], args={"additionalProperties": NUMBER}, name=STRING, ts=NUMBER),
                    event("s", ["name", "cat", "ts", "tid", "id"], id=INTEGER, **TIMED),
                    event("f", ["name", "cat", "ts", "tid", "id", "bp"], id=INTEGER, **TIMED),
                ]
            },
        },
    },
}

names = st.sampled_from(["oven", "shop", 'a "quoted" <name>', "ü"])
instants = st.integers(0, 10**18)
pairs = st.tuples(instants, instants).map(sorted)
values = st.floats(allow_nan=False, allow_infinity=False)
arguments = st.dictionaries(names, st.integers(-9, 9) | st.text(max_size=5), max_size=2)


@st.composite
def timelines(draw):
    timeline = Timeline()
    for kind in draw(st.lists(st.sampled_from("saicf"), max_size=12)):
        start, end = draw(pairs)
        if kind == "s":
            timeline.add_span(draw(names), draw(names), draw(names), start, end, draw(arguments))
        elif kind == "a":
            timeline.add_async_span(draw(names), draw(names), draw(names), start, end, draw(arguments))
        elif kind == "i":
            timeline.add_instant(draw(names), draw(names), draw(names), start, draw(arguments))
        elif kind == "c":
            timeline.add_counter(draw(names), draw(names), start, draw(values))
        else:
            timeline.add_flow(draw(names), (draw(names), draw(names), start), (draw(names), draw(names), end))
    return timeline


@given(timelines())
def test_any_timeline_gives_a_valid_trace(tmp_path_factory, timeline):
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    write_perfetto(timeline, path, {"seed": 3})
    trace = json.loads(path.read_text())
    jsonschema.validate(trace, SCHEMA)
    assert trace["otherData"] == {"seed": 3}
    by_phase = {phase: sum(event["ph"] == phase for event in trace["traceEvents"]) for phase in "XbeiCsf"}
    count = {kind: sum(isinstance(item, kind) for item in timeline) for kind in (Span, AsyncSpan, Mark, Sample, Flow)}
    assert by_phase == {
        "X": count[Span],
        "b": count[AsyncSpan],
        "e": count[AsyncSpan],
        "i": count[Mark],
        "C": count[Sample],
        "s": count[Flow],
        "f": count[Flow],
    }


@given(timelines())
def test_every_place_has_one_name_and_times_do_not_go_back(timeline):
    events = list(trace_events(timeline))
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert len(set(processes.values())) == len(processes)
    assert sorted(processes.values()) == sorted(timeline.resources())
    threads = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    for item in events:
        assert item["pid"] in processes
        if item["ph"] in "Xisf":
            assert (item["pid"], item["tid"]) in threads
    starts = [event["ts"] for event in events if event["ph"] in "XbiCs"]
    assert starts == sorted(starts)


def test_a_small_trace_in_full():
    timeline = Timeline()
    timeline.add_span("oven", "rack", "bread", 1_500, 4_000, {"loaves": 3})
    timeline.add_async_span("7", "oven", "loaf", 1_000, 9_000)
    timeline.add_flow("sold", ("oven", "rack", 4_000), ("shop", "till", 5_000))
    assert list(trace_events(timeline)) == [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "oven"}},
        {"ph": "M", "name": "process_sort_index", "pid": 1, "args": {"sort_index": 1}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "shop"}},
        {"ph": "M", "name": "process_sort_index", "pid": 2, "args": {"sort_index": 2}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "rack"}},
        {"ph": "M", "name": "thread_name", "pid": 2, "tid": 2, "args": {"name": "till"}},
        {"ph": "b", "name": "loaf", "cat": "rota", "ts": 1.0, "id": "oven/7", "pid": 1, "tid": 0, "args": {}},
        {"ph": "e", "name": "loaf", "cat": "rota", "ts": 9.0, "id": "oven/7", "pid": 1, "tid": 0, "args": {}},
        {
            "ph": "X",
            "name": "bread",
            "cat": "rota",
            "ts": 1.5,
            "dur": 2.5,
            "pid": 1,
            "tid": 1,
            "args": {"loaves": 3},
        },
        {"ph": "s", "name": "sold", "cat": "rota", "id": 0, "ts": 4.0, "pid": 1, "tid": 1},
        {"ph": "f", "name": "sold", "cat": "rota", "id": 0, "ts": 5.0, "pid": 2, "tid": 2, "bp": "e"},
    ]
