"""A canary judged from a file: which rows count, when the verdict can change, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.algorithms.errors import InputError
from tasks.algorithms.statistics.canary import PROMOTE, ROLLBACK, WATCH
from tasks.parameters.operation_sections import Sla
from tasks.registry import canary_samples

SLA = Sla(share=0.05, p95_latency_ms=100.0, accuracy_drop=0.05, min_samples=100, confidence=0.95)


def write(path: Path, candidate: list[tuple[float, bool]], every: int = 10) -> Path:
    """Rows of v2, after each of them `every` rows of v1 (20 ms, nine of ten right), and some of another version."""
    rows = []
    for latency, correct in candidate:
        rows.append({"version": "v2", "latency_ms": latency, "correct": correct})
        rows += [{"version": "v1", "latency_ms": 20, "correct": i > 0} for i in range(every)]
        rows.append({"version": "v0", "latency_ms": 9999.0, "correct": False})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("good", "latency", "verdict"), [(0.99, 20.0, PROMOTE), (0.5, 20.0, ROLLBACK), (0.99, 150.0, ROLLBACK)]
)
def test_verdicts(tmp_path: Path, good: float, latency: float, verdict: str) -> None:
    path = write(tmp_path / "t.jsonl", [(latency, i >= 400 * (1 - good)) for i in range(400)])
    found = canary_samples.judge(path, "v2", "v1", SLA)
    assert (found.verdict, found.samples) == (verdict, 400)


def test_the_verdict_stays_until_the_samples_have_doubled(tmp_path: Path) -> None:
    good, bad = [(20.0, True)] * 100, [(500.0, False)] * 99
    first = canary_samples.judge(write(tmp_path / "a", good), "v2", "v1", SLA)
    assert canary_samples.judge(write(tmp_path / "b", good + bad), "v2", "v1", SLA) == first
    assert (
        canary_samples.judge(write(tmp_path / "c", good + bad + [(500.0, False)]), "v2", "v1", SLA).verdict == ROLLBACK
    )


def test_too_few_samples_of_either(tmp_path: Path) -> None:
    found = canary_samples.judge(write(tmp_path / "a", [(1.0, True)] * 99), "v2", "v1", SLA)
    assert (found.verdict, found.reason) == (WATCH, "99 of 100 samples of v2")
    found = canary_samples.judge(write(tmp_path / "b", [(1.0, True)] * 120, every=0), "v2", "v1", SLA)
    assert (found.verdict, found.reason) == (WATCH, "0 of 100 samples of v1 to compare with")


HUGE = f'{{"version": "v2", "latency_ms": 1{"0" * 400}, "correct": true}}'
GOOD = '{"version": "v2", "latency_ms": 1, "correct": true}\n'


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2: expected"),
        ("[1]", "line 2: expected"),
        ("[" * 100_000, "line 2: expected"),
        ('{"version": 2, "latency_ms": 1, "correct": true}', "line 2: expected"),
        ('{"version": "v2", "latency_ms": 1, "correct": 1}', "line 2: expected"),
        ('{"version": "v2", "latency_ms": NaN, "correct": true}', "line 2: latency_ms = nan is no number"),
        ('{"version": "v2", "latency_ms": -1, "correct": true}', "line 2: latency_ms = -1 is no number"),
        ('{"version": "v2", "latency_ms": true, "correct": true}', "line 2: latency_ms = True is no number"),
        (HUGE, "line 2: latency_ms = 1000"),
        ('{"version": "v2", "correct": true}', "line 2: latency_ms = None is no number"),
    ],
)
def test_a_line_that_is_no_row(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{GOOD}{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match="t.jsonl, ") as caught:
        canary_samples.judge(path, "v2", "v1", SLA)
    assert sentence in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        canary_samples.read(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="no UTF-8"):
        canary_samples.read(tmp_path / "binary")
