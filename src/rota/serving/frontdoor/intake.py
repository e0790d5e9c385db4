"""From an HTTP request to the facts that policies decide on, and to the call that an engine is sent."""

from rota.base.instant import Instant
from rota.serving.engines.engine import EngineCall, Headers
from rota.serving.frontdoor import prompts
from rota.serving.frontdoor.claims import check_identity
from rota.serving.frontdoor.exchange import HttpRequest
from rota.serving.frontdoor.identity import PRIORITY_HEADER, REQUEST_ID_HEADER, Identity, read_identity
from rota.serving.frontdoor.keys import AUTHORIZATION, KeyHolder
from rota.serving.frontdoor.problems import Problem
from rota.serving.frontdoor.reading import BodyReader, Reading
from rota.serving.model.request import Request, RequestId

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
        reader = self.reader(http, holder)
        return self.call(http, reader, reader.read(http.body), now)

    def reader(self, http: HttpRequest, holder: KeyHolder | None = None) -> BodyReader:
        """What reads the body of a request, whose head is checked here. Raises `Problem`."""
        _check_media_type(http)
        identity = read_identity(http.headers)
        if holder is not None:
            check_identity(holder, identity)
            identity = identity._replace(tenant=holder.tenant)
        return BodyReader(
            http.path, identity, holder, self._default_max_tokens, resume=self._resume, counts_text=self._counts_text
        )

    def call(self, http: HttpRequest, reader: BodyReader, reading: Reading, now: Instant) -> EngineCall:
        """Name a request whose body was read; it arrived at `now`."""
        identity = reader.identity
        request = Request(
            id=self._request_id(identity),
            arrived_at=now,
            num_prompt_tokens=reading.num_prompt_tokens,
            max_tokens=reading.max_tokens,
            priority=reading.priority,
            tenant=reading.tenant,
            program=reading.program,
            session=reading.session,
            slo=identity.slo,
            block_hashes=reading.block_hashes,
            hash_block_tokens=prompts.TOKENS_PER_BLOCK,
            declares_max_tokens=reading.declares_max_tokens,
            movable=reading.movable,
            text_counts=reading.text_counts,
        )
        return EngineCall(
            request=request,
            path=http.path,
            headers=_forwarded(
                http.headers, request, identity, _NOT_FORWARDED if reader.holder is None else _NOT_PAST_KEYS
            ),
            body=reading.body,
            stream=reading.stream,
            has_arguments=reading.has_arguments,
            num_arguments_bytes=reading.num_arguments_bytes,
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
