"""What the router tells our scheduler inside vLLM of a request, beside what the client wrote: whose it is, what was
promised, and for how long it is under way. vLLM hands the free arguments of a body (`vllm_xargs`) to its scheduler, and
drops every header but the class.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from rota.base.instant import NANOSECONDS_PER_MILLISECOND, Duration, milliseconds
from rota.serving.engines.engine import EngineCall
from rota.serving.model.request import DEFAULT_TENANT, SLO, TenantId
from rota.serving.model.text_counts import TEXT_COUNTS

_TENANT, _TTFT, _TPOT, _WAITED, _COUNTS = "tenant", "slo_ttft_ms", "slo_tpot_ms", "waited_ms", "text_counts"
THE_ROUTERS = (_WAITED, _COUNTS)
"""What no client can know: whoever says to have waited for long would be served first where waiting counts."""
_XARGS = "vllm_xargs"
_MOST_MS = 86_400_000.0
"""A day, as for the headers."""


class _First(msgspec.Struct):
    vllm_xargs: dict[str, msgspec.Raw]


_first = msgspec.json.Decoder(_First).decode
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_extra = msgspec.json.Decoder(dict[str, msgspec.Raw] | None).decode


class Arguments(msgspec.Struct, frozen=True):
    """What a request's free arguments say."""

    tenant: TenantId = DEFAULT_TENANT
    slo: SLO = SLO()
    waited: Duration = Duration(0)
    """From its arrival at the router until it was sent on."""
    text_counts: tuple[int, ...] = ()


def with_arguments(call: EngineCall) -> tuple[bytes, bytes | memoryview]:
    """The body of a call with what is known of its request in the free arguments; the body itself if there is nothing
    to say. What the client wrote there stays, unless it has the same name. In two parts, the second being of the body
    as it is where that can be: a large one is not copied."""
    request = call.request
    told: dict[str, str | float | tuple[int, ...]] = {}
    if request.tenant != DEFAULT_TENANT:
        told[_TENANT] = request.tenant
    for name, duration in ((_TTFT, request.slo.ttft), (_TPOT, request.slo.tpot), (_WAITED, call.waited or None)):
        if duration is not None:
            told[name] = duration / NANOSECONDS_PER_MILLISECOND
    if request.text_counts:
        told[_COUNTS] = request.text_counts
    if not told:
        return b"", call.body
    if not call.has_arguments:
        begin = call.body.index(b"{") + 1
        return b'{"vllm_xargs":%b,' % msgspec.json.encode(told), memoryview(call.body)[begin:]
    if call.num_arguments_bytes:
        own = _first(call.body[: call.num_arguments_bytes] + b"}").vllm_xargs
        merged = msgspec.json.encode({_XARGS: {**own, **told}})
        return merged[:-1], memoryview(call.body)[call.num_arguments_bytes :]
    fields = _fields(call.body)
    extra: dict[str, Any] = (_extra(fields[_XARGS]) if _XARGS in fields else None) or {}
    return b"", msgspec.json.encode({**fields, _XARGS: {**extra, **told}})


def read_arguments(extra: Mapping[str, Any] | None) -> Arguments:
    """The free arguments as vLLM has them. Clients can write them, too: what makes no sense is not there."""
    if not extra:
        return _NONE
    return Arguments(
        tenant=TenantId(str(extra.get(_TENANT, DEFAULT_TENANT))),
        slo=SLO(ttft=_duration(extra.get(_TTFT)), tpot=_duration(extra.get(_TPOT))),
        waited=_duration(extra.get(_WAITED)) or Duration(0),
        text_counts=_counts(extra.get(_COUNTS)),
    )


def _duration(value: Any) -> Duration | None:
    if isinstance(value, int | float) and 0 < value <= _MOST_MS:
        return milliseconds(value)
    return None


def _counts(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != len(TEXT_COUNTS):
        return ()
    return tuple(value) if all(type(each) is int and 0 <= each < 2**31 for each in value) else ()


_NONE = Arguments()
