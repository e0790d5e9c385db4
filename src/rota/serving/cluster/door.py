"""Whether a request may enter: what no instance could ever take is refused, and the admission policy is asked."""

from rota.base.instant import Instant, seconds
from rota.serving.api import Admission, AdmissionPolicy, EndObserver, FirstTokenObserver
from rota.serving.cluster.answers import ask_admission, tell_end, tell_first_token
from rota.serving.cluster.instances import InstanceBook
from rota.serving.model.commands import Reject
from rota.serving.model.request import Request


class Door:
    """Asks the admission policy, and tells it of first tokens and ends if it wants to hear of them."""

    def __init__(self, policy: AdmissionPolicy, instances: InstanceBook) -> None:
        self._policy = policy
        self._observer = policy if isinstance(policy, EndObserver) else None
        self._first_tokens = policy if isinstance(policy, FirstTokenObserver) else None
        self._instances = instances

    def ask(self, request: Request, num_unfinished: int, now: Instant) -> Admission | Reject:
        """Let a request in, on the policy's terms, or refuse it."""
        largest = self._instances.max_prompt_anywhere
        if largest is not None and request.num_prompt_tokens > largest:
            return self.never_fits(request)
        admission = ask_admission(self._policy, request, self._instances.ready_views, num_unfinished, now)
        if admission.admitted:
            return admission
        delay = admission.retry_after_seconds
        return Reject(request.id, admission.reason, admission.status, None if delay is None else seconds(delay))

    def never_fits(self, request: Request) -> Reject:
        """The refusal of a prompt that is longer than any instance takes."""
        reason = (
            f"the prompt has {request.num_prompt_tokens} tokens, and the largest instance takes at most "
            f"{self._instances.max_prompt_anywhere} with room for one token of output"
        )
        return Reject(request.id, reason, 400)

    def first_token(self, request: Request) -> None:
        """The first token of a request came, or the first after it was resumed."""
        if self._first_tokens is not None:
            tell_first_token(self._first_tokens, request)

    def ended(self, request: Request, num_output_tokens: int | None) -> None:
        """A request ended, in whatever way, or did not get in after all."""
        if self._observer is not None:
            tell_end(self._observer, request, num_output_tokens)
