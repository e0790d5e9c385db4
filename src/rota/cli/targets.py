"""What the command line takes in one word: targets such as `ttft=500ms,tpot=50ms,e2e=10s`, where a bare number is in
milliseconds, and roles such as `prefill:2,decode:6`."""

import math

from rota.base.errors import ConfigError
from rota.base.instant import milliseconds
from rota.base.nearest import did_you_mean
from rota.cli.flags import at_least
from rota.serving.model.instance import Role
from rota.serving.model.request import SLO

_NAMES = ("ttft", "tpot", "e2e")
_INSTANCES_MAX = 10_000
_UNITS = {"ms": 1.0, "s": 1000.0, "": 1.0}


def slo_of(flag: str, text: str | None) -> SLO:
    """Parse targets; none are promised if `text` is None. Raises `ConfigError` that begins with the flag."""
    targets = {}
    for part in (text or "").split(",") if text is not None else ():
        name, equals, value = part.strip().partition("=")
        if not equals:
            raise ConfigError(f"{flag}: {part.strip()!r} is not of the form name=milliseconds", hint="such as ttft=500")
        if name not in _NAMES:
            raise ConfigError(f"{flag}: unknown target {name!r}", hint=did_you_mean(name, _NAMES))
        if name in targets:
            raise ConfigError(f"{flag}: {name} is given twice")
        digits = value.strip().rstrip("ms")
        try:
            number = float(digits) * _UNITS[value.strip()[len(digits) :]]
        except (KeyError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise ConfigError(f"{flag}: {name} must be a number of milliseconds above 0, not {value!r}")
        targets[name] = milliseconds(number)
    return SLO(**targets)


def roles_of(flag: str, text: str) -> tuple[Role, ...]:
    """Parse the roles of a fleet, such as `prefill:2,decode:6`: one an instance, in the order given. Raises
    `ConfigError` that begins with the flag."""
    roles: list[Role] = []
    for part in text.split(","):
        name, colon, count = part.strip().partition(":")
        if name not in list(Role):
            raise ConfigError(f"{flag}: unknown role {name!r}", hint=did_you_mean(name, [str(role) for role in Role]))
        if not colon or not (count.isascii() and count.isdigit() and 1 <= int(count) <= _INSTANCES_MAX):
            raise ConfigError(
                f"{flag}: {name} needs a number of instances from 1 to {_INSTANCES_MAX:,}, not {count!r}",
                hint="such as prefill:2,decode:6",
            )
        if Role(name) in roles:
            raise ConfigError(f"{flag}: {name} is given twice")
        roles += [Role(name)] * int(count)
    return tuple(roles)


def fleet_of(instances: int | None, roles: str | None, *, default: int) -> tuple[Role, ...]:
    """One role an instance, as `--instances` and `--roles` have it. Raises `ConfigError` where they disagree."""
    if roles is None:
        return (Role.MIXED,) * at_least("--instances", default if instances is None else instances, 1)
    given = roles_of("--roles", roles)
    if instances not in (None, len(given)):
        raise ConfigError(f"--roles: gives {len(given)} instances, and --instances says {instances}")
    return given


def promise_of(flag: str, text: str) -> tuple[SLO, float]:
    """Parse targets and the share of requests that must meet them all: `attainment=99%`, which is also what it is
    unless said. Raises `ConfigError` that begins with the flag."""
    parts = [part.strip() for part in text.split(",")]
    shares = [part.partition("=")[2].strip() for part in parts if part.startswith("attainment=")]
    targets = [part for part in parts if not part.startswith("attainment=")]
    if not targets:
        raise ConfigError(f"{flag}: promises nothing", hint="such as ttft=500ms,tpot=50ms,attainment=99%")
    if len(shares) > 1:
        raise ConfigError(f"{flag}: attainment is given twice")
    share = shares[0] if shares else "99%"
    try:
        value = float(share.removesuffix("%")) / (100.0 if share.endswith("%") else 1.0)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ConfigError(
            f"{flag}: attainment must be a share above 0 and at most 1, not {share!r}", hint="such as 99%"
        )
    return slo_of(flag, ",".join(targets)), value
