"""Who asks, how urgent it is and what was promised: the header names that the field already uses, read and checked.

| Header | Meaning |
|---|---|
| `x-gateway-inference-fairness-id` | tenant (llm-d, GIE) |
| `x-gateway-inference-objective` | class, **higher is more urgent** (llm-d, GIE): `priority = -objective` |
| `x-vllm-priority` | class, lower first (vLLM) |
| `x-session-id`, `x-dynamo-session-id` | session (vLLM, Dynamo) |
| `x-dynamo-trajectory-id` | program (Dynamo) |
| `x-slo-ttft-ms`, `x-slo-tpot-ms` | targets (llm-d) |
| `x-request-id` | the client's name for the request, kept as the beginning of ours |

A header outranks the body field of the same meaning, as in vLLM: gateways write headers, clients write bodies.
"""

import math
import re
from typing import NamedTuple

from rota.base.instant import Duration, milliseconds
from rota.serving.frontdoor.exchange import Headers
from rota.serving.frontdoor.problems import Problem
from rota.serving.model.request import SLO

PRIORITY_HEADER = b"x-vllm-priority"
REQUEST_ID_HEADER = b"x-request-id"
TENANT_HEADER = b"x-gateway-inference-fairness-id"
_OBJECTIVE = b"x-gateway-inference-objective"
_SESSION = b"x-session-id"
_DYNAMO_SESSION = b"x-dynamo-session-id"
_PROGRAM = b"x-dynamo-trajectory-id"
_TTFT = b"x-slo-ttft-ms"
_TPOT = b"x-slo-tpot-ms"
_KNOWN = frozenset(
    {
        PRIORITY_HEADER,
        REQUEST_ID_HEADER,
        TENANT_HEADER,
        _OBJECTIVE,
        _SESSION,
        _DYNAMO_SESSION,
        _PROGRAM,
        _TTFT,
        _TPOT,
    }
)

_INTEGER = re.compile(rb"[+-]?[0-9]{1,10}")
_PRINTABLE = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_NAME_BYTES_MAX = 256
_PRIORITY_MAX = 2**31 - 1
_TARGET_MS_MAX = 86_400_000.0


class Identity(NamedTuple):
    """What the headers say. None where they say nothing."""

    priority: int | None = None
    tenant: str | None = None
    session: str | None = None
    program: str | None = None
    slo: SLO = SLO()
    client_request_id: str | None = None
    priority_header: str = ""
    """Which header the class came by, if it came by one."""


NOBODY = Identity()


def read_identity(headers: Headers) -> Identity:
    """Read the identity headers. Raises `Problem` (400) that names the header."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _KNOWN:
            if name in found:
                raise _bad(name, "is given more than once")
            found[name] = value
    if not found:
        return NOBODY
    return Identity(
        priority=_priority(found),
        tenant=_name(found, TENANT_HEADER),
        session=_name(found, _SESSION) or _name(found, _DYNAMO_SESSION),
        program=_name(found, _PROGRAM),
        slo=SLO(ttft=_target(found, _TTFT), tpot=_target(found, _TPOT)),
        client_request_id=_name(found, REQUEST_ID_HEADER),
        priority_header=(_OBJECTIVE if _OBJECTIVE in found else PRIORITY_HEADER).decode(),
    )


def _priority(found: dict[bytes, bytes]) -> int | None:
    objective = _integer(found, _OBJECTIVE)
    return _integer(found, PRIORITY_HEADER) if objective is None else -objective


def _integer(found: dict[bytes, bytes], name: bytes) -> int | None:
    text = found.get(name)
    if text is None:
        return None
    if not _INTEGER.fullmatch(text) or abs(int(text)) > _PRIORITY_MAX:
        raise _bad(name, f"must be an integer from -{_PRIORITY_MAX} to {_PRIORITY_MAX}")
    return int(text)


def _name(found: dict[bytes, bytes], name: bytes) -> str | None:
    text = found.get(name)
    if text is None:
        return None
    if len(text) > _NAME_BYTES_MAX or not _PRINTABLE.fullmatch(text):
        raise _bad(name, f"must be 1 to {_NAME_BYTES_MAX} printable ASCII characters")
    return text.decode("ascii")


def _target(found: dict[bytes, bytes], name: bytes) -> Duration | None:
    text = found.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _TARGET_MS_MAX:
        raise _bad(name, "must be a number of milliseconds, more than 0 and at most a day")
    return milliseconds(value)


def _bad(name: bytes, what: str) -> Problem:
    header = name.decode()
    return Problem(400, f"header {header} {what}", param=header, code="invalid_header")
