"""Taking parts of traces and making more of them: units stay whole, shares are met, nothing is made up."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.workload.test_formats import programs

from rota.base.errors import ConfigError
from rota.base.instant import Duration, seconds
from rota.serving.model.request import TenantId
from rota.serving.workload.arrivals import Arrival, facts_of
from rota.serving.workload.conversion import Conversion
from rota.serving.workload.description import PrefixCache, describe
from rota.serving.workload.formats import WRITTEN, writer_of
from rota.serving.workload.shaping import (
    sample_rows,
    sample_share,
    scale_lengths,
    split_at_random,
    split_in_time,
    superpose,
)
from rota.serving.workload.sorting import groups

SESSIONS = [
    Arrival(seconds(number / 4), 100 + number, 10, (number % 7,), 64, session=f"s{number % 400}")
    for number in range(2000)
]
TRACE = [Arrival(seconds(number / 4), 100 + number, 10, (number % 7, 100 + number), 64) for number in range(2000)]


def sessions_of(rows: list[Arrival]) -> set[str | None]:
    return {row.session for row in rows}


@pytest.mark.parametrize("seed", range(3))
def test_a_share_of_the_sessions_is_taken_whole(seed: int) -> None:
    taken = list(sample_share(SESSIONS, 0.25, seed))
    assert len(sessions_of(taken)) / 400 == pytest.approx(0.25, abs=0.07)
    assert Counter(row.session for row in taken) == Counter(dict.fromkeys(sessions_of(taken), 5))
    assert taken == list(sample_share(SESSIONS, 0.25, seed)) == sorted(taken, key=lambda row: row.at)
    assert taken != list(sample_share(SESSIONS, 0.25, seed + 1))


@pytest.mark.parametrize("num_rows", [1, 7, 500, 1999, 5000])
def test_so_many_rows_are_taken_but_for_the_last_session(num_rows: int) -> None:
    for rows, unit in ((SESSIONS, 5), (TRACE, 1)):
        taken = list(sample_rows(lambda rows=rows: rows, num_rows, 3))  # type: ignore[misc]
        assert min(num_rows, 2000) <= len(taken) < num_rows + unit
        assert len(taken) % unit == 0


@settings(max_examples=50, deadline=None)
@given(programs(), st.floats(0.05, 0.95), st.integers(0, 9))
def test_the_parts_of_a_split_are_the_trace(rows: list[Arrival], share: float, seed: int) -> None:
    rows = [Arrival(row.at, row.num_prompt_tokens, 1, id=row.id, after=row.after, gap=row.gap) for row in rows]
    for split in (
        lambda first: list(split_at_random(rows, share, seed, is_first=first)),
        lambda first: list(split_in_time(rows, round(share * rows[-1].at), is_first=first)),
    ):
        parts = split(True), split(False)
        assert sum(map(len, parts)) == len(rows)
        pieces = [len(piece) for part in parts for piece in groups(part)]
        assert sorted(pieces) == sorted(len(piece) for piece in groups(rows))


def test_a_session_is_where_it_begins_and_the_rest_begins_at_0() -> None:
    parts = [list(split_in_time(SESSIONS, seconds(50), is_first=first)) for first in (True, False)]
    assert not sessions_of(parts[0]) & sessions_of(parts[1])
    assert len(sessions_of(parts[0])) == 200 and len(parts[0]) == 1000
    assert parts[0][0].at == parts[1][0].at == 0


@pytest.mark.parametrize("factor", [1.0, 2.0, 2.5])
def test_copies_add_up_to_the_rate_and_share_nothing(factor: float) -> None:
    rows = list(superpose(lambda: TRACE, factor, 1))
    assert len(rows) == pytest.approx(2000 * factor, rel=0.03)
    assert [row.at for row in rows] == sorted(row.at for row in rows)
    assert max(row.at for row in rows) <= TRACE[-1].at
    before, after = (describe(each, cache_blocks=()).prefix_hits[0].hit_rate for each in (TRACE, rows))
    assert after == pytest.approx(before, abs=0.01)
    named = list(superpose(lambda: SESSIONS, factor, 1))
    assert Counter(row.session for row in named).most_common(1)[0][1] == 5


def test_lengths_are_scaled_and_what_is_shared_stays() -> None:
    rows = [Arrival(Duration(0), 1024, 11, (1, 2)), Arrival(Duration(0), 700, 1, (1, 3))]
    longer = list(scale_lengths(rows, 2.0, 0.5))
    assert [(row.num_prompt_tokens, row.num_output_tokens) for row in longer] == [(2048, 6), (1400, 1)]
    assert [row.hash_block_tokens for row in longer] == [1024, 1024]
    assert [row.prefix_hashes for row in longer] == [(1, 2), (1, 3)]
    assert list(scale_lengths(rows)) == rows
    with pytest.raises(ConfigError, match=r"prompts cannot be 1\.1 times as long"):
        list(scale_lengths(rows, 1.1))


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_shares_that_are_none_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="a share must be"):
        list(sample_share(TRACE, share, 0))


# --- conversion -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(programs(), st.sampled_from([name for name in WRITTEN if name != "agents"]))
def test_what_is_fitted_to_a_format_can_be_written_and_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Arrival], name: str
) -> None:
    path = tmp_path_factory.mktemp("fitted") / "trace"
    writer = writer_of(name)
    conversion = Conversion(name, writer.holds, is_lossy=True)
    fitted = list(conversion.fitted(rows))
    assert writer.write(path, fitted) == len(rows)
    assert list(writer.read(path, None)) == fitted  # type: ignore[attr-defined]
    assert sorted((row.num_prompt_tokens, row.num_output_tokens) for row in fitted) == sorted(
        (row.num_prompt_tokens, row.num_output_tokens) for row in rows
    )
    if not sum(conversion.losses.values()) and name != "mooncake":  # which gives prefixes to rows that had none
        assert [facts_of(row) for row in fitted] == [facts_of(row) for row in rows]


def test_regrouped_prefixes_never_share_more_than_before() -> None:
    first = tuple(range(64))
    rows = [
        Arrival(Duration(0), 1024, 1, first, 16),
        Arrival(Duration(0), 1024, 1, first[:40] + tuple(range(100, 124)), 16),
        Arrival(Duration(0), 1024, 1, tuple(range(200, 264)), 16, tenant=TenantId("t")),
        Arrival(Duration(0), 1024, 1, first, 16),
    ]
    conversion = Conversion("mooncake", frozenset({"prefixes", "tenants"}), is_lossy=True)
    fitted = list(conversion.fitted(rows))
    caches = PrefixCache(None), PrefixCache(None)
    hits = [[cache.take(row) for row in each] for cache, each in zip(caches, (rows, fitted), strict=True)]
    assert hits == [[0, 640, 0, 1024], [0, 512, 0, 1024]]
    assert conversion.losses["prefixes within blocks of 512 tokens"] == 0


def test_blocks_that_do_not_end_where_others_do_share_nothing_rather_than_too_much() -> None:
    first = tuple(range(40))
    rows = [
        Arrival(Duration(0), 1600, 1, first, 48),
        Arrival(Duration(0), 1600, 1, first[:10] + tuple(range(100, 130)), 48),
    ]
    before, after = fitted = list(Conversion("mooncake", frozenset({"prefixes"}), is_lossy=True).fitted(rows))
    # 10 blocks of 48 tokens are shared, less than one of 512; whether two such prompts share it cannot be told.
    assert not set(before.prefix_hashes) & set(after.prefix_hashes)
    assert all(len(row.prefix_hashes) == 4 for row in fitted)
