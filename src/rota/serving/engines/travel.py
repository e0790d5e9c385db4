"""Which terms of a request mean the same in the middle of an answer as at its start: one rule for who moves requests.

The router asks by the client's body, and an engine by what it made of it. The rest of an answer is asked for with the
same terms, all tokens so far as the prompt, and with `max_tokens` and `min_tokens` less by what was said.
"""

from typing import Any, Protocol


class Terms(Protocol):
    """How tokens are drawn, as OpenAI and vLLM name it; None is what the server does by itself."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def seed(self) -> float | None: ...
    @property
    def frequency_penalty(self) -> float | None: ...
    @property
    def presence_penalty(self) -> float | None: ...
    @property
    def stop(self) -> Any: ...
    @property
    def logprobs(self) -> float | bool | None: ...


def why_terms_stay(terms: Terms) -> str:
    """What of the terms would be lost or changed if the answer went on elsewhere; empty if nothing.

    Sampling without a seed stays what it was, a draw; with temperature 0 the very tokens are the same. A repetition
    penalty looks at prompt and output alike, so it does not matter which of them a token belongs to.
    """
    if terms.seed is not None and terms.temperature != 0:
        return "its draws are seeded, and their position does not travel"
    if terms.frequency_penalty or terms.presence_penalty:
        return "its penalties count output tokens, which arrive as prompt"
    if terms.stop:
        return "its stop strings may lie across the move"
    if terms.logprobs is not None and terms.logprobs is not False:
        return "its log-probabilities are of one engine"
    return ""
