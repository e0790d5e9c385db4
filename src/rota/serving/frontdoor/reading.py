"""What the body of a request says, as far as the router goes by it, whichever process reads it."""

import msgspec

from rota.serving.frontdoor import bodies, prompts
from rota.serving.frontdoor.claims import check_class, granted_body, granted_salt
from rota.serving.frontdoor.identity import Identity
from rota.serving.frontdoor.keys import KeyHolder
from rota.serving.frontdoor.travel import chat_travels, completion_travels
from rota.serving.model.request import DEFAULT_TENANT, ProgramId, TenantId

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for text completions."""


class Reading(msgspec.Struct, frozen=True, gc=False):
    """What was read of a body."""

    num_prompt_tokens: int
    max_tokens: int
    declares_max_tokens: bool
    priority: int
    tenant: TenantId
    session: str | None
    program: ProgramId | None
    block_hashes: tuple[int, ...]
    movable: bool
    text_counts: tuple[int, ...]
    stream: bool
    has_arguments: bool
    """False where the body is known to have no `vllm_xargs`."""
    num_arguments_bytes: int
    """Up to the end of `vllm_xargs`, where the body begins with them; else 0."""
    body: bytes
    """As the engine is sent it."""


class BodyReader(msgspec.Struct, frozen=True):
    """Reads one body: what matters for that beside the body itself. `read` looks at nothing else, so that the answer is
    the same in another process."""

    path: str
    identity: Identity
    holder: KeyHolder | None
    default_max_tokens: int
    resume: bool
    counts_text: bool

    def read(self, raw: bytes) -> Reading:
        """Check a body and say what is in it. Raises `Problem`, which names what is wrong."""
        bodies.check_encoding(raw)
        holder, identity = self.holder, self.identity
        body: bodies.Body
        movable, num_arguments_bytes = False, 0
        counts: tuple[int, ...] = ()
        if self.path == CHAT:
            body, messages = bodies.read_chat(raw)
            prompt, tools = bytes(body.messages), bytes(body.tools)
            num_tokens = prompts.num_message_tokens(messages)
            declared = body.max_completion_tokens or body.max_tokens
            max_tokens = declared or self.default_max_tokens
            if body.stream and self.resume:
                movable = chat_travels(raw, messages)
            if self.counts_text:
                counts = prompts.message_counts(messages)
        else:
            body, parsed = bodies.read_completion(raw)
            prompt, tools = bytes(body.prompt), b""
            num_tokens = prompts.num_prompt_tokens(parsed)
            declared = body.max_tokens or DEFAULT_COMPLETION_TOKENS
            max_tokens = declared
            if body.stream and self.resume:
                movable = completion_travels(raw, parsed)
            if self.counts_text:
                counts = prompts.prompt_counts(parsed)
        priority, salt = _priority(identity, body), body.cache_salt
        session, program = _session(identity, body), _program(identity, body)
        if holder is not None:
            check_class(holder, identity, priority)
            salt = granted_salt(holder, salt)
            raw, num_arguments_bytes = granted_body(raw, holder, salt)
            # Two tenants may use one name for different things.
            session = None if session is None else f"{holder.tenant}/{session}"
            program = None if program is None else ProgramId(f"{holder.tenant}/{program}")
        return Reading(
            num_prompt_tokens=num_tokens,
            max_tokens=int(max_tokens),
            declares_max_tokens=declared is not None,
            priority=priority,
            tenant=_tenant(identity, body),
            session=session,
            program=program,
            block_hashes=prompts.block_hashes(
                prompt, num_tokens, (body.model or "").encode(), (salt or "").encode(), tools
            ),
            movable=movable,
            text_counts=counts,
            stream=bool(body.stream),
            has_arguments=holder is not None or body.vllm_xargs is not msgspec.UNSET,
            num_arguments_bytes=num_arguments_bytes,
            body=raw,
        )


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
