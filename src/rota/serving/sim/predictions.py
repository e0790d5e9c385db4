"""The world's side of predicted lengths: it knows the truth, keeps the books, and makes predictions take time."""

import time
from collections.abc import Callable

from rota.base.instant import Duration
from rota.serving.api import InstanceLimits, LengthPredictor, Request, RequestId
from rota.serving.metrics.length_errors import LengthErrors, LengthFacts
from rota.serving.sim.ground_truth import GroundTruth
from rota.serving.stack import LengthServices

IN_A_SIMULATION = LengthServices(truth=lambda request: request.max_tokens)
"""For a look at whether a stack could be simulated; nobody is served by what is built with it."""


class Predictions:
    """What the predictors of all engines of a run said, what came of it, and what it cost."""

    def __init__(self, truth: GroundTruth) -> None:
        self._truth = truth
        self._books: dict[str, _Book] = {}

    def facts(self) -> tuple[LengthFacts, ...]:
        """What there is to say in the end of each predictor that was asked, by name."""
        return tuple(book.facts(name) for name, book in sorted(self._books.items()) if book.num_predictions)

    def at(self, limits: InstanceLimits) -> "EnginePredictions":
        """The predictions of one engine."""
        return EnginePredictions(self._books, lambda request: self._truth.num_output_tokens(request, limits))


class EnginePredictions:
    """What the predictors of one engine say; `services` is what the engine's policies are built with."""

    def __init__(self, books: "dict[str, _Book]", truth: Callable[[Request], int]) -> None:
        self.services = LengthServices(truth=truth, watched=self._watched)
        self.is_used = False
        self.due = 0
        """Engine time that was spent on predictions and not yet asked for, in nanoseconds."""
        self._books = books

    def take_due(self) -> Duration:
        """Engine time that was spent on predictions since last asked."""
        due, self.due = self.due, 0
        return Duration(due)

    def _watched(self, name: str, predictor: LengthPredictor) -> LengthPredictor:
        self.is_used = True
        return _Watched(predictor, self, self._books.setdefault(name, _Book(predictor)))


class _Book:
    """What is kept of one predictor."""

    def __init__(self, predictor: LengthPredictor) -> None:
        self.errors = LengthErrors()
        self.num_predictions = 0
        self.cpu_ns = 0
        self._cost = predictor.cost
        self._is_oracle: bool = getattr(predictor, "is_oracle", False)

    def facts(self, name: str) -> LengthFacts:
        return LengthFacts(
            predictor=name,
            is_oracle=self._is_oracle,
            num_predictions=self.num_predictions,
            cpu_us=self.cpu_ns / self.num_predictions / 1000,
            cost_us=self._cost / 1000,
            num_finished=self.errors.num_pairs,
            mean_absolute_error=self.errors.mean_absolute_error,
            bias=self.errors.bias,
            kendall_tau=self.errors.kendall_tau,
        )


class _Watched:
    """Stands between a policy and its predictor."""

    def __init__(self, predictor: LengthPredictor, engine: EnginePredictions, book: _Book) -> None:
        self.cost = predictor.cost
        self._predictor = predictor
        self._engine = engine
        self._book = book
        self._said: dict[RequestId, float] = {}
        """What was said first of each request that has not ended."""

    def predict(self, request: Request) -> float:
        began = time.perf_counter_ns()
        predicted = self._predictor.predict(request)
        book = self._book
        book.cpu_ns += time.perf_counter_ns() - began
        book.num_predictions += 1
        self._engine.due += self.cost
        self._said.setdefault(request.id, predicted)
        return predicted

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        said = self._said.pop(request.id, None)
        if said is not None and num_output_tokens is not None:
            self._book.errors.add(said, num_output_tokens)
        self._predictor.request_ended(request, num_output_tokens)
