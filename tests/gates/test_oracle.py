"""Law 9: what only the world knows, the true length of an answer above all, cannot be reached from a policy."""

import inspect
import typing
from types import UnionType

import msgspec
import pytest

from rota.serving.api import (
    BatchDraft,
    BatchPolicy,
    ClusterView,
    Cursor,
    EngineView,
    InstanceView,
    LengthPredictor,
    MemoryPolicy,
    OrderPolicy,
    SequenceView,
    StepTimePredictor,
    WaitingView,
)
from rota.serving.instance.sequence import Sequence
from rota.serving.model.events import ClusterEvent, InstanceEvent
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request
from rota.serving.sim.ground_truth import GroundTruth

SHOWN = (
    BatchDraft,
    BatchPolicy,
    ClusterView,
    Cursor,
    EngineView,
    InstanceView,
    LengthPredictor,
    MemoryPolicy,
    OrderPolicy,
    SequenceView,
    StepTimePredictor,
    WaitingView,
)
KNOWN_ON_ARRIVAL = {
    "id",
    "arrived_at",
    "num_prompt_tokens",
    "max_tokens",
    "declares_max_tokens",
    "text_counts",
    "priority",
    "tenant",
    "program",
    "session",
    "slo",
    "block_hashes",
    "hash_block_tokens",
    "movable",
}
"""All that a request carries. A new field belongs here only if a live front door knows it when the request arrives."""
OF_A_SEQUENCE = {
    "id",
    "request",
    "priority",
    "tenant",
    "arrived_at",
    "admitted_seq",
    "queue_position",
    "num_tokens",
    "num_prompt_tokens",
    "num_computed_tokens",
    "num_output_tokens",
    "num_pending_tokens",
    "num_preemptions",
}


def parts(annotation):
    """Every type that is named inside an annotation."""
    if isinstance(annotation, list):  # the arguments of a callable
        return {part for argument in annotation for part in parts(argument)}
    arguments = typing.get_args(annotation)
    return {annotation} | {part for argument in arguments for part in parts(argument)} if arguments else {annotation}


def types_shown(start):
    """Every type of ours that an annotation leads to, from these protocols on."""
    seen = set()
    frontier = list(start)
    while frontier:
        each = frontier.pop()
        if not inspect.isclass(each) or each in seen or not each.__module__.startswith("rota."):
            continue
        seen.add(each)
        hints = dict(typing.get_type_hints(each))
        for member in vars(each).values():
            function = member.fget if isinstance(member, property) else member
            if inspect.isfunction(function):
                hints |= {f"{function.__name__}.{key}": hint for key, hint in typing.get_type_hints(function).items()}
        frontier += [part for hint in hints.values() for part in parts(hint)]
    return seen


def test_a_request_carries_what_is_known_on_arrival():
    assert {field.name for field in msgspec.structs.fields(Request)} == KNOWN_ON_ARRIVAL


def test_a_sequence_shows_its_past_and_not_its_future():
    assert {name for name in vars(SequenceView) if not name.startswith("_")} == OF_A_SEQUENCE


def test_no_type_that_policies_are_shown_leads_to_the_truth():
    shown = types_shown(SHOWN)
    assert {Request, InstanceLimits, SequenceView} <= shown, "the walk sees what is there"
    assert GroundTruth not in shown
    assert not [each for each in shown if each.__module__.startswith("rota.serving.sim")]


def test_the_walk_would_see_it():
    class Leaky:
        __module__ = "rota.serving.api.leaky"

        def view(self) -> GroundTruth | None: ...

    assert GroundTruth in types_shown([Leaky])


@pytest.mark.parametrize("event", [*typing.get_args(InstanceEvent), *typing.get_args(ClusterEvent)])
def test_no_event_tells_a_length_before_its_end(event):
    """Only what has ended may say how long it was; what goes on elsewhere says how far it has come."""
    named = {field.name for field in msgspec.structs.fields(event)}
    if "num_output_tokens" in named:
        assert event.__name__ in {"RequestFinished", "RequestFailed", "SequenceArrived", "SequenceAdopted"}


def test_a_sequence_holds_nothing_more_behind_its_view():
    slots = {slot for each in Sequence.__mro__ for slot in getattr(each, "__slots__", ())}
    assert not [slot for slot in slots if "true" in slot or "left" in slot or "final" in slot]
    assert slots - OF_A_SEQUENCE == {
        "owner",
        "num_blocks",
        "shared",
        "num_shared",
        "block_hashes",
        "blocks_per_hash",
        "num_hashed",
        "granted",
        "num_cached_tokens",
        "state",
        "grant",
        "_computed",
        "_rounds",
        "_tokens",
    }


def test_annotations_are_taken_apart():
    assert {int, str, None.__class__} <= parts(dict[str, int | None])
    assert isinstance(int | None, UnionType)
