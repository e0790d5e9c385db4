"""Fits a ranker of output lengths to answered requests, and says what it is worth on those that came later.

Boosted trees (LightGBM) guess the rank of each answer's length among all that they learn from, from 0 to 1: squared
error of ranks. Measured on conversations this ranked better than LightGBM's own ranking objectives, and what an error
costs does not hang on how long the longest answers are. Then scores become tokens: the mean answer at each score, by
isotonic regression over parts of the scores, so that longer scores never say shorter answers.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from rota import __version__
from rota.base.errors import ConfigError, DataError
from rota.serving.calibration.answered import Answered, said_by
from rota.serving.metrics.length_errors import NUM_RANKED_MAX, kendall_tau
from rota.serving.predictors.length.declared import Declared
from rota.serving.predictors.length.features import REQUEST_FEATURES, TEXT_FEATURES, features_of
from rota.serving.predictors.length.history import History
from rota.serving.predictors.length.ranker_file import CompiledRankers, Ranker, RankerFile, Tree

MIN_ANSWERED = 50
"""Fewer are nothing to learn from, on either side of the split."""

NUM_TREES = 300
PATIENCE = 30
"""It stops when so many trees have not made it better on the last part of what it learns from."""
STOPPING_SHARE = 0.15
NUM_PARTS = 4
NUM_FIFTHS = 5
NUM_SCORES = 32
MIN_CALIBRATED = 10 * NUM_SCORES
"""With fewer in the last part, scores become tokens by all that was learned from."""

LATE = "had not ended when those began by which it is judged"

_SETTINGS: dict[str, Any] = {
    "objective": "regression",
    "learning_rate": 0.1,
    "num_leaves": 31,
    "min_data_in_leaf": 20,
    "feature_fraction": 0.8,
    "use_missing": False,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbose": -1,
}


class Worth(msgspec.Struct, frozen=True, kw_only=True):
    """How well lengths were told. Errors are in output tokens."""

    num_requests: int
    kendall_tau: float | None
    """Tau-b, of at most 2,048 requests spread over them; None where one side is all alike."""
    mean_absolute_error: float
    bias: float
    """Mean of predicted less true."""
    mean_true: float


class Fifth(msgspec.Struct, frozen=True, kw_only=True):
    """A fifth of the holdout, by what was predicted."""

    num_requests: int
    mean_predicted: float
    mean_true: float


class TrainingReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was learned from, and what came of it on requests that arrived later."""

    num_trained: int
    num_holdout: int
    left_out: dict[str, int]
    """Requests that could not be used, by why."""
    num_counted_texts: int
    """Requests whose text was counted, of all that were used."""
    num_trees: dict[str, int]
    predictors: dict[str, Worth]
    """Of the holdout: `ranked` as it will be used, `ranked without text` as if no text had been counted, and beside
    them `history`, which went on learning as answers ended, and `declared`."""
    calibration: tuple[Fifth, ...]
    drift: tuple[Worth, ...]
    """`ranked` over the holdout in time: its first quarter to its last."""


def train(
    answered: Sequence[Answered],
    left_out: dict[str, int],
    *,
    holdout: float = 0.3,
    seed: int = 0,
    reached: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[RankerFile, TrainingReport]:
    """Fit to the first part of the requests, in order of arrival, and judge by the rest; answers that had not ended
    when the rest began are not learned from. `reached` hears how many trees of how many there are. Raises `DataError`
    where there is too little to learn from, and `ConfigError` without LightGBM."""
    if importlib.util.find_spec("lightgbm") is None:
        raise ConfigError("training needs LightGBM", hint="pip install 'rota[rank]'; using what it makes does not")
    first, later = _split(answered, holdout)
    texts = [each for each in first if each.request.text_counts]
    has_text = len(texts) >= MIN_ANSWERED
    total = NUM_TREES * (1 + has_text)
    by_request = _fit(first, len(REQUEST_FEATURES), seed, lambda done: reached(done, total))
    by_text = _fit(texts, len(TEXT_FEATURES), seed, lambda done: reached(NUM_TREES + done, total)) if has_text else None
    ours = _predictions(by_request, by_text, later)
    predictors = {"ranked": ours, "ranked without text": _predictions(by_request, None, later)}
    if by_text is None:
        del predictors["ranked without text"]
    # What ended in the first part counts for them, too: they learn as they go.
    for name, predictor in (("history", History()), ("declared", Declared())):
        predictors[name] = np.array(list(said_by(predictor, list(answered)))[-len(later) :])
    true = _lengths(later)
    if num_late := len(answered) - len(first) - len(later):
        left_out = left_out | {LATE: num_late}
    report = TrainingReport(
        num_trained=len(first),
        num_holdout=len(later),
        left_out=left_out,
        num_counted_texts=sum(1 for each in answered if each.request.text_counts),
        num_trees={"by request": len(by_request.trees)} | ({"by text": len(by_text.trees)} if by_text else {}),
        predictors={name: _worth(said, true) for name, said in predictors.items()},
        calibration=tuple(_fifths(ours, true)),
        drift=tuple(
            _worth(said, part)
            for said, part in zip(np.array_split(ours, NUM_PARTS), np.array_split(true, NUM_PARTS), strict=True)
        ),
    )
    trained_on = {"num_requests": len(first), "num_counted_texts": len(texts), "holdout": report.predictors["ranked"]}
    file = RankerFile(
        rota_version=__version__, trained_on=msgspec.to_builtins(trained_on), by_request=by_request, by_text=by_text
    )
    return file, report


def _split(answered: Sequence[Answered], holdout: float) -> tuple[list[Answered], list[Answered]]:
    border = round((1 - holdout) * len(answered))
    later = list(answered[border:])
    first = [each for each in answered[:border] if later and each.ended < later[0].arrived]
    for part, name in ((first, "to learn from"), (later, "to judge by")):
        if len(part) < MIN_ANSWERED:
            raise DataError(
                f"{len(part)} answered requests are left {name}, and {MIN_ANSWERED} are needed",
                hint="record a longer journal, or ask for another --holdout",
            )
    if len({each.num_output_tokens for each in first}) == 1:
        raise DataError(f"all answers have {first[0].num_output_tokens} tokens: there is nothing to rank")
    return first, later


def _fit(rows: list[Answered], num_features: int, seed: int, reached: Callable[[int], None]) -> Ranker:
    import lightgbm

    features = np.array([features_of(each.request)[:num_features] for each in rows], dtype=float)
    lengths = _lengths(rows)
    in_order = np.sort(lengths)
    ranks = (np.searchsorted(in_order, lengths, "left") + np.searchsorted(in_order, lengths, "right")) / 2 / len(rows)
    border = round((1 - STOPPING_SHARE) * len(rows))
    learned = lightgbm.Dataset(features[:border], ranks[:border])
    booster = lightgbm.train(
        _SETTINGS | {"seed": seed},
        learned,
        NUM_TREES,
        valid_sets=[lightgbm.Dataset(features[border:], ranks[border:], reference=learned)],
        callbacks=[
            lightgbm.early_stopping(PATIENCE, verbose=False),
            lambda state: reached(state.iteration + 1),
        ],
    )
    num_trees = booster.best_iteration
    dumped = booster.dump_model(num_iteration=num_trees)["tree_info"]
    # Of what trees were grown on, scores say more than they do of anything else.
    unseen = slice(border if len(rows) - border >= MIN_CALIBRATED else 0, None)
    scores = np.asarray(booster.predict(features[unseen], num_iteration=num_trees))
    knots = _isotonic(scores, lengths[unseen])
    return Ranker(
        trees=tuple(_tree(each["tree_structure"]) for each in dumped),
        scores=tuple(float(score) for score, _ in knots),
        tokens=tuple(float(tokens) for _, tokens in knots),
    )


def _tree(root: dict[str, Any]) -> Tree:
    """LightGBM's nested tree as a list of questions, each ahead of those it leads to."""
    features: list[int] = []
    at_most: list[float] = []
    children: list[tuple[dict[str, Any], dict[str, Any]]] = []
    leaves: list[float] = []
    places: dict[int, int] = {}

    def place(node: dict[str, Any]) -> None:
        if "split_feature" not in node:
            leaves.append(node["leaf_value"])
            places[id(node)] = -len(leaves)
            return
        places[id(node)] = len(features)
        features.append(node["split_feature"])
        at_most.append(node["threshold"])
        children.append((node["left_child"], node["right_child"]))
        place(node["left_child"])
        place(node["right_child"])

    place(root)
    return Tree(
        features=tuple(features),
        at_most=tuple(at_most),
        left=tuple(places[id(left)] for left, _ in children),
        right=tuple(places[id(right)] for _, right in children),
        leaves=tuple(leaves),
    )


def _isotonic(scores: np.ndarray, lengths: np.ndarray) -> list[tuple[float, float]]:
    """Mean score and mean length of equal parts of the scores; neighbours whose lengths fall are put together."""
    order = np.argsort(scores, kind="stable")
    pooled: list[list[float]] = []
    for part in np.array_split(order, min(NUM_SCORES, len(order))):
        pooled.append([float(scores[part].mean()), float(lengths[part].mean()), float(len(part))])
        while len(pooled) > 1 and (pooled[-2][1] >= pooled[-1][1] or pooled[-2][0] >= pooled[-1][0]):
            last, before = pooled.pop(), pooled.pop()
            count = last[2] + before[2]
            pooled.append([(last[i] * last[2] + before[i] * before[2]) / count for i in (0, 1)] + [count])
    return [(score, length) for score, length, _ in pooled]


def _predictions(by_request: Ranker, by_text: Ranker | None, rows: list[Answered]) -> np.ndarray:
    """What the predictor `ranked` says of each."""
    rankers = CompiledRankers(by_request, by_text)
    return np.array([rankers.num_tokens(each.request) for each in rows])


def _lengths(rows: Sequence[Answered]) -> np.ndarray:
    return np.array([each.num_output_tokens for each in rows], dtype=float)


def _worth(said: np.ndarray, true: np.ndarray) -> Worth:
    step = -(-len(true) // NUM_RANKED_MAX)
    return Worth(
        num_requests=len(true),
        kendall_tau=kendall_tau(said[::step].tolist(), true[::step].astype(int).tolist()),
        mean_absolute_error=float(np.abs(said - true).mean()),
        bias=float((said - true).mean()),
        mean_true=float(true.mean()),
    )


def _fifths(said: np.ndarray, true: np.ndarray) -> list[Fifth]:
    parts = np.array_split(np.argsort(said, kind="stable"), NUM_FIFTHS)
    return [
        Fifth(num_requests=len(part), mean_predicted=float(said[part].mean()), mean_true=float(true[part].mean()))
        for part in parts
    ]
