"""The predictor `ranked`: its file, what it says by it, and what is counted of a text."""

import json
import string

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import ConfigError
from rota.base.instant import Instant
from rota.serving.calibration.length_ranker import _isotonic, _tree
from rota.serving.model.request import ProgramId, Request, RequestId, TenantId
from rota.serving.model.text_counts import TEXT_COUNTS, text_counts
from rota.serving.predictors.length.features import REQUEST_FEATURES, TEXT_FEATURES, features_of
from rota.serving.predictors.length.ranked import Ranked
from rota.serving.predictors.length.ranker_file import (
    CompiledRanker,
    Ranker,
    RankerFile,
    Tree,
    load_ranker,
    save_ranker,
)

PROMPT, WORDS = REQUEST_FEATURES.index("prompt_tokens"), TEXT_FEATURES.index("last_words")


def request(prompt=100, *, max_tokens=1000, counts=(), **fields):
    return Request(RequestId("r"), Instant(0), prompt, max_tokens, text_counts=counts, **fields)


def asks_one(feature, at_most, *, short, long):
    """A ranker of one question."""
    tree = Tree((feature,), (at_most,), (-1,), (-2,), (0.25, 0.75))
    return Ranker((tree,), (0.25, 0.75), (short, long))


def file_of(by_text=None):
    return RankerFile(
        rota_version="0", trained_on={}, by_request=asks_one(PROMPT, 50.0, short=10.0, long=90.0), by_text=by_text
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rankers")


def ranked(folder, file, **parameters):
    save_ranker(folder / "ranker.json", file)
    return Ranked(model=str(folder / "ranker.json"), **parameters)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_it_says_how_long_answers_of_such_a_score_were(folder):
    predictor = ranked(folder, file_of(), cost_us=7.0)
    assert (predictor.predict(request(50)), predictor.predict(request(51))) == (10, 90)
    assert predictor.predict(request(51, max_tokens=30)) == 30, "never more than is allowed"
    assert predictor.cost == 7_000


def test_it_goes_by_the_text_where_that_was_counted(folder):
    by_text = asks_one(WORDS, 3.0, short=200.0, long=300.0)
    predictor = ranked(folder, file_of(by_text))
    wordy, brief = (text_counts([("user", text)]) for text in ("one two three four", "one"))
    assert [predictor.predict(request(1, counts=counts)) for counts in (wordy, brief, ())] == [300, 200, 10]
    assert ranked(folder, file_of()).predict(request(1, counts=wordy)) == 10, "a ranker that has learned of no text"


def test_features_are_named_one_by_one_and_no_name_of_a_tenant_is_in_them():
    counted = request(counts=text_counts([("user", "x")]), tenant=TenantId("acme"), program=ProgramId("p"))
    assert len(features_of(request())) == len(REQUEST_FEATURES)
    assert len(features_of(counted)) == len(TEXT_FEATURES) == len(REQUEST_FEATURES) + len(TEXT_COUNTS)
    assert all(0 <= features_of(counted)[TEXT_FEATURES.index(name)] < 256 for name in ("tenant", "program"))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12))
def test_a_walk_over_our_trees_ends_where_lightgbms_own_does(seed, num_leaves):
    import lightgbm

    draws = np.random.default_rng(seed)
    rows, lengths = draws.integers(0, 20, (120, 4)).astype(float), draws.random(120)
    options = {"num_leaves": num_leaves, "min_data_in_leaf": 3, "use_missing": False, "verbose": -1, "num_threads": 1}
    booster = lightgbm.train(options, lightgbm.Dataset(rows, lengths), 8)
    trees = tuple(_tree(each["tree_structure"]) for each in booster.dump_model()["tree_info"])
    ours = CompiledRanker(Ranker(trees, (0.0,), (1.0,)))
    others = draws.normal(10, 12, (50, 4))
    assert [ours.score(row) for row in others.tolist()] == pytest.approx(list(booster.predict(others)), abs=1e-9)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(-1, 2), st.integers(1, 5000)), min_size=1, max_size=300), st.floats(-3, 3))
def test_a_higher_score_never_says_a_shorter_answer(pairs, score):
    knots = _isotonic(np.array([pair[0] for pair in pairs]), np.array([float(pair[1]) for pair in pairs]))
    scores, tokens = zip(*knots, strict=True)
    assert list(scores) == sorted(set(scores)) and list(tokens) == sorted(tokens)
    leaf = Tree((), (), (), (), (score,))
    higher = Tree((), (), (), (), (score + 0.1,))
    said = [CompiledRanker(Ranker((tree,), scores, tokens)).num_tokens([]) for tree in (leaf, higher)]
    assert 1 <= said[0] <= said[1] <= 5000


# --- its file ---------------------------------------------------------------------------------------------------------

WHOLE = msgspec.json.encode(file_of(asks_one(WORDS, 3.0, short=200.0, long=300.0)))
SPOTS = ("features", "at_most", "left", "right", "leaves")


def refused_or_harmless(folder, source):
    """Whatever a file says: it is refused with the file's name, or predicts within what the client allows."""
    path = folder / "given.json"
    path.write_bytes(source)
    try:
        predictor = Ranked(model=str(path))
    except ConfigError as error:
        assert str(path) in error.message
        return
    for counts in ((), (5,) * len(TEXT_COUNTS), (1, 2)):
        assert 1 <= predictor.predict(request(77, counts=counts)) <= 1000


@settings(max_examples=60)
@given(st.sampled_from(SPOTS), st.sampled_from(("by_request", "by_text")), st.data())
def test_no_change_to_a_tree_leads_astray(folder, spot, name, data):
    changed = json.loads(WHOLE)
    tree = changed[name]["trees"][0]
    values = st.integers(-5, 30) | st.floats(allow_nan=False) | st.none() | st.just("x")
    tree[spot] = data.draw(st.lists(values, max_size=3))
    refused_or_harmless(folder, json.dumps(changed).encode())


@settings(max_examples=60)
@given(st.integers(0, len(WHOLE) - 1), st.binary(max_size=3))
def test_no_change_of_bytes_leads_astray(folder, place, inserted):
    refused_or_harmless(folder, WHOLE[:place] + inserted + WHOLE[place + 1 :])
    refused_or_harmless(folder, WHOLE[:place])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "of version 2"),
        ({"format": "another"}, "'another'"),
        ({"request_features": ["prompt_tokens"]}, "other features"),
        ({"more": 1}, "unknown field"),
        ({"by_request": {"trees": [], "scores": [], "tokens": []}}, "at least one"),
        ({"by_request": {"trees": [], "scores": [0.5, 0.1], "tokens": [1, 2]}}, "must rise"),
        ({"by_request": {"trees": [], "scores": [0.1, 0.5], "tokens": [9, 2]}}, "must not fall"),
        ({"by_request": {"trees": [], "scores": [0.1], "tokens": [1e999]}}, "number out of range"),
    ],
)
def test_a_bad_file_is_told_by_name_with_what_to_do(folder, change, said):
    path = folder / "bad.json"
    path.write_text(json.dumps(json.loads(WHOLE) | change).replace("Infinity", "1e999"))
    with pytest.raises(ConfigError) as caught:
        load_ranker(path)
    assert str(path) in caught.value.message and said in caught.value.message.lower()
    assert "rota train length" in (caught.value.hint or "")


def test_a_tree_that_leads_back_is_refused(folder):
    """Else a walk over it would never end."""
    changed = json.loads(WHOLE)
    changed["by_request"]["trees"][0] |= {"left": [0]}
    (folder / "back.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="which is not ahead"):
        load_ranker(folder / "back.json")


def test_no_file_and_too_large_a_file(folder, monkeypatch):
    with pytest.raises(ConfigError, match="no such file"):
        load_ranker(folder / "nowhere.json")
    (folder / "large.json").write_bytes(WHOLE)
    monkeypatch.setattr("rota.serving.predictors.length.ranker_file.MAX_BYTES", 100)
    with pytest.raises(ConfigError, match="larger than"):
        load_ranker(folder / "large.json")


# --- what is counted --------------------------------------------------------------------------------------------------


def test_what_is_counted():
    talk = [("system", "s"), ("user", "hi"), ("assistant", "a\n```x```"), ("user", "Why 42? ```f(x);``` é\nB")]
    counted = dict(zip(TEXT_COUNTS, text_counts(talk), strict=True))
    assert counted == {
        "messages": 4, "last_bytes": 24, "last_lines": 1, "last_words": 5, "last_questions": 1, "last_fences": 2,
        "last_digits": 2, "last_capitals": 2, "last_symbols": 3, "last_beyond_ascii": 2, "answer_bytes": 9,
        "answer_lines": 1, "answer_fences": 2,
    }  # fmt: skip
    assert text_counts([("user", "x")], is_chat=False)[0] == 0 and text_counts([]) == ()


@settings(max_examples=40)
@given(st.text(alphabet=string.ascii_lowercase + " ?\n5X{é"), st.permutations(string.ascii_lowercase))
def test_counts_do_not_tell_one_word_from_another_of_its_length(text, letters):
    other = text.translate(str.maketrans(string.ascii_lowercase, "".join(letters)))
    assert text_counts([("user", text)]) == text_counts([("user", other)])
    assert all(count >= 0 for count in text_counts([("user", text)]))
