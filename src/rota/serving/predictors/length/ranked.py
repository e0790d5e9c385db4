"""As long as answers were to requests that look alike, told by a trained ranker."""

from rota.base.errors import ConfigError
from rota.base.instant import Duration, microseconds
from rota.serving.api import Request
from rota.serving.predictors.length.ranker_file import CompiledRankers, load_ranker


class Ranked:
    """The mean length of the answers whose requests had such a score, by a ranker that `rota train length` fitted to a
    journal: boosted trees that guess how an answer ranks among all by length.

    Rule: learning to rank (Fu et al., NeurIPS 2024), with trees over cheap numbers in place of their language model. It
    goes by the request (prompt tokens, limit, class, tenant, program), and where the front door counted the prompt's
    text (`rota serve --text-counts`), by those counts too. Without them it is told little: train on what will be known.

    It does not learn as it serves: when what clients ask for changes, train it again. Good where texts tell lengths.
    The longest are predicted too short, as by every mean of a group. A client can write its text so as to look short.
    """

    def __init__(self, *, model: str, cost_us: float = 60.0) -> None:
        """`model` is the ranker's file; `cost_us` is what a prediction takes of the engine's time, in microseconds:
        about what it was measured to."""
        if not cost_us >= 0:
            raise ConfigError(f"ranked: cost_us must not be negative, and it is {cost_us}")
        loaded = load_ranker(model)
        self.cost: Duration = microseconds(cost_us)
        self._rankers = CompiledRankers(loaded.by_request, loaded.by_text)

    def predict(self, request: Request) -> float:
        return self._rankers.num_tokens(request)

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        pass
