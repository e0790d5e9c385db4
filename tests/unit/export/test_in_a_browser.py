"""Reports in a real browser, where there is one: nothing is asked of the network, in the light and in the dark."""

from pathlib import Path

import plotly.graph_objects as go
import pytest
from tests.browser import CHROMIUM, look

from rota.export.html import Figure, Table, write_report

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


def write(path: Path) -> None:
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4], name="loaves"))
    write_report(path, "Loaves", [Figure("First", figure), Table("Second", [{"a": 1}]), Figure("Third", figure)])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_asks_nothing_of_the_network(tmp_path: Path, scheme: str) -> None:
    page = tmp_path / "report.html"
    write(page)
    looked = look(page, scheme=scheme)
    assert looked.num_figures == 2, "the figures were not drawn"
    assert looked.requests == []
    assert looked.errors == []


def test_a_request_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write(page)
    page.write_text(page.read_text().replace("</h1>", '</h1><img src="http://127.0.0.1:9/x.png">'))
    assert look(page).requests == ["http://127.0.0.1:9/x.png"]


def test_the_page_follows_the_reader_s_scheme(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write(page)
    light, dark = (look(page, scheme=scheme, is_shot=True).screenshot for scheme in ("light", "dark"))
    assert light and dark and light != dark
