"""What `rota bench` is told in small texts: lengths, classes, tenants."""

import math

from rota.base.errors import ConfigError
from rota.base.nearest import did_you_mean
from rota.cli.targets import slo_of
from rota.serving.bench.plan import LoadClass, TenantShare
from rota.serving.model.request import SLO, TenantId
from rota.serving.workload.arrivals import MAX_TOKENS
from rota.serving.workload.generator import Lengths

_CLASS_FACTS = ("name", "share", "priority", "tenant", "prompt", "output", "ttft", "tpot", "e2e")
_TARGETS = ("ttft", "tpot", "e2e")
_PRIORITY_MAX = 2**31 - 1


def lengths(flag: str, text: str) -> Lengths:
    """Lengths from `256`, or from quantiles such as `0=16,0.5=256,1=2048`."""
    if "=" not in text:
        number = _length(flag, text)
        return Lengths({"0": number, "1": number})
    quantiles: dict[str, int] = {}
    for part in text.split(","):
        at, _, value = part.strip().partition("=")
        if at in quantiles:
            raise ConfigError(f"{flag}: quantile {at} is given twice")
        quantiles[at] = _length(flag, value)
    try:
        return Lengths(quantiles)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}", hint="such as 0=16,0.5=256,1=2048") from None


def cap(flag: str, text: str | None) -> int | None:
    """A length that cuts those of a trace; None cuts none."""
    if text is None:
        return None
    if "=" in text:
        raise ConfigError(f"{flag}: with --trace this is one number, the largest length", hint="such as 1024")
    return _length(flag, text)


def load_class(text: str, promised: SLO) -> LoadClass:
    """A class from `name=high,share=0.1,priority=-1,tenant=a,ttft=500,prompt=64,output=16`.

    Targets that it does not name are those `promised` to all.
    """
    facts: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in _CLASS_FACTS:
            raise ConfigError(f"--class: unknown fact {name!r} in {text!r}", hint=did_you_mean(name, _CLASS_FACTS))
        if not equals or not value:
            raise ConfigError(f"--class: {name} has no value in {text!r}")
        if name in facts:
            raise ConfigError(f"--class: {name} is given twice in {text!r}")
        facts[name] = value
    if "name" not in facts:
        raise ConfigError(f"--class: no name in {text!r}", hint="such as name=high,share=0.1,priority=-1")
    own = [f"{target}={facts[target]}" for target in _TARGETS if target in facts]
    targets = slo_of("--class", ",".join(own)) if own else SLO()
    return LoadClass(
        name=facts["name"],
        share=_share("--class", facts.get("share", "1"), text),
        priority=_priority(facts["priority"], text) if "priority" in facts else None,
        tenant=_tenant("--class", facts["tenant"]) if "tenant" in facts else None,
        slo=SLO(*(getattr(targets, name) or getattr(promised, name) for name in _TARGETS)),
        prompt=lengths("--class: prompt", facts["prompt"]) if "prompt" in facts else None,
        output=lengths("--class: output", facts["output"]) if "output" in facts else None,
    )


def tenant_share(text: str) -> TenantShare:
    """A tenant from `NAME` or `NAME=SHARE`."""
    name, equals, share = text.partition("=")
    return TenantShare(_tenant("--tenant", name), _share("--tenant", share, text) if equals else 1.0)


def _length(flag: str, text: str) -> int:
    number = int(text) if text.strip().isdecimal() and len(text) < 20 else 0
    if not 1 <= number <= MAX_TOKENS:
        raise ConfigError(f"{flag}: {text!r} is not a whole number of tokens from 1 to {MAX_TOKENS}")
    return number


def _share(flag: str, text: str, whole: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise ConfigError(f"{flag}: share must be a number above 0, not {text!r}, in {whole!r}")
    return share


def _priority(text: str, whole: str) -> int:
    try:
        priority = int(text)
    except ValueError:
        priority = _PRIORITY_MAX + 1
    if abs(priority) > _PRIORITY_MAX:
        raise ConfigError(
            f"--class: priority must be a whole number, not {text!r}, in {whole!r}", hint="lower runs first"
        )
    return priority


def _tenant(flag: str, text: str) -> TenantId:
    if not text or not text.isascii() or not text.isprintable() or text != text.strip():
        raise ConfigError(f"{flag}: tenant {text!r} is not a name of printable ASCII characters")
    return TenantId(text)
