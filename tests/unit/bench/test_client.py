"""Requests as servers get them, and answers of every kind as the client takes them."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.bench.stub import NUM_TOKENS, StubServer

from rota.base.instant import Instant, seconds
from rota.runtime.clocks import SystemClock
from rota.serving.bench.client import Sent, Target
from rota.serving.bench.load import send_load
from rota.serving.bench.plan import Planned
from rota.serving.model.request import SLO, TenantId


def planned(index: int = 0, at: float = 0.0) -> Planned:
    return Planned(index, seconds(at), "all", 8, 16)


def ask(url: str, does: str, what: Planned | None = None, **options: object) -> Sent:
    async def once() -> Sent:
        async with aiohttp.ClientSession() as session:
            settings = {"endpoint": "chat", "ignore_eos": False, "timeout_seconds": 5.0} | options
            target = Target(session, url, SystemClock().now, model=does, **settings)
            request = what or planned()
            return await target.ask(request, target.body(request, "hello"), Instant(0))

    return asyncio.run(once())


@pytest.fixture(scope="module")
def server():  # type: ignore[no-untyped-def]
    with StubServer() as stub:
        yield stub


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_an_answer_is_counted_and_timed(server: StubServer, endpoint: str) -> None:
    got = ask(server.url, "ok", endpoint=endpoint)
    assert (got.outcome, got.error_kind) == ("finished", "")
    assert (got.num_output_tokens, got.has_usage, got.num_prompt_tokens) == (NUM_TOKENS + 1, True, 11)
    assert len(got.chunk_at) == NUM_TOKENS, "the first chunk has a role and no text"
    assert [got.sent_at, *got.chunk_at, got.ended_at] == sorted([got.sent_at, *got.chunk_at, got.ended_at])


def test_without_usage_a_chunk_is_a_token(server: StubServer) -> None:
    got = ask(server.url, "no_usage")
    assert (got.outcome, got.num_output_tokens, got.has_usage) == ("finished", NUM_TOKENS, False)


@pytest.mark.parametrize(
    ("does", "outcome", "kind"),
    [
        ("status_500", "failed", "status 500"),
        ("status_503", "rejected", "status 503"),
        ("status_429", "rejected", "status 429"),
        ("cut_short", "failed", "broken"),
        ("error_chunk", "failed", "error in stream"),
        ("empty", "failed", "empty"),
        ("nonsense", "failed", "not a chunk"),
    ],
)
def test_what_goes_wrong_has_a_kind(server: StubServer, does: str, outcome: str, kind: str) -> None:
    got = ask(server.url, does)
    assert (got.outcome, got.error_kind) == (outcome, kind)
    assert got.detail or kind == "empty"
    assert got.ended_at > 0


def test_a_server_that_hangs_is_a_timeout(server: StubServer) -> None:
    got = ask(server.url, "hang", timeout_seconds=0.2)
    assert (got.outcome, got.error_kind) == ("failed", "timeout")


def test_a_server_that_is_not_there_is_a_failure(server: StubServer) -> None:
    got = ask("http://127.0.0.1:9", "ok")
    assert (got.outcome, got.error_kind) == ("failed", "connect")


def test_headers_say_who_asks_and_nothing_that_is_a_default(server: StubServer) -> None:
    server.heard.clear()
    ask(server.url, "ok")
    slo = SLO(ttft=seconds(0.5), tpot=seconds(0.0405))
    what = Planned(0, seconds(0), "c", 8, 16, priority=-2, tenant=TenantId("acme"), slo=slo, session="s-1")
    ask(server.url, "ok", what, ignore_eos=True)
    (plain, plain_body), (told, body) = server.heard
    names = {name.lower() for name in plain}
    assert not {name for name in names if name.startswith("x-")}
    assert "ignore_eos" not in plain_body
    assert body["ignore_eos"] is True
    assert (body["stream"], body["stream_options"], body["max_tokens"]) == (True, {"include_usage": True}, 16)
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    told = {name.lower(): value for name, value in told.items()}
    assert told["x-gateway-inference-fairness-id"] == "acme"
    assert told["x-vllm-priority"] == "-2"
    assert told["x-session-id"] == "s-1"
    assert (told["x-slo-ttft-ms"], told["x-slo-tpot-ms"]) == ("500", "40.5")


class Pieces:
    """A body that comes in these pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def iter_any(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


EVENTS = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "über"}}]},
    {"choices": [{"delta": {"reasoning_content": "so"}}]},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
]
BODY = b": a comment\n\n" + b"".join(
    f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\n".encode() for event in EVENTS
)
BODY += b"data: [DONE]\n\n"


@given(cuts=st.lists(st.integers(0, len(BODY)), max_size=30))
def test_events_are_read_alike_however_their_bytes_come(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(BODY)]
    pieces = [BODY[low:high] for low, high in itertools.pairwise(bounds)]
    times = iter(range(1_000))
    target = Target(
        None,  # type: ignore[arg-type]
        "http://x",
        lambda: Instant(next(times)),
        model="m",
        endpoint="chat",
        ignore_eos=False,
        timeout_seconds=1,
    )
    got = Sent(planned(), Instant(0), Instant(0), chunk_at=[])
    assert asyncio.run(target._read_events(got, Pieces(pieces))) is True  # type: ignore[arg-type]
    assert (len(got.chunk_at), got.num_output_tokens, got.num_prompt_tokens) == (2, 2, 3)


# --- open loop --------------------------------------------------------------------------------------------------------


def load(url: str, plan: list[Planned], *, stop_after: float | None = None) -> list[Sent]:
    async def run() -> list[Sent]:
        stop = asyncio.Event()
        if stop_after is not None:
            asyncio.get_running_loop().call_later(stop_after, stop.set)
        clock = SystemClock().now
        async with aiohttp.ClientSession() as session:
            target = Target(session, url, clock, model="ok", endpoint="chat", ignore_eos=False, timeout_seconds=30)
            return await send_load(plan, target, lambda _: "hi", clock, stop=stop)

    return asyncio.run(run())


def test_a_slow_server_does_not_hold_back_later_requests() -> None:
    with StubServer(delay_seconds=0.5) as slow:
        ended = load(slow.url, [planned(index, at=index * 0.01) for index in range(8)])
    assert sorted(each.planned.index for each in ended) == list(range(8))
    last_sent = max(each.sent_at for each in ended)
    assert all(each.ended_at > last_sent for each in ended), "all were under way at once"
    assert all(each.sent_at >= each.scheduled_at for each in ended)


def test_stopping_keeps_what_ended_and_counts_the_rest_as_aborted() -> None:
    with StubServer() as fast, StubServer(delay_seconds=20) as slow:
        done = load(fast.url, [planned(0), planned(1, at=30)], stop_after=0.5)
        dropped = load(slow.url, [planned(0), planned(1, at=0.01), planned(2, at=30)], stop_after=0.5)
    assert [each.outcome for each in done] == ["finished"]
    assert [(each.outcome, each.error_kind) for each in dropped] == [("aborted", "interrupted")] * 2
