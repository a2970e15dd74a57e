"""The machine as Linux tells it: the least limit of memory, the processor's name, and neither where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.parameters import machine


@pytest.mark.parametrize(
    ("texts", "expected"),
    [(["max\n"], None), ([], None), (["4096\n", "max\n"], 4096), (["max\n", "2048\n"], 2048), (["4096", "2048"], 2048)],
)
def test_the_least_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts, expected) -> None:
    paths = [tmp_path / "gone", *(tmp_path / str(number) for number in range(len(texts)))]
    for path, text in zip(paths[1:], texts, strict=True):
        path.write_text(text)
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tuple(paths))
    assert machine.memory_limit() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz \n\nprocessor\t: 1\nmodel name\t: Other\n",
            "Some CPU @ 2 GHz",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50\n", None),
        (None, None),
    ],
)
def test_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text, expected) -> None:
    monkeypatch.setattr(machine, "PROCESSOR", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert machine.processor() == expected
