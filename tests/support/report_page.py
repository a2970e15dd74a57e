"""The report's page of synthetic results, read as tables."""

from __future__ import annotations

import functools
import re
from html.parser import HTMLParser

from tasks import report
from tasks.reporting import chart_style
from tests.support import synthetic_results

AGAINST, STAGES = 0, 1
"""Which of the page's tables they are."""
ORIGINAL, DRAW = report.vl_convert.javascript_bundle, report.vl_convert.vegalite_to_svg


@functools.cache
def bundle():
    """Vega's script, once for many pages: it takes most of their time."""
    return ORIGINAL(vl_version=chart_style.VEGA_LITE)


def make(results, folder, monkeypatch):
    """make(out="out") -> the stage over these results, which draws no chart: each takes a third of a second."""
    monkeypatch.setattr(report.vl_convert, "javascript_bundle", lambda vl_version: bundle())
    monkeypatch.setattr(report.vl_convert, "vegalite_to_svg", lambda spec, vl_version: "<svg/>")
    return lambda out="out": synthetic_results.report_stage(folder, results, out)


def page(stage):
    report.run(stage)
    return stage.output("report.html").read_text(encoding="utf-8")


def sentences(stage):
    report.run(stage)
    return stage.output("verdict.txt").read_text().splitlines()


def cells(text):
    """The rows of every HTML table, as texts of their cells."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tables, self.inside = [], False

        def handle_starttag(self, tag, attrs):
            if tag == "table":
                self.tables.append([])
            elif tag == "tr":
                self.tables[-1].append([])
            elif tag in ("td", "th"):
                self.tables[-1][-1].append("")
                self.inside = True
            elif tag in ("small", "br") and self.inside:
                self.tables[-1][-1][-1] += " "

        def handle_endtag(self, tag):
            self.inside = self.inside and tag not in ("td", "th")

        def handle_data(self, data):
            if self.inside:
                self.tables[-1][-1][-1] += data

    reader = Reader()
    reader.feed(re.sub(r"<script.*?</script>", "", text, flags=re.S))
    return reader.tables


def table_after(text, mark):
    return cells(text[text.index(mark) :])[0]


def evaluation(test, ood, size=1000, **given):
    return {
        "evaluated": True,
        "protocol": "p",
        "perplexity": {"test": test, "test_ood": ood},
        "bits_per_byte": {"test": 2.0, "test_ood": 2.01},
        "predictions": {"test": 7, "test_ood": 7},
        "bytes": {"total": size},
    } | given
