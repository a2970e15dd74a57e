"""Progress: lines that a program reads, a bar on a terminal."""

from __future__ import annotations

import re
import sys

import pytest

from tasks.runtime import progress
from tasks.runtime.progress import Progress

PROGRESS = re.compile(r"\[progress\] (\S+) (\d+)/(\d+)((?: \w+=\S+)*) eta=(\d+)s")


def test_progress_lines_can_be_read_and_are_few(monkeypatch, capsys) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("lora", 100) as bar:
        for step in range(1, 101):
            now[0] += 0.1
            bar.update(step, loss=1 / step)
    said = capsys.readouterr().err.splitlines()
    found = [PROGRESS.fullmatch(line) for line in said]
    assert all(found)
    steps = [int(match[2]) for match in found]
    assert steps[0] == 1 and steps[-1] == 100 and len(steps) <= 10 / 2 + 2
    assert {match[1] for match in found} == {"lora"} and {match[3] for match in found} == {"100"}
    assert found[-1][4] == " loss=0.01" and found[-1][5] == "0"
    assert [int(match[5]) for match in found] == pytest.approx([(100 - step) / 10 for step in steps], abs=1)


def test_progress_on_a_terminal_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("gptq", 2) as bar:
        bar.update(1)
        bar.update(2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.count("\r") >= 1 and "gptq 2/2" in said
