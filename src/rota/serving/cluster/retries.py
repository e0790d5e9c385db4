"""Whether a request whose attempt failed may have another one."""

from dataclasses import dataclass

from rota.base.errors import ConfigError
from rota.serving.cluster.lifecycles import RequestState
from rota.serving.cluster.tracked import TrackedRequest
from rota.serving.model.events import RequestFailed


@dataclass(frozen=True, slots=True)
class RetryRule:
    """How often a request is tried."""

    max_attempts: int
    """Before its first token."""
    max_resumptions: int
    """Times that it goes on elsewhere after some tokens."""

    def __post_init__(self) -> None:
        for name, least in (("max_attempts", 1), ("max_resumptions", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def refusal(self, tracked: TrackedRequest, event: RequestFailed, max_prompt_anywhere: int) -> str | None:
        """Why a failed attempt was the last one; None if there may be another. Notes the failure."""
        why = event.reason or "no reason given"
        failure = f"{event.instance_id}: {why}"
        num_tokens = event.num_output_tokens
        is_running = tracked.state == RequestState.RUNNING
        if is_running and (num_tokens is None or not event.retryable or not tracked.request.movable):
            return f"the instance failed after the first token ({failure})"
        if not event.retryable:
            return f"the instance refused the request ({failure})"
        tracked.failures += ((event.instance_id, why),)
        if not is_running:
            is_last = tracked.num_attempts - tracked.num_resumptions >= self.max_attempts
            return f"all {tracked.num_attempts} attempts failed" if is_last else None
        if tracked.num_resumptions >= self.max_resumptions:
            return f"it was resumed {tracked.num_resumptions} times, and failed again"
        known = tracked.request.num_prompt_tokens + (num_tokens or 0)
        if known > max_prompt_anywhere:
            return f"no instance can go on with {known} tokens"
        return None

    def reason(self, tracked: TrackedRequest, reason: str) -> str:
        """Why an attempt is made, with why there is another one."""
        if not tracked.failures:
            return reason
        failed_on, why = tracked.failures[-1]
        of_all = f"attempt {tracked.num_attempts} of {self.max_attempts}"
        if tracked.num_resumptions:
            times = f"resumption {tracked.num_resumptions} of {self.max_resumptions}"
            of_all = f"{times}, after {tracked.num_output_tokens} tokens"
        return f"{of_all}, since {failed_on} failed ({why}): {reason}"
