"""How long an answer may be, by the answers that were given lately to prompts of about that length."""

from collections import OrderedDict, deque
from statistics import median_low

from rota.serving.api import Request, TenantId

_Kind = tuple[TenantId, int]


class ObservedLengths:
    """The median of the last answers to the same tenant's prompts of the same power of two; at first, a guess.

    It stands in for the learned predictors of the papers whose policies use it, and knows nothing but what was seen to
    end. At most `num_kinds` kinds of request are remembered, with `num_kept` answers each; the kind that was unused for
    longest is forgotten first.
    """

    def __init__(self, *, guess_tokens: int, num_kept: int = 64, num_kinds: int = 1024) -> None:
        """`guess_tokens` is said of a kind of which no answer has ended."""
        self._guess_tokens = guess_tokens
        self._num_kept = num_kept
        self._num_kinds = num_kinds
        self._seen: OrderedDict[_Kind, deque[int]] = OrderedDict()

    def predict(self, request: Request) -> int:
        """Output tokens, at least 1 and at most what the client allows."""
        seen = self._seen.get(_kind_of(request))
        guess = self._guess_tokens if seen is None else median_low(seen)
        return max(1, min(guess, request.max_tokens))

    def learn(self, request: Request, num_output_tokens: int) -> None:
        """An answer ended with so many tokens."""
        kind = _kind_of(request)
        seen = self._seen.get(kind)
        if seen is None:
            seen = self._seen[kind] = deque(maxlen=self._num_kept)
            if len(self._seen) > self._num_kinds:
                self._seen.popitem(last=False)
        seen.append(num_output_tokens)
        self._seen.move_to_end(kind)


def _kind_of(request: Request) -> _Kind:
    return request.tenant, request.num_prompt_tokens.bit_length()
