"""Who may ask: a file of hashed API keys, and what each key grants.

```toml
[tenants.research]
weight = 2.0
class_ceiling = -1
tokens_per_minute = 60_000
on_limit = "queue"

[[keys]]
tenant = "research"
sha256 = "…"
```

Keys are hashed with SHA-256, not with scrypt: `rota keys new` draws 256 random bits, which nobody guesses however cheap
a guess is, and a slow hash at the door would let anybody spend the router's CPU with wrong keys. A key that somebody
thought up himself does not have that strength. Nothing but the hash is kept, so neither this process nor its file can
tell a key.
"""

import base64
import hmac
import inspect
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from rota.base.config import load_toml
from rota.base.errors import ConfigError
from rota.serving.frontdoor.exchange import Headers
from rota.serving.frontdoor.problems import Problem
from rota.serving.model.request import TenantId
from rota.serving.stack import REGISTRIES, StackConfig

AUTHORIZATION = b"authorization"
KEY_PREFIX = "rota-"
"""So that a key which got out is known for one, by people and by scanners of repositories."""

_INDEX_BYTES = 4
_NO_DIGEST = bytes(32)
_SCHEME = b"bearer "

_Positive = Annotated[int, msgspec.Meta(ge=1)]


class TenantTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a tenant may have. A tenant without a table of its own has the defaults."""

    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Its share, where the stack shares by weight."""
    class_ceiling: int = 0
    """The most urgent class that it may ask for; lower is more urgent."""
    isolate_cache: bool = False
    """Whether what it sent is found in prefix caches by itself alone."""
    max_unfinished: _Positive | None = None
    """Requests of it that may be unfinished at once; None is what the admission policy gives everybody."""
    tokens_per_minute: _Positive | None = None
    """Prompt and output tokens; None is what the admission policy gives everybody."""
    on_limit: Literal["refuse", "queue"] | None = None
    """What becomes of what comes too early."""
    requests_per_minute: _Positive | None = None
    """Requests that are looked at, whatever the admission policy; None is as many as come."""
    max_body_bytes: _Positive | None = None
    """The largest body that it may send; None is what everybody may."""

    def limits(self) -> dict[str, int | str]:
        """Those limits that are set, as an admission policy takes them."""
        named = {name: getattr(self, name) for name in ("max_unfinished", "tokens_per_minute", "on_limit")}
        return {name: value for name, value in named.items() if value is not None}


class KeyLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key, by its hash."""

    tenant: Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern="^[!-~]([ -~]*[!-~])?$")]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    operator: bool = False
    """Whether it may read `/metrics` and the whole of `/health`."""


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file of keys says."""

    tenants: dict[str, TenantTerms] = {}
    keys: list[KeyLine] = []


class KeyHolder(msgspec.Struct, frozen=True):
    """What one key gives whoever has it."""

    tenant: TenantId
    terms: TenantTerms
    operator: bool = False

    @property
    def max_body_bytes(self) -> int | None:
        return self.terms.max_body_bytes


class KeyRing:
    """Recognises keys. Holds hashes only."""

    def __init__(self, file: KeyFile) -> None:
        """Raises `ConfigError` for a hash that is there twice, and for a tenant with terms and no key."""
        self._by_index = _by_index(file)

    def replace(self, file: KeyFile) -> bool:
        """Recognise the keys of another file instead, all at once; whether that changed anything. Raises as when it is
        made, and then nothing changed."""
        before, self._by_index = self._by_index, _by_index(file)
        return before != self._by_index

    def tenants(self) -> set[TenantId]:
        """Whose keys they are."""
        return {holder.tenant for bucket in self._by_index.values() for _, holder in bucket}

    def find(self, key: bytes) -> KeyHolder | None:
        """What a key grants; None for one that is unknown. The hashes are compared in constant time: which one is
        compared follows from a few bits of a hash, of which nobody can choose the key."""
        digest = sha256(key).digest()
        found = None
        for known, holder in self._by_index.get(digest[:_INDEX_BYTES], ((_NO_DIGEST, None),)):
            if hmac.compare_digest(known, digest):
                found = holder
        return found

    def identify(self, headers: Headers) -> KeyHolder:
        """What the key in `Authorization: Bearer …` grants. Raises `Problem` (401) where there is none that is
        known."""
        given = [value for name, value in headers if name == AUTHORIZATION]
        if len(given) != 1 or given[0][: len(_SCHEME)].lower() != _SCHEME:
            what = "more than one API key was given" if len(given) > 1 else "no API key was given"
            raise Problem(
                401,
                f"{what}: send it as 'Authorization: Bearer KEY'",
                param=AUTHORIZATION.decode(),
                code="missing_api_key",
            )
        holder = self.find(given[0][len(_SCHEME) :].strip())
        if holder is None:
            raise Problem(401, "the API key is not known here", param=AUTHORIZATION.decode(), code="invalid_api_key")
        return holder


def _by_index(file: KeyFile) -> dict[bytes, list[tuple[bytes, KeyHolder]]]:
    found: dict[bytes, list[tuple[bytes, KeyHolder]]] = {}
    seen: set[str] = set()
    for line in file.keys:
        if line.sha256 in seen:
            raise ConfigError(f"keys: the key with sha256 {line.sha256[:8]}… is there twice")
        seen.add(line.sha256)
        digest = bytes.fromhex(line.sha256)
        holder = KeyHolder(TenantId(line.tenant), file.tenants.get(line.tenant, TenantTerms()), line.operator)
        found.setdefault(digest[:_INDEX_BYTES], []).append((digest, holder))
    unreachable = sorted(file.tenants.keys() - {line.tenant for line in file.keys})
    if unreachable:
        raise ConfigError(
            f"tenants.{unreachable[0]}: no key is of this tenant",
            hint=f"rota keys new --tenant {unreachable[0]}, or take the table out",
        )
    return found


def load_keys(path: Path) -> KeyFile:
    """Read a file of keys. Raises `ConfigError` naming file, line and key; one without keys would let nobody in."""
    file = load_toml(path, KeyFile)
    if not file.keys:
        raise ConfigError(f"{path}: there is no key in it", hint=f"rota keys new --tenant NAME --keys {path}")
    try:
        KeyRing(file)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from None
    return file


def new_key() -> tuple[str, str]:
    """A key that nobody can guess, and its hash as the file holds it."""
    key = KEY_PREFIX + base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()
    return key, sha256(key.encode()).hexdigest()


def weights_of(file: KeyFile) -> Mapping[str, float]:
    """The shares of those tenants that have one of their own."""
    return {tenant: terms.weight for tenant, terms in file.tenants.items() if terms.weight != 1.0}


def limits_of(file: KeyFile) -> Mapping[str, Mapping[str, int | str]]:
    """The limits of those tenants that have any."""
    return {tenant: limits for tenant, terms in file.tenants.items() if (limits := terms.limits())}


def granted_stack(stack: StackConfig, file: KeyFile) -> StackConfig:
    """The stack whose policies know the tenants' weights and limits: those that take `weights` (order, dispatch) or
    `tenants` (admission). Raises `ConfigError` where a tenant has what no policy of the stack looks at, or where the
    stack file says the same."""
    parameters = stack.parameters
    wanted = (("weight", "weights", ("order", "dispatch"), weights_of(file)),
              ("limits", "tenants", ("admission",), limits_of(file)))  # fmt: skip
    for word, parameter, kinds, values in wanted:
        if not values:
            continue
        takers = [kind for kind in kinds if parameter in _parameters_of(kind, getattr(stack, kind))]
        if not takers:
            names = " and ".join(f"{kind} {getattr(stack, kind)!r}" for kind in kinds)
            able = [f'{kind} = "{name}"' for kind in kinds for name in REGISTRIES[kind].names()
                    if parameter in _parameters_of(kind, name)]  # fmt: skip
            raise ConfigError(
                f"tenants.{min(values)}: it has {word} of its own, which {names} would not look at",
                hint=f"in the stack file: {' or '.join(able)}",
            )
        for kind in takers:
            table = getattr(parameters, kind)
            if parameter in table:
                raise ConfigError(
                    f"stack: parameters.{kind}.{parameter}: the keys say this for tenant {min(values)!r}",
                    hint="say it in one place: take it out of the stack file",
                )
            parameters = msgspec.structs.replace(parameters, **{kind: {**table, parameter: dict(values)}})
    return msgspec.structs.replace(stack, parameters=parameters)


def _parameters_of(kind: str, name: str) -> Mapping[str, object]:
    return inspect.signature(REGISTRIES[kind].load(name, where=f"stack: {kind}")).parameters
