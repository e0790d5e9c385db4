"""Training a ranker of lengths: it finds what is there to find, nothing where nothing is, and never looks ahead."""

import json
import math

import msgspec
import pytest
from tests.command_line import rota

from rota.base.errors import ConfigError, DataError
from rota.base.instant import Instant
from rota.base.journal import Journal, header_for
from rota.base.random_streams import RandomStreams
from rota.serving.calibration.answered import Answered, said_by
from rota.serving.calibration.length_ranker import LATE, train
from rota.serving.model.events import ClientLeft, RequestArrived, RequestFinished
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request, RequestId
from rota.serving.model.text_counts import text_counts

NUM = 600


def answered(*, by_words=True, seed=0, num=NUM, takes=0):
    """Answers of ten tokens for each word that was asked, more or less; or as long as anybody else's."""
    stream = RandomStreams(seed).stream("answers")
    made = []
    for place in range(num):
        num_words, other = stream.integers(1, 60), stream.integers(1, 60)
        counts = text_counts([("user", "word " * num_words)])
        length = 10 * (num_words if by_words else other) + stream.integers(0, 40)
        request = Request(RequestId(f"r{place}"), Instant(place), 100, 4000, text_counts=counts)
        made.append(Answered(request, length, 2 * place, 2 * (place + takes) + 1))
    return made


def test_it_finds_what_the_text_tells_and_nothing_without_the_text():
    file, report = train(answered(), {})
    assert file.by_text is not None
    ranked, blind = report.predictors["ranked"], report.predictors["ranked without text"]
    assert ranked.kendall_tau > 0.85
    assert abs(blind.kendall_tau or 0) < 0.15
    assert ranked.mean_absolute_error < 0.3 * blind.mean_absolute_error
    assert (report.num_trained, report.num_holdout, report.num_counted_texts) == (420, 180, NUM)
    for fifth in report.calibration:
        assert fifth.mean_predicted == pytest.approx(fifth.mean_true, rel=0.25)
    assert (
        sum(part.num_requests for part in report.drift)
        == 180
        == sum(fifth.num_requests for fifth in report.calibration)
    )


def test_it_finds_nothing_where_there_is_nothing():
    report = train(answered(by_words=False), {})[1]
    assert abs(report.predictors["ranked"].kendall_tau or 0) < 0.15


def test_what_came_later_does_not_change_what_is_learned():
    rows = answered()
    border = round(0.7 * NUM)
    spoilt = rows[:border] + [each._replace(num_output_tokens=9) for each in rows[border:]]
    (file, _), (other, report) = train(rows, {}), train(spoilt, {})
    assert (file.by_request, file.by_text) == (other.by_request, other.by_text)
    assert report.predictors["ranked"].mean_true == 9


def test_an_answer_that_had_not_ended_when_the_holdout_began_is_not_learned_from():
    rows = answered(takes=25)
    file, report = train(rows, {})
    assert report.left_out == {LATE: 25} and report.num_trained == 420 - 25
    late = [each._replace(num_output_tokens=9) if 395 <= place < 420 else each for place, each in enumerate(rows)]
    assert train(late, {})[0].by_text == file.by_text


def test_lengths_that_drift_are_seen_to():
    rows = answered()
    later = [
        each._replace(num_output_tokens=each.num_output_tokens * 3) if i >= 555 else each for i, each in enumerate(rows)
    ]
    drift = train(later, {})[1].drift
    assert abs(drift[0].bias) < 30 < 200 < -drift[3].bias


def test_requests_whose_text_was_not_counted_are_learned_from_by_what_they_have():
    rows = [each._replace(request=msgspec.structs.replace(each.request, text_counts=())) for each in answered()]
    file, report = train(rows, {})
    assert file.by_text is None and "ranked without text" not in report.predictors


def test_too_little_to_learn_from_is_said():
    with pytest.raises(DataError, match="50 are needed"):
        train(answered(num=100), {})
    with pytest.raises(DataError, match="50 are needed"):
        train([], {})
    with pytest.raises(DataError, match="nothing to rank"):
        train([each._replace(num_output_tokens=7) for each in answered()], {})


def test_without_lightgbm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        train(answered(), {})
    assert "rota[rank]" in (caught.value.hint or "")


def test_what_others_say_is_said_of_each_at_its_arrival():
    """The third arrives after the first has ended, and before the second has."""

    class Listener:
        heard = 0

        def predict(self, request):
            return float(self.heard)

        def request_ended(self, request, num_output_tokens):
            self.heard += num_output_tokens

    first, second, third = (answered(num=3)[i]._replace(num_output_tokens=10**i) for i in range(3))
    rows = [first._replace(arrived=0, ended=2), second._replace(arrived=1, ended=9), third._replace(arrived=3, ended=4)]
    assert list(said_by(Listener(), rows)) == [0, 0, 1]


# --- rota train length ------------------------------------------------------------------------------------------------


def written(path, rows):
    """A journal of the router; every tenth client leaves, every eleventh engine does not say."""
    with Journal(header_for({}, 0), path=path) as journal:
        for place, each in enumerate(rows):
            journal.append("cluster", Instant(place), "event", RequestArrived(each.request), ())
            length = None if place % 11 == 5 else each.num_output_tokens
            event = RequestFinished(each.request.id, InstanceId("i0"), length)
            journal.append(
                "cluster", Instant(place), "event", ClientLeft(each.request.id) if place % 10 == 3 else event, ()
            )
    return path


def test_a_journal_becomes_a_ranker_that_a_stack_takes(tmp_path):
    journal = written(tmp_path / "run.journal", answered())
    ran = rota("train", "length", journal, "-o", tmp_path / "lengths.json", "--json")
    assert ran.code == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["predictors"]["ranked"]["kendall_tau"] > 0.8
    assert set(report["left_out"].values()) == {60, 50}
    assert report["num_trained"] + report["num_holdout"] == NUM - 60 - 50
    again = rota("train", "length", journal, "-o", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "lengths.json").read_bytes(), "the same, every time"
    assert "drift of ranked" in again.stdout and "their clients left" in again.stderr
    (tmp_path / "trace.toml").write_text(
        'num_requests = 20\n[arrivals]\nrate = 5.0\n[prompt]\nquantiles = {"0" = 9, "1" = 99}\n'
        '[output]\nquantiles = {"0" = 1, "1" = 50}\n'
    )
    (tmp_path / "stack.toml").write_text(
        'order = "shortest_predicted_first"\nlength = "ranked"\n'
        f'[parameters.length]\nmodel = "{tmp_path / "lengths.json"}"\n'
    )
    ran = rota("simulate", "--trace", tmp_path / "trace.toml", "--stack", tmp_path / "stack.toml", "--json")
    assert ran.code == 0, ran.stderr
    (lengths,) = json.loads(ran.stdout)["lengths"]
    assert lengths["predictor"] == "ranked" and not lengths["is_oracle"] and math.isfinite(lengths["bias"])


def test_what_is_wrong_is_said_in_a_line(tmp_path):
    journal = written(tmp_path / "short.journal", answered(num=30))
    out = tmp_path / "out.json"
    for words, said in (
        (("train", "length", journal, "-o", out), "are left to learn from"),
        (("train", "length", tmp_path / "none", "-o", out), "No such file"),
        (("train", "length", journal, "-o", out, "--holdout", "1.5"), "--holdout"),
        (("train", "length", journal, "-o", tmp_path / "no" / "where"), "--output"),
        (("train", "length", written(tmp_path / "empty.journal", []), "-o", out), "no request arrives"),
        (("train", "lenght", journal), "unknown verb"),
    ):
        ran = rota(*words)
        assert ran.code == 2 and ran.stderr.startswith("error: ") and said in ran.stderr, ran.stderr
