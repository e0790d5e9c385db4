"""The file of a trained ranker of lengths: trees, and how long answers of each score were.

Plain JSON of a version, checked whole before any of it is used, so that a file from anywhere can do no more than
predict badly: trees only lead forward, to places that are there, by features that are known.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from rota.base.errors import ConfigError
from rota.serving.api import TEXT_COUNTS, Request
from rota.serving.predictors.length.features import REQUEST_FEATURES, TEXT_FEATURES, features_of

FORMAT = "rota-length-ranker"
VERSION = 1
MAX_BYTES = 64 * 2**20
MAX_NODES = 1_000_000

_AGAIN = "train it again: rota train length JOURNAL --output FILE"


class Tree(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tree as a list of questions. To where a question leads is a number: that of a later question, or below 0 the
    leaf -1 - number."""

    features: tuple[int, ...]
    """Which number of the request each question looks at."""
    at_most: tuple[float, ...]
    """What it must not pass to go left."""
    left: tuple[int, ...]
    right: tuple[int, ...]
    leaves: tuple[float, ...]


class Ranker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Scores requests by the sum of trees. A score is a guess at the rank of the answer's length, from 0 to 1."""

    trees: tuple[Tree, ...]
    scores: tuple[float, ...]
    """Rising; `tokens` says how long answers of such a score were on average, which never falls."""
    tokens: tuple[float, ...]


class RankerFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that a file holds."""

    format: Literal["rota-length-ranker"] = "rota-length-ranker"
    version: int = VERSION
    rota_version: str
    trained_on: dict[str, Any]
    """What it learned from and how it did on later requests; for people."""
    request_features: tuple[str, ...] = REQUEST_FEATURES
    text_features: tuple[str, ...] = TEXT_FEATURES
    by_request: Ranker
    by_text: Ranker | None = None
    """For requests whose text was counted, where there were enough of them to learn from."""


class CompiledRanker:
    """A ranker as it is quick to walk in Python: a question is (feature, at most, left, right), a leaf a float."""

    __slots__ = ("_scores", "_tokens", "_trees")

    def __init__(self, ranker: Ranker) -> None:
        self._trees = [_walkable(tree) for tree in ranker.trees]
        self._scores = ranker.scores
        self._tokens = ranker.tokens

    def score(self, features: Sequence[float]) -> float:
        """The sum of the leaves that the features lead to."""
        score = 0.0
        for node in self._trees:
            while type(node) is tuple:
                node = node[2] if features[node[0]] <= node[1] else node[3]
            score += node
        return score

    def num_tokens(self, features: Sequence[float]) -> float:
        """How long answers of such a score were, drawn straight between the scores that are known."""
        score, scores, tokens = self.score(features), self._scores, self._tokens
        after = bisect_left(scores, score)
        if after == 0:
            return tokens[0]
        if after == len(scores):
            return tokens[-1]
        part = (score - scores[after - 1]) / (scores[after] - scores[after - 1])
        return tokens[after - 1] + part * (tokens[after] - tokens[after - 1])


class CompiledRankers:
    """The two of a file: one asks a request by its text where that was counted and one of them knows texts."""

    __slots__ = ("_by_request", "_by_text")

    def __init__(self, by_request: Ranker, by_text: Ranker | None) -> None:
        self._by_request = CompiledRanker(by_request)
        self._by_text = None if by_text is None else CompiledRanker(by_text)

    def num_tokens(self, request: Request) -> float:
        """How long its answer is thought to be: at least 1, and at most what it allows."""
        ranker = self._by_request
        if self._by_text is not None and len(request.text_counts) == len(TEXT_COUNTS):
            ranker = self._by_text
        return float(max(1, min(ranker.num_tokens(features_of(request)), request.max_tokens)))


def _walkable(tree: Tree) -> Any:
    """Nested, from the last question to the first, as each leads to later ones only."""
    built: list[Any] = [None] * len(tree.features)

    def reached(number: int) -> Any:
        return built[number] if number >= 0 else tree.leaves[-1 - number]

    for place in reversed(range(len(tree.features))):
        built[place] = (
            tree.features[place], tree.at_most[place], reached(tree.left[place]), reached(tree.right[place])
        )  # fmt: skip
    return built[0] if built else tree.leaves[0]


def load_ranker(path: str | Path) -> RankerFile:
    """Read a file and check all of it. Raises `ConfigError` that names the file and what is wrong."""
    try:
        with Path(path).open("rb") as file:
            source = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", hint=_AGAIN) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(source) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES // 2**20} MiB, and no ranker is")
    try:
        head = msgspec.json.decode(source, type=_Head)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a ranker of lengths: {error}", hint=_AGAIN) from None
    if head.format != FORMAT or head.version != VERSION:
        told = f"{head.format!r} of version {head.version}"
        raise ConfigError(f"{path}: {told}, and this is for {FORMAT!r} of version {VERSION}", hint=_AGAIN)
    try:
        loaded = msgspec.json.decode(source, type=RankerFile)
        _check(loaded)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a whole ranker of lengths: {error}", hint=_AGAIN) from None
    return loaded


def save_ranker(path: Path, ranker: RankerFile) -> None:
    """Write a file. Raises `OSError` where it cannot be."""
    path.write_bytes(msgspec.json.encode(ranker, order="deterministic") + b"\n")


class _Head(msgspec.Struct, frozen=True):
    format: str
    version: int


def _check(file: RankerFile) -> None:
    """Raise `ValueError` for whatever could lead astray who walks the trees."""
    for named, known in ((file.request_features, REQUEST_FEATURES), (file.text_features, TEXT_FEATURES)):
        if named != known:
            raise ValueError(f"it goes by other features: {', '.join(sorted(set(named) ^ set(known)) or named)}")
    _check_ranker("by_request", file.by_request, len(REQUEST_FEATURES))
    if file.by_text is not None:
        _check_ranker("by_text", file.by_text, len(TEXT_FEATURES))


def _check_ranker(name: str, ranker: Ranker, num_features: int) -> None:
    if not ranker.tokens or len(ranker.tokens) != len(ranker.scores):
        raise ValueError(f"{name}: as many scores as tokens are needed, at least one")
    if any(low >= high for low, high in zip(ranker.scores, ranker.scores[1:], strict=False)):
        raise ValueError(f"{name}: scores must rise")
    if ranker.tokens[0] < 1 or any(low > high for low, high in zip(ranker.tokens, ranker.tokens[1:], strict=False)):
        raise ValueError(f"{name}: tokens must be at least 1 and must not fall")
    if not all(map(math.isfinite, ranker.scores + ranker.tokens)):
        raise ValueError(f"{name}: numbers must be finite")
    if sum(len(tree.features) for tree in ranker.trees) > MAX_NODES:
        raise ValueError(f"{name}: more than {MAX_NODES:,} questions")
    for number, tree in enumerate(ranker.trees):
        _check_tree(f"{name}: tree {number}", tree, num_features)


def _check_tree(spot: str, tree: Tree, num_features: int) -> None:
    num_questions = len(tree.features)
    if not len(tree.at_most) == len(tree.left) == len(tree.right) == num_questions or not tree.leaves:
        raise ValueError(f"{spot}: lists of different lengths, or no leaf")
    if not all(map(math.isfinite, tree.at_most + tree.leaves)):
        raise ValueError(f"{spot}: numbers must be finite")
    for place, feature in enumerate(tree.features):
        if not 0 <= feature < num_features:
            raise ValueError(f"{spot}: question {place} asks for feature {feature} of {num_features}")
        for to in (tree.left[place], tree.right[place]):
            if not (place < to < num_questions or -len(tree.leaves) <= to < 0):
                raise ValueError(f"{spot}: question {place} leads to {to}, which is not ahead")
