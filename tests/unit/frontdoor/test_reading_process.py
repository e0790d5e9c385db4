"""Bodies that another process reads: what it finds is what the router would have found, and its end is heard of."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.instant import Instant
from rota.serving.frontdoor import reading_process
from rota.serving.frontdoor.exchange import HttpRequest
from rota.serving.frontdoor.identity import NOBODY
from rota.serving.frontdoor.intake import Intake
from rota.serving.frontdoor.keys import KeyHolder, TenantTerms
from rota.serving.frontdoor.problems import Problem
from rota.serving.frontdoor.reading import CHAT, COMPLETIONS, BodyReader
from rota.serving.frontdoor.reading_process import ReadingLostError, ReadingProcess
from rota.serving.model.request import TenantId

READER = BodyReader(CHAT, NOBODY, None, 1024, resume=True, counts_text=False)
GOOD = b'{"messages": [{"role": "user", "content": "hi"}]}'


@pytest.fixture(scope="module")
def process() -> Iterator[ReadingProcess]:
    made = ReadingProcess(8 * 1024 * 1024)
    yield made
    made.end()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(0, 3) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
TEXT = st.text(max_size=3000) | st.text("é\n{ ", max_size=600)
PART = st.fixed_dictionaries({"type": st.sampled_from(("text", "image_url"))}, optional={"text": TEXT})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "system"))}, optional={"content": TEXT | st.none() | st.lists(PART, max_size=3)}
)
XARGS = st.dictionaries(
    st.sampled_from(("tenant", "session_id", "waited_ms", "mine", "agentic_context")),
    st.sampled_from(("alice", "bob")) | st.just({"program_id": "p"}) | JSON,
)
FIELDS = {
    "model": st.text(max_size=5),
    "stream": st.booleans(),
    "stream_options": st.just({"include_usage": True}),
    "max_tokens": st.integers(-1, 99) | st.just(5.0),
    "max_completion_tokens": st.integers(1, 99),
    "n": st.integers(0, 3),
    "seed": st.integers(),
    "priority": st.integers(-9, 9),
    "session_id": TEXT,
    "cache_salt": TEXT,
    "tools": st.lists(JSON, max_size=2),
    "vllm_xargs": XARGS,
    "kv_transfer_params": JSON,
    "return_token_ids": st.booleans(),
    "unknown": JSON,
}
CHATS = st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3)}, optional=FIELDS)
PROMPT = TEXT | st.lists(TEXT, max_size=3) | st.lists(st.integers(0, 9) | st.just(4.0), max_size=400)
TEXTS = st.fixed_dictionaries({"prompt": PROMPT | st.lists(st.lists(st.integers(0, 9)), max_size=2)}, optional=FIELDS)
WRONG = st.dictionaries(st.sampled_from(("messages", "prompt", *FIELDS)), JSON, max_size=4)


@st.composite
def raw_bodies(draw: st.DrawFn) -> bytes:
    """Bodies that are right, wrong, or broken somewhere."""
    value: Any = draw(CHATS | TEXTS | WRONG | JSON)
    raw = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    kind = draw(st.sampled_from(("whole", "whole", "cut", "other byte", "deep")))
    at = draw(st.integers(0, len(raw)))
    if kind == "cut":
        return raw[:at]
    if kind == "other byte":
        return raw[:at] + draw(st.binary(min_size=1, max_size=2)) + raw[at + 1 :]
    return b'{"messages":' + b"[" * 100_000 if kind == "deep" else raw


HEADERS = st.lists(
    st.sampled_from(
        (
            (b"x-vllm-priority", b"-3"),
            (b"x-session-id", b"s"),
            (b"x-slo-ttft-ms", b"12.5"),
            (b"x-dynamo-trajectory-id", b"t"),
            (b"x-request-id", b"mine"),
            (b"connection", b"x-session-id"),
        )
    ),
    unique=True,
)
HOLDERS = st.none() | st.builds(
    KeyHolder,
    st.just(TenantId("alice")),
    st.builds(TenantTerms, class_ceiling=st.integers(-5, 0), isolate_cache=st.booleans()),
)


@settings(max_examples=300, deadline=None)
@given(
    raw=raw_bodies(),
    path=st.sampled_from((CHAT, CHAT, COMPLETIONS)),
    headers=HEADERS,
    holder=HOLDERS,
    resume=st.booleans(),
    counts_text=st.booleans(),
    cuts=st.lists(st.integers(0, 4000), max_size=3),
)
def test_both_processes_find_the_same(
    process: ReadingProcess,
    raw: bytes,
    path: str,
    headers: list[tuple[bytes, bytes]],
    holder: KeyHolder | None,
    resume: bool,
    counts_text: bool,
    cuts: list[int],
) -> None:
    http = HttpRequest("POST", path, [(b"content-type", b"application/json"), *headers], raw)

    def intake() -> Intake:
        return Intake(name="t", resume=resume, counts_text=counts_text)

    def found_here() -> object:
        return intake().read(http, Instant(5), holder)

    def found_there() -> object:
        edges = [0, *sorted(cuts), len(raw)]
        parts = [raw[begin:end] for begin, end in itertools.pairwise(edges)]
        here = intake()
        reader = here.reader(http, holder)
        return here.call(http, reader, process.read(reader, parts), Instant(5))

    here, there = what_comes_of(found_here), what_comes_of(found_there)
    assert here == there


def what_comes_of(read: Any) -> object:
    try:
        return read()
    except Problem as problem:
        return problem.status, problem.message, problem.param, problem.code, problem.retry_after_seconds


def test_what_is_read_here_is_read_there_and_is_not_kept(process: ReadingProcess) -> None:
    """Above what the pipe between them holds at once, too."""
    raw = json.dumps({"messages": [{"role": "user", "content": "x" * 7_000_000}], "stream": True}).encode()
    parts = [raw[begin : begin + 100_000] for begin in range(0, len(raw), 100_000)]
    assert process.read(READER, parts) == READER.read(raw)
    assert not parts


def test_the_child_stands_what_ends_a_group_and_dies_with_its_router() -> None:
    process = ReadingProcess(1024)
    process.read(READER, [GOOD])
    assert os.getpgid(process.pid) != os.getpgid(0), "Ctrl-C is not for it"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    assert process.read(READER, [GOOD]).num_prompt_tokens == 5
    process._wire.close()  # as the system does, however a router ends
    process._process.wait(20)
    assert not process.is_alive
    process.end()


def test_a_child_that_dies_is_a_loss_and_leaves_nothing() -> None:
    process = ReadingProcess(1024)
    process.read(READER, [GOOD])
    os.kill(process.pid, signal.SIGSTOP)
    dying = threading.Timer(0.1, process.kill)
    dying.start()
    with pytest.raises(ReadingLostError, match="ended in the middle"):
        process.read(READER, [GOOD * 1_000_000])
    dying.join()
    process.end()
    assert not Path(f"/proc/{process.pid}").exists()
    assert process._wire.fileno() == -1


def test_a_body_that_takes_more_memory_than_one_may_ends_the_child_alone() -> None:
    """With a bound that is too low for it. What a body of the largest size takes is within the real one."""
    worst = b'{"messages":[{"role":""}],"stream":true,"stop":[' + b'"a",' * 2_000_000 + b'"a"]}'
    little, enough = ReadingProcess(0), ReadingProcess(len(worst))
    with pytest.raises(ReadingLostError):
        little.read(READER, [worst])
    assert enough.read(READER, [worst]).num_prompt_tokens == 4
    little.end()
    enough.end()


UNDER_A_LIMIT = """
import resource
from tests.unit.frontdoor.test_reading_process import GOOD, READER, ReadingProcess
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
process = ReadingProcess(2**30)
print(process.read(READER, [GOOD]).num_prompt_tokens)
process.end()
"""


def test_a_router_that_is_allowed_less_memory_has_a_process_all_the_same() -> None:
    root = Path(__file__).resolve().parents[3]
    ran = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT], cwd=root, capture_output=True, text=True, check=False, timeout=60
    )
    assert (ran.stdout, ran.stderr) == ("5\n", "")


ANSWERS = {
    "no answer": b"",
    "half a length": b"\0" * 7,
    "a length without end": b"\xff" * 16,
    "a body that grew": reading_process._LENGTHS.pack(3, 10**6) + b"abc",
    "no facts": reading_process._LENGTHS.pack(3, 0) + b"abc",
    "other facts": reading_process._LENGTHS.pack(1, 0) + b"\xc0",
    "less than it said": reading_process._LENGTHS.pack(3, 0) + b"a",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_nonsense_is_a_loss(name: str) -> None:
    process = ReadingProcess(1024)
    ours, theirs = socket.socketpair()
    process._wire.close()
    process._wire = ours
    theirs.sendall(ANSWERS[name])
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ReadingLostError):
        process.read(READER, [GOOD])
    theirs.close()
    process.end()


def test_where_no_process_can_be_had_that_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    num_before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(reading_process.sys, "executable", "/no/such/python")
    with pytest.raises(ReadingLostError, match="cannot be started: No such file"):
        ReadingProcess(1024)
    assert len(list(Path("/proc/self/fd").iterdir())) == num_before
