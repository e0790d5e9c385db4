"""Bad input over a real socket: every row is answered with the right status, in OpenAI's error shape, naming the
spot."""

import json

import pytest
from tests.attack.wire import answer_to

from rota.serving.frontdoor.http1 import HttpLimits
from rota.serving.frontdoor.serve import ServeConfig
from rota.testing.router import running_router

LIMITS = HttpLimits(max_body_bytes=64 * 1024, max_head_bytes=8 * 1024)
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
GOOD = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def post(path: str, body: bytes | dict, *headers: str, content_type: str | None = "application/json") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: test", f"content-length: {len(raw)}", *headers]
    if content_type is not None:
        lines.append(f"content-type: {content_type}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def chat(**fields: object) -> bytes:
    return post(CHAT, {**GOOD, **fields})


def text(**fields: object) -> bytes:
    return post(TEXT, {"prompt": "hello", "max_tokens": 2, **fields})


def with_header(header: str) -> bytes:
    return post(CHAT, GOOD, header)


# name: (bytes sent, status, what `param` must be, what the message must contain)
BAD = {
    "truncated json": (post(CHAT, b'{"messages": ['), 400, None, "line 1, column 15"),
    "trailing comma on line 2": (post(CHAT, b'{\n "messages": [1,]}'), 400, None, "line 2"),
    "trailing characters": (post(CHAT, json.dumps(GOOD).encode() + b" x"), 400, None, "line 1, column"),
    "single quotes": (post(CHAT, b"{'messages': []}"), 400, None, "line 1, column 2"),
    "not a number": (post(CHAT, b'{"messages":[{"role":"u"}],"temperature":NaN}'), 400, None, "line 1"),
    "byte order mark": (post(CHAT, b"\xef\xbb\xbf" + json.dumps(GOOD).encode()), 400, None, "line 1, column 1"),
    "no body": (post(CHAT, b""), 400, None, "no body"),
    "invalid utf-8": (post(CHAT, b'{"messages":[{"role":"\xff"}]}'), 400, None, "UTF-8: line 1, column 23"),
    "lone surrogate": (post(CHAT, b'{"messages":[{"role":"\\ud800"}]}'), 400, None, "line 1"),
    "nested too deeply": (post(CHAT, b'{"messages":' + b"[" * 50_000), 400, None, "deep"),
    "nested in an unknown field": (post(CHAT, b'{"x":' + b"[" * 30_000), 400, None, "deep"),
    "an array": (post(CHAT, b"[]"), 400, None, "object"),
    "a string": (post(CHAT, b'"hello"'), 400, None, "object"),
    "null": (post(CHAT, b"null"), 400, None, "object"),
    "no messages": (post(CHAT, {"model": "m"}), 400, "messages", "required"),
    "messages of the wrong type": (chat(messages="hello"), 400, "messages", "array"),
    "no message at all": (chat(messages=[]), 400, "messages", "length"),
    "a message that is a string": (chat(messages=["hello"]), 400, "messages[0]", "object"),
    "a message without a role": (chat(messages=[{"content": "x"}]), 400, "messages[0].role", "required"),
    "a role that is a number": (chat(messages=[{"role": 1}]), 400, "messages[0].role", "str"),
    "a content that is a number": (chat(messages=[{"role": "user", "content": 3}]), 400, "messages[0].content", "str"),
    "a part without a type": (
        chat(messages=[{"role": "user", "content": [{"text": "x"}]}]),
        400,
        "messages[0].content[0].type",
        "required",
    ),
    "a text that is a list": (
        chat(messages=[GOOD["messages"][0], {"role": "user", "content": [{"type": "text", "text": []}]}]),
        400,
        "messages[1].content[0].text",
        "str",
    ),
    "a model that is a number": (chat(model=7), 400, "model", "str"),
    "max_tokens zero": (chat(max_tokens=0), 400, "max_tokens", ">= 1"),
    "max_tokens negative": (chat(max_tokens=-3), 400, "max_tokens", ">= 1"),
    "max_tokens a fraction": (chat(max_tokens=1.5), 400, "max_tokens", "whole number"),
    "max_tokens a string": (chat(max_tokens="10"), 400, "max_tokens", "int"),
    "max_tokens beyond all bounds": (chat(max_tokens=10**30), 400, "max_tokens", "int"),
    "max_completion_tokens true": (chat(max_completion_tokens=True), 400, "max_completion_tokens", "int"),
    "stream a string": (chat(stream="yes"), 400, "stream", "bool"),
    "stream_options a list": (chat(stream_options=[]), 400, "stream_options", "object"),
    "temperature too high": (chat(temperature=2.5), 400, "temperature", "<= 2"),
    "temperature negative": (chat(temperature=-0.1), 400, "temperature", ">= 0"),
    "temperature a string": (chat(temperature="hot"), 400, "temperature", "float"),
    "top_p above one": (chat(top_p=1.01), 400, "top_p", "<= 1"),
    "n zero": (chat(n=0), 400, "n", ">= 1"),
    "stop a number": (chat(stop=5), 400, "stop", "str"),
    "stop a list of numbers": (chat(stop=["a", 5]), 400, "stop[1]", "str"),
    "priority a string": (chat(priority="high"), 400, "priority", "int"),
    "priority out of range": (chat(priority=2**40), 400, "priority", "<="),
    "session_id a number": (chat(session_id=4), 400, "session_id", "str"),
    "session_id too long": (chat(session_id="x" * 300), 400, "session_id", "length"),
    "program_id a number": (
        chat(vllm_xargs={"agentic_context": {"program_id": 5}}),
        400,
        "vllm_xargs.agentic_context.program_id",
        "str",
    ),
    "cache_salt a number": (chat(cache_salt=1), 400, "cache_salt", "str"),
    "no prompt": (post(TEXT, {"model": "m"}), 400, "prompt", "required"),
    "prompt null": (text(prompt=None), 400, "prompt", "str"),
    "prompt an object": (text(prompt={}), 400, "prompt", "str"),
    "prompt an empty list": (text(prompt=[]), 400, "prompt", "empty"),
    "prompt of two kinds": (text(prompt=[1, "a"]), 400, "prompt", "one kind"),
    "prompt of a wrong id": (text(prompt=[[1], [2, "x"]]), 400, "prompt[1][1]", "int"),
    "form instead of json": (
        post(CHAT, b"a=b", content_type="application/x-www-form-urlencoded"),
        415,
        "content-type",
        "application/x-www-form-urlencoded",
    ),
    "no content type": (post(CHAT, GOOD, content_type=None), 415, "content-type", "nothing"),
    "compressed body": (post(CHAT, GOOD, "content-encoding: gzip"), 415, "content-encoding", "compressed"),
    "objective not a number": (
        with_header("x-gateway-inference-objective: high"),
        400,
        "x-gateway-inference-objective",
        "",
    ),
    "objective too large": (
        with_header("x-gateway-inference-objective: 99999999999"),
        400,
        "x-gateway-inference-objective",
        "",
    ),
    "priority header a fraction": (with_header("x-vllm-priority: 1.5"), 400, "x-vllm-priority", "integer"),
    "target negative": (with_header("x-slo-ttft-ms: -5"), 400, "x-slo-ttft-ms", "milliseconds"),
    "target infinite": (with_header("x-slo-ttft-ms: inf"), 400, "x-slo-ttft-ms", "milliseconds"),
    "target no number": (with_header("x-slo-tpot-ms: fast"), 400, "x-slo-tpot-ms", "milliseconds"),
    "tenant empty": (with_header("x-gateway-inference-fairness-id:"), 400, "x-gateway-inference-fairness-id", ""),
    "tenant not ascii": (
        with_header("x-gateway-inference-fairness-id: f\xfc"),
        400,
        "x-gateway-inference-fairness-id",
        "",
    ),
    "tenant too long": (
        with_header("x-gateway-inference-fairness-id: " + "t" * 300),
        400,
        "x-gateway-inference-fairness-id",
        "",
    ),
    "tenant twice": (
        post(CHAT, GOOD, "x-gateway-inference-fairness-id: a", "x-gateway-inference-fairness-id: b"),
        400,
        "x-gateway-inference-fairness-id",
        "more than once",
    ),
    "body too large": (post(CHAT, b"x" * (LIMITS.max_body_bytes + 1)), 413, None, str(LIMITS.max_body_bytes)),
    "body announced too large": (
        f"POST {CHAT} HTTP/1.1\r\nhost: t\r\ncontent-length: {2**40}\r\n\r\n".encode(),
        413,
        None,
        str(LIMITS.max_body_bytes),
    ),
    "chunked body too large": (
        f"POST {CHAT} HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n20000\r\n".encode() + b"x" * 0x20000,
        413,
        None,
        "exceeds",
    ),
    "headers too large": (with_header("x-filler: " + "y" * 9000), 431, None, str(LIMITS.max_head_bytes)),
    "headers without end": (b"GET /health HTTP/1.1\r\n" + b"x-filler: yyyyyyyyyyyyyyy\r\n" * 400, 431, None, "headers"),
    "target too long": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 431, None, "headers"),
    "no http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, None, "malformed HTTP"),
    "unknown method": (b"BREW /coffee HTTP/1.1\r\nhost: t\r\n\r\n", 400, None, "malformed HTTP"),
    "bad version": (b"GET /health HTTP/9.9\r\nhost: t\r\n\r\n", 400, None, "malformed HTTP"),
    "two lengths": (
        b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc",
        400,
        None,
        "malformed HTTP",
    ),
    "length and chunks": (
        b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
        None,
        "malformed HTTP",
    ),
    "a length that is no number": (
        b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: -1\r\n\r\n",
        400,
        None,
        "malformed HTTP",
    ),
    "a chunk that is no chunk": (
        b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        400,
        None,
        "malformed HTTP",
    ),
    "an expectation that cannot be met": (post(CHAT, GOOD, "expect: a-miracle"), 417, "expect", "100-continue"),
    "unknown path": (b"GET /v2/chat HTTP/1.1\r\nhost: t\r\n\r\n", 404, None, "/v2/chat"),
    "path up and away": (b"GET /../../etc/passwd HTTP/1.1\r\nhost: t\r\n\r\n", 404, None, "no /"),
    "wrong method": (b"GET /v1/chat/completions HTTP/1.1\r\nhost: t\r\n\r\n", 405, None, "POST"),
    "a tunnel": (b"CONNECT example.org:443 HTTP/1.1\r\nhost: t\r\n\r\n", 405, None, "CONNECT"),
    "delete the models": (b"DELETE /v1/models HTTP/1.1\r\nhost: t\r\n\r\n", 405, None, "GET"),
}


@pytest.mark.asyncio
async def test_every_bad_request_is_answered_with_the_spot_named() -> None:
    wrong = []
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, http=LIMITS)) as running:
        port = running.router.door.server.port
        for name, (sent, status, param, words) in BAD.items():
            got_status, headers, body = await answer_to(port, sent)
            error = json.loads(body)["error"]
            problems = [
                f"status {got_status}, not {status}" if got_status != status else "",
                f"param {error['param']!r}, not {param!r}" if error["param"] != param else "",
                f"message {error['message']!r} lacks {words!r}" if words not in error["message"] else "",
                "" if headers["content-type"] == "application/json" else "not JSON",
                "" if set(error) == {"message", "type", "param", "code"} else f"keys {sorted(error)}",
                "a traceback" if "Traceback" in error["message"] else "",
            ]
            wrong += [f"{name}: {problem}" for problem in problems if problem]
        # And it still serves.
        status, _, body = await answer_to(port, post(CHAT, GOOD))
        assert status == 200, body
        running.router.cluster.machine.check()
        assert running.router.cluster.machine.counts().num_arrived == 1, "a bad request reached the machine"
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "sent",
    [
        post(CHAT, GOOD, content_type="application/json; charset=utf-8"),
        post(CHAT, GOOD, content_type="Application/JSON"),
        post(CHAT, {**GOOD, "unknown_field": {"a": [1, None]}}),
        post(CHAT, {**GOOD, "max_tokens": None, "max_completion_tokens": 3, "stop": None, "n": None}),
        post(CHAT, {"messages": [{"role": "user", "content": None}], "max_tokens": 1}),
        post(
            CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "max_tokens": 1}
        ),
        post(CHAT, GOOD, "x-gateway-inference-objective: -3", "x-slo-ttft-ms: 2.5", "x-session-id: a b"),
        post(TEXT, {"prompt": ["a", "b"], "max_tokens": 1}),
        post(TEXT, {"prompt": [1, 2, 3], "max_tokens": 1}),
        post(TEXT, {"prompt": [[1], [2, 3]], "max_tokens": 1}),
        post(TEXT, {"prompt": "", "max_tokens": 1}),
        post(TEXT, {"prompt": [1.0, 2], "max_tokens": 2.0, "n": 1.0, "priority": -1.0}),
        b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
        b'5\r\n{"pro\r\n1c\r\nmpt": "hi", "max_tokens": 1}\r\n0\r\n\r\n',
    ],
)
@pytest.mark.asyncio
async def test_what_is_unusual_but_right_is_served(sent: bytes) -> None:
    async with running_router(num_simulated=1) as running:
        status, headers, body = await answer_to(running.router.door.server.port, sent)
    assert status == 200, body
    assert json.loads(body)["usage"]["completion_tokens"] >= 1
    assert headers["x-request-id"]
