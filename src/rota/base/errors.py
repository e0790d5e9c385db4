"""The one error root. Every member says what is wrong and, where it can, what to do about it."""


class RotaError(Exception):
    """Root of all errors that a user may meet.

    `hint` is one sentence that says what to try; the command line prints it after `hint:`.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(RotaError):
    """A configuration file, table or flag that cannot be used; the message names the spot."""


class DataError(RotaError):
    """Input data (a trace, a profile, a journal) that cannot be read; names file, line and column."""


class LawBroken(RotaError):
    """An invariant of docs/invariants.md does not hold: a bug in Rota or in a plug-in, never in user input."""


class IllegalMove(LawBroken):
    """A lifecycle was asked for a transition that its table does not list."""


class PolicyError(RotaError):
    """A policy asked for something that its draft cannot grant, or broke its contract."""


class CapabilityError(RotaError):
    """A policy needs something that the engine it was assembled with cannot do."""


class StarvationError(RotaError):
    """Work is left and nothing will ever wake the system up again; the message says who starves."""


class EngineError(RotaError):
    """An engine process or server did not do what it was asked to."""
