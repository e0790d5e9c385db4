"""Our engine beside two real ones: each bound that `python -m benchmarks.truth.real_runs` prints is kept."""

import re
from pathlib import Path

import numpy as np
import pytest
from benchmarks.truth import real_runs

ROWS = {(row.case, row.quantity): row for row in real_runs.rows()}


@pytest.mark.parametrize("card", real_runs.CARDS)
def test_every_bound_is_kept(card: str) -> None:
    bounded = [row for row in ROWS.values() if row.case == card and row.bound is not None]
    assert sorted(row.quantity for row in bounded) == sorted(
        f"{what} {m}" for what in ("mean", "p99") for m in real_runs.BOUNDS
    )
    missed = [f"{row.quantity}: {row.error:+.1%} of {row.bound:.0%}" for row in bounded if row.verdict != "holds"]
    assert not missed, missed


def test_the_run_in_overload_takes_the_engines_own_capacity() -> None:
    limits, is_derived = real_runs.limits_of("RTX4090")
    assert (limits.num_blocks, limits.max_num_seqs, is_derived) == (2587, 256, False)
    assert real_runs.replay("RTX4090").num_preemptions > 100


def test_queue_and_memory_follow_the_engine_second_by_second() -> None:
    real = real_runs.real_series("RTX4090")
    ours = real_runs.at_times(real_runs.replay("RTX4090").series, real.at)
    assert np.abs(ours.kv_use - real.kv_use).mean() < 0.03
    assert np.abs(ours.waiting - real.waiting).mean() < 2
    assert np.abs(ours.running - real.running).mean() < 1.5


def test_blocks_have_the_same_name_where_all_tokens_before_are_the_same() -> None:
    requests = [request for request, _ in real_runs.workload(16)]
    assert all(len(request.block_hashes) == request.num_prompt_tokens // 16 for request in requests)
    names = [name for request in requests for name in request.block_hashes]
    assert len(set(names)) < len(names), "some prompts begin alike"


def test_the_page_opens_offline(tmp_path: Path) -> None:
    real_runs.write_html(tmp_path / "runs.html")
    text = (tmp_path / "runs.html").read_text(encoding="utf-8")
    assert "RTX4090: KV use" in text and not re.search(r"<(script|link|img)[^>]+http", text)


@pytest.mark.parametrize("card", real_runs.CARDS)
def test_leaping_is_stepping_where_unlike_decodes_cost(card: str) -> None:
    leapt = real_runs.replay(card, skew=True).latencies
    stepped = real_runs.replay(card, skew=True, leap=False).latencies
    for name in real_runs.BOUNDS:
        assert np.array_equal(getattr(leapt, name), getattr(stepped, name))
