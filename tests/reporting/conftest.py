"""Fixtures of the report's parts: the stage over synthetic results."""

from __future__ import annotations

import pytest

from tests.support import report_page, synthetic_results


@pytest.fixture
def results(tmp_path):
    """The files that the report reads, by the suffix that it asks for."""
    return synthetic_results.write(tmp_path)


@pytest.fixture
def make(results, tmp_path, monkeypatch):
    """make(out="out") -> the stage."""
    return report_page.make(results, tmp_path, monkeypatch)
