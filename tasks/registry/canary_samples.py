"""Judge a canary by a telemetry file: JSON lines {"version": "v0.0.2", "latency_ms": 12.5, "correct": true}.

Rows are in the order of time, and the file only grows: a verdict is taken from its beginning up to the last look
(`tasks.algorithms.statistics.canary`), so that it doesn't change until twice as many samples are there. Rows of other
versions are counted and left out; a line that is no such row is refused with its number. It promotes nothing: that is
the caller's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tasks.algorithms.errors import InputError
from tasks.algorithms.statistics import canary
from tasks.parameters.operation_sections import Sla
from tasks.sources import json_lines


def judge(path: Path, candidate: str, promoted: str, sla: Sla) -> canary.Judgement:
    """The verdict on a canary.

    Args:
        candidate, promoted: names of versions.

    Raises:
        InputError: the file can't be read, or a line of it is no row.
    """
    rows = read(path)
    places = [place for place, row in enumerate(rows) if row["version"] == candidate]
    number = canary.look(len(places), sla.min_samples)
    if number is None:
        reason = f"{len(places)} of {sla.min_samples} samples of {candidate}"
        return canary.Judgement(canary.WATCH, reason, len(places), (), None)
    seen = rows[: places[sla.min_samples * 2**number - 1] + 1]
    ours, theirs = _samples(seen, candidate), _samples(seen, promoted)
    if len(theirs.correct) < sla.min_samples:
        reason = f"{len(theirs.correct)} of {sla.min_samples} samples of {promoted} to compare with"
        return canary.Judgement(canary.WATCH, reason, len(ours.correct), (), None)
    return canary.judge(
        ours,
        theirs,
        p95_latency_ms=sla.p95_latency_ms,
        accuracy_drop=sla.accuracy_drop,
        confidence=sla.confidence,
        number=number,
    )


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a telemetry file.

    Raises:
        InputError: it can't be read, or a line of it is no row.
    """
    try:
        return [_checked(path, number, row) for number, row in json_lines.rows(path)]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except json_lines.NoText as bad:
        raise InputError(f"cannot read {path}: it is no UTF-8 text") from bad
    except json_lines.BadLine as bad:
        raise InputError(_expected(path, bad.number)) from bad


def _expected(path: Path, number: int) -> str:
    return f'{path}, line {number}: expected {{"version": "v0.0.1", "latency_ms": 12.5, "correct": true}}'


def _checked(path: Path, number: int, row: Any) -> dict[str, Any]:
    """The row itself, if it is one."""
    if not isinstance(row, dict) or not isinstance(row.get("version"), str) or type(row.get("correct")) is not bool:
        raise InputError(_expected(path, number))
    latency = row.get("latency_ms")
    if type(latency) not in (int, float) or not 0 <= latency <= sys.float_info.max:
        raise InputError(f"{path}, line {number}: latency_ms = {latency!r} is no number of milliseconds")
    return row


def _samples(rows: list[dict[str, Any]], version: str) -> canary.Samples:
    own = [row for row in rows if row["version"] == version]
    return canary.Samples([row["latency_ms"] for row in own], [row["correct"] for row in own])
