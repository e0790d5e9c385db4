"""Checks of parameters that many policies have."""

from rota.base.errors import ConfigError


def at_least_one(policy: str, **numbers: float | None) -> None:
    """Raise `ConfigError` naming the parameter that is below 1; None is fine."""
    for name, number in numbers.items():
        if number is not None and not number >= 1:
            raise ConfigError(f"{policy}: {name} must be at least 1, not {number}")


def above_zero(policy: str, **numbers: float | None) -> None:
    """Raise `ConfigError` naming the parameter that is not above 0; None is fine."""
    for name, number in numbers.items():
        if number is not None and not 0 < number < float("inf"):
            raise ConfigError(f"{policy}: {name} must be above 0, not {number}")
