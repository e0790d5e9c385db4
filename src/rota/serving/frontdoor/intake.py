"""From an HTTP request to the facts that policies decide on, and to the call that an engine is sent."""

import msgspec

from rota.base.instant import Instant
from rota.serving.engines.engine import EngineCall, Headers
from rota.serving.frontdoor import bodies, prompts
from rota.serving.frontdoor.claims import check_class, check_identity, granted_body, granted_salt
from rota.serving.frontdoor.exchange import HttpRequest
from rota.serving.frontdoor.identity import PRIORITY_HEADER, REQUEST_ID_HEADER, Identity, read_identity
from rota.serving.frontdoor.keys import AUTHORIZATION, KeyHolder
from rota.serving.frontdoor.problems import Problem
from rota.serving.frontdoor.travel import chat_travels, completion_travels
from rota.serving.model.request import DEFAULT_TENANT, ProgramId, Request, RequestId, TenantId

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for text completions."""

_JSON = b"application/json"
_NOT_FORWARDED = frozenset(
    {
        # Those of the connection itself (RFC 9110, 7.6.1), and those that are written anew.
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"host",
        b"content-length",
        b"expect",
        # Answers pass through unparsed, so they are asked for in plain bytes.
        b"accept-encoding",
        REQUEST_ID_HEADER,
    }
)
_NOT_PAST_KEYS = _NOT_FORWARDED | {AUTHORIZATION, b"cookie", b"x-data-parallel-rank"}
"""Where keys are asked for: the key stays here, and which part of an engine serves a request is not the client's
choice."""


class Intake:
    """Reads requests and names them. One for each front door."""

    def __init__(
        self, *, name: str, default_max_tokens: int = 1024, resume: bool = True, counts_text: bool = False
    ) -> None:
        """`name` distinguishes the request ids of this run; `default_max_tokens` is what policies are told where the
        client set no limit for a chat, and is not sent to the engine. Without `resume` every request stays where it
        began. With `counts_text` requests carry what was counted of their text."""
        self._name = name
        self._default_max_tokens = default_max_tokens
        self._resume = resume
        self._counts_text = counts_text
        self._num_requests = 0

    def read(self, http: HttpRequest, now: Instant, holder: KeyHolder | None = None) -> EngineCall:
        """Check a request to one of the two endpoints. With a `holder` the tenant is that of its key, and what the
        request claims beyond it is refused. Raises `Problem`, which names what is wrong."""
        _check_media_type(http)
        bodies.check_encoding(http.body)
        identity = read_identity(http.headers)
        if holder is not None:
            check_identity(holder, identity)
            identity = identity._replace(tenant=holder.tenant)
        body: bodies.Body
        movable = False
        counts: tuple[int, ...] = ()
        if http.path == CHAT:
            body, messages = bodies.read_chat(http.body)
            prompt, tools = bytes(body.messages), bytes(body.tools)
            num_tokens = prompts.num_message_tokens(messages)
            declared = body.max_completion_tokens or body.max_tokens
            max_tokens = declared or self._default_max_tokens
            if body.stream and self._resume:
                movable = chat_travels(http.body, messages)
            if self._counts_text:
                counts = prompts.message_counts(messages)
        else:
            body, parsed = bodies.read_completion(http.body)
            prompt, tools = bytes(body.prompt), b""
            num_tokens = prompts.num_prompt_tokens(parsed)
            declared = body.max_tokens or DEFAULT_COMPLETION_TOKENS
            max_tokens = declared
            if body.stream and self._resume:
                movable = completion_travels(http.body, parsed)
            if self._counts_text:
                counts = prompts.prompt_counts(parsed)
        priority, salt, raw = _priority(identity, body), body.cache_salt, http.body
        session, program = _session(identity, body), _program(identity, body)
        if holder is not None:
            check_class(holder, identity, priority)
            salt = granted_salt(holder, salt)
            raw = granted_body(raw, holder, salt)
            # Two tenants may use one name for different things.
            session = None if session is None else f"{holder.tenant}/{session}"
            program = None if program is None else ProgramId(f"{holder.tenant}/{program}")
        request = Request(
            id=self._request_id(identity),
            arrived_at=now,
            num_prompt_tokens=num_tokens,
            max_tokens=int(max_tokens),
            priority=priority,
            tenant=_tenant(identity, body),
            program=program,
            session=session,
            slo=identity.slo,
            block_hashes=prompts.block_hashes(
                prompt, num_tokens, (body.model or "").encode(), (salt or "").encode(), tools
            ),
            hash_block_tokens=prompts.TOKENS_PER_BLOCK,
            declares_max_tokens=declared is not None,
            movable=movable,
            text_counts=counts,
        )
        return EngineCall(
            request=request,
            path=http.path,
            headers=_forwarded(http.headers, request, identity, _NOT_FORWARDED if holder is None else _NOT_PAST_KEYS),
            body=raw,
            stream=bool(body.stream),
            has_arguments=holder is not None or body.vllm_xargs is not msgspec.UNSET,
        )

    def _request_id(self, identity: Identity) -> RequestId:
        # A number of our own at the end: clients repeat their ids, and an answer must belong to one request.
        self._num_requests += 1
        return RequestId(f"{identity.client_request_id or 'req'}-{self._name}-{self._num_requests}")


def _check_media_type(http: HttpRequest) -> None:
    media_type = http.header(b"content-type")
    if media_type != _JSON:
        plain = (media_type or b"").split(b";")[0].strip().lower()
        if plain != _JSON:
            given = plain.decode("latin-1") or "nothing"
            raise Problem(415, f"content-type must be application/json, not {given}", param="content-type")
    encoding = http.header(b"content-encoding")
    if encoding is not None and encoding.strip().lower() != b"identity":
        raise Problem(415, "compressed request bodies are not understood", param="content-encoding")


def _priority(identity: Identity, body: bodies.Body) -> int:
    return identity.priority if identity.priority is not None else int(body.priority or 0)


def _tenant(identity: Identity, body: bodies.Body) -> TenantId:
    tenant = identity.tenant or (body.vllm_xargs.tenant if body.vllm_xargs else None)
    return TenantId(tenant) if tenant else DEFAULT_TENANT


def _session(identity: Identity, body: bodies.Body) -> str | None:
    return identity.session or body.session_id or (body.vllm_xargs.session_id if body.vllm_xargs else None)


def _program(identity: Identity, body: bodies.Body) -> ProgramId | None:
    context = body.vllm_xargs.agentic_context if body.vllm_xargs else None
    program = identity.program or (context.program_id if context else None)
    return ProgramId(program) if program else None


def _forwarded(headers: Headers, request: Request, identity: Identity, dropped: frozenset[bytes]) -> Headers:
    named = [value for name, value in headers if name == b"connection"]
    if named:  # A client may name further headers of the connection.
        names = b",".join(named).lower().split(b",")
        dropped = dropped.union(name.strip() for name in names)
    forwarded = [header for header in headers if header[0] not in dropped]
    forwarded.append((REQUEST_ID_HEADER, request.id.encode()))
    if identity.priority is not None:
        # vLLM reads this header ahead of the body's field, so that the body need not be written anew.
        forwarded = [header for header in forwarded if header[0] != PRIORITY_HEADER]
        forwarded.append((PRIORITY_HEADER, b"%d" % identity.priority))
    return forwarded
