"""Every report in a real browser, where there is one: figures are drawn, nothing is asked of the network."""

from pathlib import Path

import pytest
from tests.browser import CHROMIUM, look
from tests.command_line import rota

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]

WORKLOAD = """
num_requests = 80
[arrivals]
rate = 12.0
[prompt]
quantiles = {"0" = 16, "0.5" = 400, "1" = 2048}
[output]
quantiles = {"0" = 1, "0.5" = 60, "1" = 200}
[[classes]]
share = 0.5
[[classes]]
share = 0.5
priority = 1
tenant = "other"
"""
COMMANDS = {
    "simulate": "simulate --trace workload.toml",
    "compare": "compare default default --trace workload.toml --repeats 2 --jobs 1",
    "size": "size --trace workload.toml --slo ttft=9s --search-seeds 0 --check-seeds 2 --jobs 1",
    "sweep": "sweep --set trace=workload.toml --vary instances=1,2 --vary rate=6:12:2 --jobs 1",
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_report_is_drawn_and_asks_nothing_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "workload.toml").write_text(WORKLOAD)
    ran = rota(*COMMANDS[verb].split(), "--report", "report.html")
    assert ran.code == 0, ran.stderr
    for scheme in ("light", "dark"):
        looked = look(tmp_path / "report.html", scheme=scheme)
        assert looked.num_figures >= 3
        assert (looked.requests, looked.errors) == ([], [])
