"""What a request may claim, where it came with a key: no other tenant's name, no class above its ceiling, nobody else's
cached blocks.

What contradicts the key is refused and named, not silently corrected: whoever asks for class -5 and gets 0 would look
for the fault elsewhere.
"""

from hashlib import sha256

import msgspec

from rota.serving.engines.vllm.arguments import THE_ROUTERS
from rota.serving.frontdoor.identity import TENANT_HEADER, Identity
from rota.serving.frontdoor.keys import KeyHolder
from rota.serving.frontdoor.problems import Problem

_XARGS, _SALT, _BLOCKS = "vllm_xargs", "cache_salt", "kv_transfer_params"

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_extra = msgspec.json.Decoder(dict[str, msgspec.Raw] | None).decode
_value = msgspec.json.Decoder(object).decode


def check_identity(holder: KeyHolder, identity: Identity) -> None:
    """Raise `Problem` (403) where the headers name a tenant that is not the key's."""
    if identity.tenant is not None and identity.tenant != holder.tenant:
        raise _refused(TENANT_HEADER.decode(), f"the key is of tenant {holder.tenant!r}, not of {identity.tenant!r}")


def check_class(holder: KeyHolder, identity: Identity, priority: int) -> None:
    """Raise `Problem` (403) where a request asks for a class that is more urgent than its key allows."""
    ceiling = holder.terms.class_ceiling
    if priority < ceiling:
        spot = "priority" if identity.priority is None else identity.priority_header
        raise _refused(
            spot, f"class {priority} is more urgent than {ceiling}, the most urgent that the key may ask for"
        )


def granted_salt(holder: KeyHolder, salt: str | None) -> str | None:
    """The cache salt that engines and the router's index are given: with a client's own, or where the tenant's cache is
    isolated, one that no request of another tenant can have. None where the cache is shared."""
    if not salt and not holder.terms.isolate_cache:
        return None
    tenant = holder.tenant.encode()
    return sha256(b"%d:%b%b" % (len(tenant), tenant, (salt or "").encode("utf-8", "surrogatepass"))).hexdigest()


def granted_body(raw: bytes, holder: KeyHolder, salt: str | None) -> tuple[bytes, int]:
    """The body as the engine is sent it, with the tenant and the salt of the key in it, and each field once: of a field
    that was there twice an engine could have read the other one. Raises `Problem` (403) where it names another tenant,
    blocks of KV to pull, which could be anybody's, or what is the router's to say. Its `vllm_xargs` come first, so that
    an engine can be told more there without a look at the rest; returned beside it is where they end, in bytes."""
    fields = _fields(raw)
    extra = (_extra(fields[_XARGS]) if _XARGS in fields else None) or {}
    for spot, place in (("", fields), (f"{_XARGS}.", extra)):
        if _BLOCKS in place:
            raise _refused(spot + _BLOCKS, "blocks of other requests are not a client's to name")
    for name in THE_ROUTERS:
        if name in extra:
            raise _refused(f"{_XARGS}.{name}", f"{name} is the router's to say")
    if "tenant" in extra and _value(extra["tenant"]) != holder.tenant:
        raise _refused(f"{_XARGS}.tenant", f"the key is of tenant {holder.tenant!r}")
    extra["tenant"] = msgspec.Raw(msgspec.json.encode(holder.tenant))
    granted = {_XARGS: msgspec.Raw(msgspec.json.encode(extra))}
    num_arguments_bytes = len(msgspec.json.encode(granted)) - 1
    fields.pop(_XARGS, None)
    if salt is not None:
        fields[_SALT] = msgspec.Raw(msgspec.json.encode(salt))
    return msgspec.json.encode({**granted, **fields}), num_arguments_bytes


def _refused(param: str, why: str) -> Problem:
    return Problem(403, why, param=param, code="not_granted")
