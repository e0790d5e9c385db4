"""Moves and resumptions in a picture and in a story: rows of the router alone, as a live journal has them."""

from rota.base.instant import Duration, Instant, milliseconds
from rota.base.journal import Row
from rota.base.timeline import AsyncSpan, Flow, Span
from rota.export.perfetto import trace_events
from rota.serving.explain import explain
from rota.serving.model.commands import (
    AbortMigration,
    Commit,
    CopyOut,
    Dispatch,
    HandOver,
    Migrate,
    RunStep,
    SequenceStopped,
    Way,
)
from rota.serving.model.events import (
    CopyCaughtUp,
    CopyStarted,
    FirstTokenSeen,
    HandedOver,
    MigrationFailed,
    RequestArrived,
    RequestFailed,
    RequestFinished,
    RoomReserved,
    SequenceAdopted,
    SequenceArrived,
    SequenceLeft,
    StepFinished,
    StopAsked,
)
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request, RequestId
from rota.serving.timelines import timeline_of

A, B = InstanceId("a"), InstanceId("b")
R = RequestId("r")
REQUEST = Request(R, Instant(0), 100, 50)


def rows(*told, machine="cluster"):
    """Rows a millisecond apart, each an event with its commands."""
    return [
        Row(number, machine, Instant(milliseconds(number)), "deadline" if event is None else "event", event, commands)
        for number, (event, *commands) in enumerate(told)
    ]


def moved(number=1, request_id=R, source=A, destination=B):
    return [
        (None, Migrate(number, request_id, source, destination, Way.COPY, "a is full")),
        (RoomReserved(number), CopyOut(number, request_id)),
        (CopyStarted(number),),
        (CopyCaughtUp(number), HandOver(number, request_id)),
        (HandedOver(number, milliseconds(0.5), 4096), Commit(number, request_id)),
    ]


BEGUN = [(RequestArrived(REQUEST), Dispatch(R, A, "first")), (FirstTokenSeen(R, A),)]


def test_a_move_is_a_span_at_either_side_and_an_arrow_between_them():
    timeline = timeline_of(rows(*BEGUN, *moved(), (RequestFinished(R, B, 9),)))
    spans = {span.resource: span for span in timeline if isinstance(span, Span)}
    assert (spans["a"].name, spans["a"].start, spans["a"].end) == ("r to b", milliseconds(2), milliseconds(6))
    assert spans["a"].args["way"] == "copy"
    assert spans["a"].args["reason"] == "a is full"
    assert spans["a"].args["downtime_ms"] == 0.5
    assert (spans["b"].name, spans["b"].start, spans["b"].end) == ("r from a", milliseconds(5.5), milliseconds(6))
    (flow,) = (item for item in timeline if isinstance(item, Flow))
    assert (flow.source.resource, flow.target.resource) == ("a", "b")
    assert spans["a"].start <= flow.source.at < spans["a"].end, "an arrow hangs on the span that is open there"
    assert spans["b"].start <= flow.target.at < spans["b"].end
    events = list(trace_events(timeline))
    start, end = ([event for event in events if event["ph"] == phase] for phase in "sf")
    assert len(start) == len(end) == 1
    assert start[0]["id"] == end[0]["id"]
    assert start[0]["pid"] != end[0]["pid"]


def test_a_move_that_was_given_up_has_no_arrow():
    timeline = timeline_of(rows(*BEGUN, *moved()[:3], (MigrationFailed(1, "x"), AbortMigration(1, R, "no room"))))
    (span,) = (item for item in timeline if isinstance(item, Span))
    assert span.args["end"] == "given up: no room"
    assert not [item for item in timeline if isinstance(item, Flow)]
    timeline = timeline_of(rows(*BEGUN, *moved()[:3]))
    assert [item.args["end"] for item in timeline if isinstance(item, Span)] == ["unfinished"]


def test_moves_at_one_time_do_not_cross_on_a_track():
    first, second = moved(), moved(2, RequestId("other"))
    told = [each for pair in zip(first, second, strict=True) for each in pair]
    told[-1] = (HandedOver(2, milliseconds(3), 1), *told[-1][1:])
    spans = [item for item in timeline_of(rows(*BEGUN, *told)) if isinstance(item, Span)]
    tracks = [(span.resource, span.track) for span in spans]
    assert sorted(tracks) == [("a", "moves out"), ("a", "moves out 2"), ("b", "moves in"), ("b", "moves in 2")]


def test_the_phases_of_a_request_that_leaves_and_of_one_that_comes():
    here = rows(
        (SequenceArrived(REQUEST), RunStep(1, ((R, 100),))),
        (StopAsked(R),),
        (StepFinished(1), SequenceStopped(R, 101)),
        (SequenceLeft(R),),
        machine="instance/a",
    )
    there = rows((None,), (None,), (None,), (SequenceAdopted(REQUEST, 1), RunStep(1, ((R, 1),))), machine="instance/b")
    spans = [item for item in timeline_of([*here, *there]) if isinstance(item, AsyncSpan)]
    assert [(span.resource, span.name, span.args["end"]) for span in spans] == [
        ("a", "queued", "admitted"),
        ("a", "running", "stopped"),
        ("a", "stopped", "left"),
        ("b", "running", "unfinished"),
    ]


def test_the_story_says_why_a_request_was_moved_and_how_long_it_stood():
    story = explain(rows(*BEGUN, *moved(), (RequestFinished(R, B, 9),)), "r")
    told = {moment.what: moment.text for moment in story.moments}
    assert told["move_begun"] == "to be moved from a to b by copying its blocks while it decodes: a is full"
    assert told["hand_over"] == "room is kept at b; told to stop at a"
    assert told["moved"] == "moved from a to b: stood for 0.5 ms, 4,096 bytes were copied"
    assert story.num_migrations == 1
    assert story.lines()[-1].startswith("attempts 1, preemptions 0, moves 1")


def test_the_story_says_why_a_move_was_given_up():
    told = [*BEGUN, *moved()[:2], (None, AbortMigration(1, R, "reserved for 10 s")), (HandedOver(1, Duration(0)),)]
    story = explain(rows(*told), "r")
    told = {moment.what: moment.text for moment in story.moments}
    assert told["move_given_up"] == "the move from a to b was given up: reserved for 10 s"
    assert story.num_migrations == 0


def test_the_story_says_from_which_token_a_request_went_on():
    failed = RequestFailed(R, A, "killed", num_output_tokens=7)
    goes_on = Dispatch(R, B, "resumption 1 of 3", 2, num_output_tokens=7)
    story = explain(rows(*BEGUN, (failed, goes_on), (FirstTokenSeen(R, B),), (RequestFinished(R, B, 9),)), "r")
    told = {moment.what: moment.text for moment in story.moments}
    assert told["attempt_failed"] == "the attempt at a failed after 7 tokens: killed"
    assert told["resumed"] == "sent to b to go on: resumption 1 of 3"
    assert told["next_token"] == "the next token came from b"
    assert story.num_resumptions == 1
    assert story.ttft_ms == 1.0, "the first token is the first"
