"""Generated workloads have the rate, the burstiness, the quantiles, the shares and the prefixes that were asked for."""

from itertools import pairwise
from statistics import fmean, pstdev

import msgspec
import numpy as np
import pytest

from rota.base.instant import to_seconds
from rota.base.random_streams import RandomStreams
from rota.serving.workload.generator import (
    ArrivalProcess,
    Lengths,
    RequestClass,
    SharedPrefixes,
    SyntheticWorkload,
    generate,
)

QUANTILES = {"0": 16, "0.5": 512, "0.9": 2048, "0.99": 3000, "1": 4096}
BASE = SyntheticWorkload(
    num_requests=20_000,
    arrivals=ArrivalProcess(rate=6.0),
    prompt=Lengths(QUANTILES),
    output=Lengths({"0": 1, "0.5": 128, "1": 1024}),
)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_rate_and_burstiness(cv: float) -> None:
    workload = msgspec.structs.replace(BASE, arrivals=ArrivalProcess(rate=6.0, cv=cv))
    times = [to_seconds(arrival.at) for arrival in generate(workload, RandomStreams(3))]
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    assert min(gaps) >= 0
    assert 1 / fmean(gaps) == pytest.approx(6.0, rel=0.05 * max(1, cv))
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.08)


def test_quantiles_are_met() -> None:
    lengths = [arrival.num_prompt_tokens for arrival in generate(BASE, RandomStreams(3))]
    for at, value in QUANTILES.items():
        got = float(np.quantile(lengths, float(at)))
        assert got == pytest.approx(value, rel=0.05), at
    assert min(lengths) >= 16 and max(lengths) <= 4096


def test_same_seed_same_arrivals_and_streams_are_apart() -> None:
    first = list(generate(BASE, RandomStreams(3)))
    assert first == list(generate(BASE, RandomStreams(3)))
    assert first != list(generate(BASE, RandomStreams(4)))
    faster = generate(msgspec.structs.replace(BASE, arrivals=ArrivalProcess(rate=60.0)), RandomStreams(3))
    assert [arrival.num_prompt_tokens for arrival in faster] == [arrival.num_prompt_tokens for arrival in first]


def test_classes_have_their_share_priority_tenant_and_lengths() -> None:
    classes = (RequestClass(1.0, -1, "gold", output=Lengths({"0": 7, "1": 7})), RequestClass(3.0, 2))
    rows = list(generate(msgspec.structs.replace(BASE, classes=classes), RandomStreams(3)))
    gold = [row for row in rows if row.tenant == "gold"]
    assert len(gold) / len(rows) == pytest.approx(0.25, abs=0.02)
    assert {(row.priority, row.num_output_tokens) for row in gold} == {(-1, 7)}
    assert {(row.tenant, row.priority) for row in rows if row.tenant != "gold"} == {("default", 2)}


def test_prefixes_are_shared_inside_a_group_and_nowhere_else() -> None:
    workload = msgspec.structs.replace(BASE, prefix=SharedPrefixes(num_groups=5, num_tokens=100, share=0.5))
    rows = list(generate(workload, RandomStreams(3)))
    with_prefix = [row.prefix_hashes for row in rows if row.prefix_hashes]
    assert len(with_prefix) / len(rows) == pytest.approx(0.5, abs=0.03)
    whole = {hashes for hashes in with_prefix if len(hashes) == 100 // 16}
    assert len(whole) == 5
    assert len(set().union(*whole)) == 5 * 6
    assert all(any(longest[: len(hashes)] == hashes for longest in whole) for hashes in with_prefix)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ArrivalProcess(rate=0),
        lambda: ArrivalProcess(rate=float("nan")),
        lambda: ArrivalProcess(rate=1, cv=0),
        lambda: Lengths({}),
        lambda: Lengths({"0": 1}),
        lambda: Lengths({"0": 0, "1": 5}),
        lambda: Lengths({"0": 5, "1": 4}),
        lambda: Lengths({"0": 5, "half": 6, "1": 7}),
        lambda: Lengths({"0": 5, "0.5": 6, "0.50": 6, "1": 7}),
        lambda: SharedPrefixes(0, 1),
        lambda: RequestClass(share=-1),
        lambda: msgspec.structs.replace(BASE, num_requests=0),
    ],
)
def test_values_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()  # type: ignore[operator]
