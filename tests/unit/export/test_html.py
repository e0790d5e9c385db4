"""A report is one page that needs nothing from anywhere else."""

import re
from html.parser import HTMLParser

import plotly.graph_objects as go

from rota.base.provenance import Provenance
from rota.export.html import Figure, Table, Text, write_report

PROVENANCE = Provenance(rota_version="1.2.3", seed=5, config_hash="abc", python="3", platform="p")


class Balance(HTMLParser):
    """Notices tags that are not closed in order."""

    VOID = ("meta", "link", "br")

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(tmp_path, *sections):
    path = tmp_path / "report.html"
    write_report(path, "Ovens & <loaves>", sections, PROVENANCE)
    text = path.read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(text)
    assert balance.open == []
    return text


def test_text_and_tables_are_escaped_and_formatted(tmp_path):
    rows = [
        {"name": "<rye>", "count": 12345, "share": 0.123456, "late": True, "note": None},
        {"name": "oat", "count": None, "share": 98765.4, "late": False, "note": 3},
    ]
    text = page(
        tmp_path, Text("What", "One & two.\n\nThree."), Table("Loaves", rows, "All of them."), Table("None", [])
    )
    assert "<title>Ovens &amp; &lt;loaves&gt;</title>" in text
    assert "<p>One &amp; two.</p>" in text
    assert "<p>Three.</p>" in text
    assert "<td>&lt;rye&gt;</td>" in text
    for cell in ("12,345", "0.1235", "98,765", "–"):
        assert f'<td class="number">{cell}</td>' in text
    assert ">yes<" in text
    assert "(no rows)" in text
    assert "All of them." in text
    assert "rota version: 1.2.3" in text
    assert "journal digest" not in text
    assert len(text) < 10_000, "plotly must not be inlined when there is no figure"


def test_figures_are_inlined_and_nothing_is_fetched(tmp_path):
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4], name="loaves"))
    text = page(tmp_path, Figure("First", figure, "A caption."), Figure("Second", figure))
    assert len(re.findall(r"Plotly\.newPlot\(\s*\"", text)) == 2
    assert 1_000_000 < len(text) < 8_000_000, "the script must be there once"
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', markup) == []
    assert re.findall(r"<script[^>]*\bsrc=", text) == []
