"""The report says what the run was, offline, in bounded size, and names what it leaves out."""

import re
from pathlib import Path

import msgspec

from rota.base.instant import Instant, milliseconds, seconds
from rota.base.provenance import provenance
from rota.export.html import Figure, Table
from rota.serving.metrics.charts import NUM_POINTS_MAX, latency_figure, load_figure
from rota.serving.metrics.columns import by_class, columns_of
from rota.serving.metrics.definitions import RequestRecord, Samples
from rota.serving.metrics.load import load_over_time
from rota.serving.metrics.report import (
    NUM_INSTANCES_MAX,
    instance_rows,
    rates_figure,
    run_sections,
    write_run_report,
)
from rota.serving.metrics.summary import RunFacts, Summary, summarize
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import RequestId, TenantId

FACTS = RunFacts(
    num_steps=7,
    num_preemptions=3,
    num_cached_tokens=25,
    num_queried_tokens=100,
    cpu_seconds=1.5,
    peak_rss_mb=80.0,
    seed=4,
    config_hash="ab",
    journal_digest=None,
    version="0.1.0",
)


def make(num_requests: int, num_instances: int = 2) -> tuple[list[RequestRecord], Summary, dict[InstanceId, Samples]]:
    rows = [
        RequestRecord(
            id=RequestId(f"r{i}"),
            tenant=TenantId(f"tenant-{i % 3}"),
            priority=i % 2,
            arrived_at=Instant(seconds(i)),
            first_token_at=Instant(seconds(i) + milliseconds(50 + i % 97)) if i % 10 else None,
            finished_at=Instant(seconds(i + 1)),
            num_prompt_tokens=100,
            num_output_tokens=20 if i % 10 else 0,
            status="finished" if i % 10 else "rejected",
            reason="" if i % 10 else "<b>queue full</b>",
            instance_id=InstanceId(f"i{i % num_instances}") if i % 10 else None,
        )
        for i in range(num_requests)
    ]
    at = list(range(0, num_requests * 10**9, 10**8))
    samples = {
        InstanceId(f"i{n}"): Samples(at, [n + 1] * len(at), [0] * len(at), [25] * len(at)) for n in range(num_instances)
    }
    return rows, summarize(rows, FACTS), samples


def test_report_is_one_offline_page(tmp_path: Path) -> None:
    rows, summary, samples = make(3000)
    path = tmp_path / "report.html"
    blocks = dict.fromkeys(samples, 100)
    where = provenance(seed=4, config_hash="ab")
    write_run_report(path, "A run", records=rows, summary=summary, samples=samples, num_blocks=blocks, provenance=where)
    page = path.read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.https?:", page)
    for heading in ("By class", "By tenant", "By instance", "Load over time", "did not finish", "tenant-2"):
        assert heading in page
    assert "&lt;b&gt;queue full" in page and "<b>queue full" not in page
    assert len(page) < 8_000_000
    write_run_report(
        tmp_path / "more.html", "More", records=rows * 20, summary=summary, samples=samples, num_blocks=blocks
    )
    assert abs((tmp_path / "more.html").stat().st_size - len(page)) < 200_000, (
        "the page grows with the number of requests"
    )


def test_figures_hold_what_happened() -> None:
    rows, _, samples = make(3000)
    columns = columns_of(rows)
    latency = latency_figure(by_class(columns))
    assert [line.name for line in latency.data] == ["class 0"] * 3 + ["class 1"] * 3
    ttft = latency.data[0]
    assert (ttft.x[0], ttft.y[0], ttft.y[-1]) == (50.0, 0.0, 1.0)
    assert max(ttft.x) <= 146 and len(ttft.x) == NUM_POINTS_MAX
    rates = rates_figure(columns)
    assert [line.name for line in rates.data] == ["arrived", "in time"]
    assert [round(line.y[0], 2) for line in rates.data] == [1.0, 0.9]
    both = load_figure({"fleet": load_over_time(samples, dict.fromkeys(samples, 100))})
    assert [line.y[-1] for line in both.data] == [3, 0, 0.75]
    assert (both.data[0].x[0], both.data[0].x[-1]) == (0, 2999.9)


def test_load_is_a_step_function_summed_over_instances() -> None:
    second = 10**9
    samples = {
        InstanceId("a"): Samples([0, 4 * second], [1, 2], [5, 0], [10, 4]),
        InstanceId("b"): Samples([2 * second], [7], [1], [0]),
    }
    load = load_over_time(samples, {InstanceId("a"): 10, InstanceId("b"): 10}, num_points=5)
    assert load.seconds.tolist() == [0, 1, 2, 3, 4]
    assert load.running.tolist() == [1, 1, 8, 8, 9]
    assert load.waiting.tolist() == [5, 5, 6, 6, 1]
    assert load.share_in_use.tolist() == [0, 0, 0.5, 0.5, 0.8]


def test_of_many_instances_the_busiest_are_drawn_and_the_caption_says_so() -> None:
    rows, summary, samples = make(100, num_instances=20)
    blocks = dict.fromkeys(samples, 100)
    (load,) = [s for s in run_sections(rows, summary, samples, blocks) if s.heading == "Load over time"]
    assert isinstance(load, Figure)
    assert load.caption == f"The {NUM_INSTANCES_MAX} busiest of 20 instances."
    assert {line.name for line in load.figure.data} == {f"i{n}" for n in range(12, 20)}


def test_instances_get_what_they_served() -> None:
    rows, _, _ = make(20)
    assert instance_rows(rows) == [
        {"instance": "i0", "requests": 8, "finished": 8, "prompt tokens": 800, "output tokens": 160},
        {"instance": "i1", "requests": 10, "finished": 10, "prompt tokens": 1000, "output tokens": 200},
        {"instance": None, "requests": 2, "finished": 0, "prompt tokens": 200, "output tokens": 0},
    ]


def test_a_run_of_nothing_has_a_report(tmp_path: Path) -> None:
    summary = summarize([], FACTS)
    write_run_report(tmp_path / "r.html", "Nothing", records=[], summary=summary, samples={}, num_blocks={})
    assert "nothing to draw" in (tmp_path / "r.html").read_text()


def test_many_tenants_are_cut_and_counted() -> None:
    rows, _, samples = make(200)
    rows = [msgspec.structs.replace(row, tenant=TenantId(f"t{i}")) for i, row in enumerate(rows)]
    sections = run_sections(rows, summarize(rows, FACTS), samples, dict.fromkeys(samples, 100))
    (table,) = [section for section in sections if section.heading == "By tenant"]
    assert isinstance(table, Table)
    assert (len(table.rows), table.caption) == (50, "150 tenants with fewer requests are left out.")
