"""As long as answers to such requests were lately."""

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator

from rota.base.errors import ConfigError
from rota.base.instant import Duration, microseconds
from rota.serving.api import Request


class History:
    """A quantile of the last answers in the finest group of which enough have ended: those to the same program, to
    prompts of the same tenant and about the same length (a power of two), to the tenant, and to anybody.

    Learns as answers end, from nothing else. Memory is bounded: `num_kept` answers a group, `num_groups` groups, the
    one unused for longest forgotten first. Until `num_least` answers have ended it says what the client allows. Good
    where tenants or programs keep asking for the same kind of thing; it cannot tell one prompt from another.

    One predictor serves one engine, so the model is the engine's.
    """

    def __init__(
        self,
        *,
        quantile: float = 0.5,
        num_least: int = 8,
        num_kept: int = 64,
        num_groups: int = 4096,
        cost_us: float = 3.0,
    ) -> None:
        """`cost_us` is what a prediction takes of the engine's time, in microseconds: about what it was measured to."""
        if not 0 <= quantile <= 1:
            raise ConfigError(f"history: quantile must be from 0 to 1, and it is {quantile}")
        if not 1 <= num_least <= num_kept or num_groups < 1:
            raise ConfigError(
                f"history: num_least {num_least}, num_kept {num_kept} and num_groups {num_groups} do not fit together",
                hint="1 <= num_least <= num_kept, and 1 <= num_groups",
            )
        self.cost: Duration = microseconds(cost_us)
        self._quantile = quantile
        self._num_least = num_least
        self._num_kept = num_kept
        self._num_groups = num_groups
        self._groups: OrderedDict[Hashable, _Lately] = OrderedDict()

    def predict(self, request: Request) -> float:
        guess = request.max_tokens
        for key in _groups_of(request):
            lately = self._groups.get(key)
            if lately is not None and len(lately.sorted) >= self._num_least:
                guess = lately.sorted[round(self._quantile * (len(lately.sorted) - 1))]
                break
        return float(max(1, min(guess, request.max_tokens)))

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        if num_output_tokens is None:
            return
        for key in _groups_of(request):
            lately = self._groups.get(key)
            if lately is None:
                lately = self._groups[key] = _Lately()
                if len(self._groups) > self._num_groups:
                    self._groups.popitem(last=False)
            lately.add(num_output_tokens, self._num_kept)
            self._groups.move_to_end(key)


class _Lately:
    """The last answers of one group, in order of time and of length."""

    __slots__ = ("by_time", "sorted")

    def __init__(self) -> None:
        self.by_time: deque[int] = deque()
        self.sorted: list[int] = []

    def add(self, num_tokens: int, num_kept: int) -> None:
        self.by_time.append(num_tokens)
        insort(self.sorted, num_tokens)
        if len(self.by_time) > num_kept:
            del self.sorted[bisect_left(self.sorted, self.by_time.popleft())]


def _groups_of(request: Request) -> Iterator[Hashable]:
    """From the finest to the coarsest; the coarsest is touched last, so that it is never the one forgotten."""
    if request.program is not None:
        yield "program", request.program
    yield "prompt", request.tenant, request.num_prompt_tokens.bit_length()
    yield "tenant", request.tenant
    yield "anybody"
