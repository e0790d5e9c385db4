"""A request is let go of at its next token or goes on as if nobody had asked: vLLM's real schedulers, no model."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.serving.api import InstanceLimits
from rota.serving.engines.vllm.control import Command
from rota.serving.engines.vllm.hand_off import HandOffs, drop_unusable_ticket, is_internal_id, why_it_stays
from rota.serving.engines.vllm.tickets import Reply, Ticket
from rota.serving.engines.vllm.virtual import VirtualVllm
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.stack import EnginePolicies

BLOCK_SIZE = 4
PROMPTS = {"a": 9, "b": 14}


class Channel:
    """Stands where the socket is: what is asked is taken by the next step."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def ask(self, request_id: str) -> Any:
        replies: list[Reply] = []
        asked = SimpleNamespace(
            command=Command(hand_off=request_id), is_withdrawn=False, replies=replies, answer=replies.append
        )
        self.asked.append(asked)
        return asked

    def take(self) -> list[Any]:
        taken, self.asked = self.asked, []
        return taken


class Engine(VirtualVllm):
    """One engine with hand-offs, and an exporter that counts what the worker would have been told."""

    def __init__(self, *, is_async: bool = False, num_blocks: int = 100) -> None:
        limits = InstanceLimits(num_blocks=num_blocks, block_size=BLOCK_SIZE, max_num_seqs=8, max_model_len=200)
        super().__init__(limits, EnginePolicies(Fcfs(), VllmDefault(), RecomputeLowest()), async_scheduling=is_async)
        self.channel = Channel()
        self.exporter = SimpleNamespace(_reqs_in_batch=set(), _reqs_not_processed=set())
        self.scheduler._rota_hand_offs = HandOffs(self.scheduler, self.channel, self.exporter)  # type: ignore[arg-type]
        self.made: dict[str, int] = {}
        self.is_async = is_async

    def run(self, num_steps: int) -> None:
        """Steps as vLLM makes them: two in flight under asynchronous scheduling."""
        for _ in range(num_steps):
            if self.num_unfinished:
                self.schedule()
            if self._in_flight and (not self.is_async or len(self._in_flight) == 2 or not self.num_unfinished):
                requests = list(self.scheduler.requests.values())
                self.update()
                self.made.update({request.request_id: request.num_output_tokens for request in requests})


@settings(max_examples=60, deadline=None)
@given(before=st.integers(0, 30), max_tokens=st.integers(1, 30), is_async=st.booleans())
def test_it_ends_with_the_next_token_or_by_itself_and_nobody_else_notices(
    before: int, max_tokens: int, is_async: bool
) -> None:
    engine = Engine(is_async=is_async)
    for name, num_tokens in PROMPTS.items():
        engine.add_request(name, list(range(num_tokens)), max_tokens if name == "a" else 40)
    engine.run(before)
    in_flight = len(engine._in_flight)
    had = engine.num_output_tokens("a")
    asked = engine.channel.ask("a")
    engine.run(120)

    (reply,) = asked.replies
    assert engine.made["b"] == 40
    if reply.ticket is None:
        assert engine.made["a"] == max_tokens
        assert had is None or max_tokens - had <= 2 + in_flight or had == 0
        assert not engine.exporter._reqs_in_batch - engine.exporter._reqs_not_processed
        return
    ticket = reply.ticket
    assert had is not None
    num_made = len(ticket.output_token_ids)
    assert num_made == engine.made["a"]
    assert num_made <= had + max(1, in_flight) + 1
    assert ticket.num_tokens_left == max_tokens - num_made > 0
    assert len(ticket.prompt_token_ids) == PROMPTS["a"]
    # What a destination takes room for, it can pull: all but the last token is computed, and no more than that.
    assert not engine.exporter._reqs_not_processed
    assert (PROMPTS["a"] + num_made - 1) % BLOCK_SIZE != 0


def test_one_that_waits_or_is_unknown_stays() -> None:
    engine = Engine(num_blocks=6)
    engine.add_request("a", list(range(20)), 3)
    engine.add_request("b", list(range(20)), 3)
    unknown, waiting = engine.channel.ask("c"), engine.channel.ask("b")
    engine.run(1)
    assert unknown.replies[0].stays.reason == "it is not here (any more)"
    assert waiting.replies[0].stays.reason == "it does not run yet"
    engine.run(20)
    assert engine.made == {"a": 3, "b": 3}


def test_one_that_is_preempted_goes_on_to_its_own_end() -> None:
    engine = Engine(num_blocks=9)
    for name in "ab":
        engine.add_request(name, list(range(15)), 16)
    asked = None
    for _ in range(80):
        # "b" is the one admitted last; asked for in the very step that preempts it.
        free = engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        request = engine.scheduler.requests.get("b")
        if asked is None and free == 0 and request is not None and request.num_computed_tokens % BLOCK_SIZE == 0:
            asked = engine.channel.ask("b")
        engine.run(1)
    assert asked is not None
    assert asked.replies[0].stays.reason == "it was preempted"
    assert engine.made == {"a": 16, "b": 16}
    assert engine.exporter._reqs_in_batch == engine.exporter._reqs_not_processed == {"b"}


def test_one_that_nobody_waits_for_any_more_goes_on() -> None:
    engine = Engine(is_async=True)
    engine.add_request("a", list(range(9)), 20)
    engine.run(4)
    asked = engine.channel.ask("a")
    engine.schedule()
    asked.is_withdrawn = True
    engine.update()
    engine.run(60)
    assert engine.made["a"] == 20 or asked.replies[0].ticket is not None


def test_one_taken_back_before_its_last_token_goes_on() -> None:
    engine = Engine()
    engine.add_request("a", list(range(9)), 20)
    engine.run(3)
    hand_offs = engine.scheduler._rota_hand_offs
    asked = engine.channel.ask("a")
    hand_offs.begin_asked()
    asked.is_withdrawn = True
    engine.run(60)
    assert engine.made["a"] == 20
    assert asked.replies[0].stays.reason == "it was taken back"


def test_one_whose_client_leaves_is_let_go_of_by_nobody() -> None:
    engine = Engine()
    engine.add_request("a", list(range(9)), 20)
    engine.run(3)
    asked = engine.channel.ask("a")
    engine.schedule()
    engine.abort("a")
    engine.update()
    assert asked.replies[0].stays.reason == "it has ended"
    assert engine.exporter._reqs_not_processed == {"a"}


@pytest.mark.parametrize(
    ("name", "request_id", "is_it"),
    [
        ("cmpl-x-0-0123abcd", "x", True),
        ("chatcmpl-x-0123abcd", "x", True),
        ("1_chatcmpl-x-0123abcd", "x", True),
        ("generate-tokens-x-0123abcd", "x", True),
        ("x", "x", True),
        ("cmpl-x-1-0-0123abcd", "x", False),
        ("chatcmpl-x-1-0123abcd", "x", False),
        ("cmpl-xy-0-0123abcd", "x", False),
        ("cmpl-a.b-0-0123abcd", "a.b", True),
        ("cmpl-aXb-0-0123abcd", "a.b", False),
    ],
)
def test_ids_are_told_apart(name: str, request_id: str, is_it: bool) -> None:
    assert is_internal_id(name, request_id) is is_it


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({}, ""),
        ({"temperature": 0.7, "top_p": 0.9}, ""),
        ({"min_tokens": 2}, ""),
        ({"min_tokens": 9}, ""),
        ({"repetition_penalty": 1.1}, ""),
        ({"seed": 1, "temperature": 0.0}, ""),
        ({"seed": 1}, "seeded"),
        ({"presence_penalty": 0.1}, "penalties"),
        ({"logprobs": 1}, "log-probabilities"),
        ({"stop": ["x"]}, "stop strings"),
        ({"bad_words": ["x"]}, "bad words"),
    ],
)
def test_what_does_not_travel_makes_it_stay(settings: dict[str, Any], word: str) -> None:
    from vllm.sampling_params import SamplingParams

    request = SimpleNamespace(
        sampling_params=SamplingParams(detokenize=True, **settings),
        prompt_token_ids=[1],
        num_output_tokens=3,
        lora_request=None,
        mm_features=[],
        resumable=False,
    )
    reason = why_it_stays(request)
    assert word in reason if word else reason == ""


@pytest.mark.parametrize(
    ("num_blocks", "num_tokens", "is_kept"), [(3, 9, True), (3, 12, True), (2, 9, False), (4, 9, False), (3, 7, False)]
)
def test_only_a_ticket_for_exactly_these_blocks_is_pulled(num_blocks: int, num_tokens: int, is_kept: bool) -> None:
    params = {
        "do_remote_prefill": True,
        "remote_block_ids": [list(range(num_blocks))],
        "remote_num_tokens": num_tokens,
    }
    request = SimpleNamespace(kv_transfer_params=params, num_prompt_tokens=10)
    drop_unusable_ticket(request, BLOCK_SIZE)
    assert (request.kv_transfer_params is not None) is is_kept


def test_a_destination_that_is_given_fewer_tokens_pulls_fewer_blocks() -> None:
    """The client may have got fewer tokens than the source made: those that begin a character bring no text."""
    params = {"do_remote_prefill": True, "remote_block_ids": [[7, 8, 9]], "remote_num_tokens": 9}
    ticket = Ticket("x", tuple(range(7)), (1, 2, 3), 7, params, BLOCK_SIZE, 100)
    assert ticket.transfer_params(10) == params
    assert ticket.transfer_params(9) == params
    assert ticket.transfer_params(8) == {**params, "remote_block_ids": [[7, 8]]}
    assert (ticket.num_bytes(10), ticket.num_bytes(8)) == (300, 200)
    assert ticket.transfer_params(11) is None
    assert msgspec.structs.replace(ticket, kv_transfer_params=None).transfer_params(10) is None
