"""Raw requests and answers, with the keys of three tenants."""

import asyncio
import json
from hashlib import sha256
from typing import Any

from rota.serving.frontdoor.keys import KeyFile, KeyLine, TenantTerms

CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
ALICE, BOB, OPERATOR = "rota-alices", "rota-bobs", "rota-operators"


def keys_of_three(**terms: TenantTerms) -> KeyFile:
    """The keys of alice, who may ask for class -5, of bob, whose cache is his own, and of an operator."""
    tenants = {"alice": TenantTerms(class_ceiling=-5), "bob": TenantTerms(isolate_cache=True), **terms}
    named = {"alice": ALICE, "bob": BOB, "ops": OPERATOR}
    lines = [KeyLine(who, sha256(key.encode()).hexdigest(), operator=who == "ops") for who, key in named.items()]
    return KeyFile(tenants, lines)


def post(body: bytes | dict[str, Any], *headers: str, path: str = CHAT, key: str | None = ALICE) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: t", f"content-length: {len(raw)}", "content-type: application/json"]
    lines += [*([] if key is None else [f"authorization: Bearer {key}"]), *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: t", *headers]).encode() + b"\r\n\r\n"


async def answer_to(port: int, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to some bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        status_line, *lines = head.decode("latin-1").strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await asyncio.wait_for(reader.readexactly(int(headers["content-length"])), 20)
        return int(status_line.split()[1]), headers, body
    finally:
        writer.close()


async def error_to(port: int, sent: bytes) -> tuple[int, str | None, str | None]:
    """Status, `param` and `code` of the error that some bytes are answered with."""
    status, _, body = await answer_to(port, sent)
    error = json.loads(body).get("error", {})
    return status, error.get("param"), error.get("code")
