"""What a profile that was fitted to a live engine says of that engine, of the data, and of its own error."""

import msgspec

from rota.serving.api import InstanceLimits


class PhaseError(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Errors of predicted step times on steps that were held out, as shares of the measured times."""

    phase: str
    """`all`, `decode` (no prefill in the step), `prefill` (no decode) or `mixed`."""
    num_steps: int
    mape: float
    """Mean absolute error."""
    p90: float
    """Nine steps of ten err less."""
    bias: float
    """Of the sum of all times: above 0, the prediction is too slow."""


class FrontEnd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What lies between a client and the engine's steps (HTTP, tokenising, detokenising), in ms: medians."""

    request_ms: float
    """From sending until the scheduler of an idle engine has it."""
    response_ms: float
    """From the end of a step until its token is with the client."""
    num_requests: int

    @property
    def total_ms(self) -> float:
        """Both ways."""
        return self.request_ms + self.response_ms


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a profile was fitted, to what, and what it is worth."""

    engine: str
    model: str
    device: str
    dtype: str
    date: str
    """As the host that fitted it had it."""
    host: str
    shape: str
    """Which form of the sum was chosen."""
    num_steps: int
    """Fitted to."""
    num_held_out: int
    """Judged by: whole stretches of time that were kept from the fit."""
    busy_seconds: float
    """Sum of all steps' times."""
    limits: InstanceLimits | None = None
    """The engine's own settings; None if its facts do not say."""
    noise: float | None = None
    """By how much two alike decode steps differ: no model can err less."""
    cpu_mape: float | None = None
    """Error of the same fit made of and judged by CPU time, which neighbours on the same cores do not take."""
    front_end: FrontEnd | None = None
    """None where no client's side was measured."""
    errors: list[PhaseError] = []
