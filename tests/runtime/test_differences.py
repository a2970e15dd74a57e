"""How two files differ, in words, by figures that were planted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tasks.runtime import differences


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "committed", tmp_path / "found"


def told(pair: tuple[Path, Path], name: str, *contents: str) -> str:
    for path, content in zip(pair, contents, strict=True):
        path.write_text(content)
    return differences.between(*pair, name)


def test_figures_of_json_by_the_largest_relative_one(pair) -> None:
    old = {"a": [1.0, 2.0, 100.0], "b": {"c": 5, "name": "x"}, "same": True}
    new = {"a": [1.0, 2.5, 101.0], "b": {"c": 5, "name": "y"}, "same": True, "more": 1}
    said = told(pair, "metrics.json", json.dumps(old), json.dumps(new))
    assert said == "2 of 4 figures, by at most 0.2 of their size (a[1]); 1 texts (b.name); other entries (more)"
    assert told(pair, "m.json", '{"a": 1}', '{"a":  1}') == "the same figures, written otherwise"
    assert told(pair, "m.json", '{"a": 1}', '{"a": ').startswith("can't be compared: ")


def test_figures_of_csv_by_column_and_row(pair) -> None:
    said = told(pair, "t.csv", "n,x,w\n1,10,a\n2,20,b\n", "n,x,w\n1,10,a\n2,25,c\n")
    assert said == "1 of 4 figures, by at most 0.2 of their size (x, row 2); 1 texts (w, row 2)"
    assert told(pair, "t.csv", "n\n1\n", "n\n1\n2\n") == "2 rows, committed 1"


def test_values_of_tensors(pair) -> None:
    one = {"a": torch.arange(1.0, 11.0), "b": torch.ones(5, dtype=torch.bfloat16), "i": torch.arange(3)}
    other = {name: value.clone() for name, value in one.items()}
    other["a"][3], other["b"][1], other["i"][0] = 5.0, 1.5, 7
    for path, tensors in zip(pair, (one, other), strict=True):
        save_file(tensors, path)
    assert differences.between(*pair, "m.safetensors") == "3 of 18 values, by at most 1 of their size (i)"
    other["b"], other["z"] = torch.ones(6), torch.zeros(1)
    other["i"][0] = 0
    save_file(other, pair[1])
    said = "1 of 13 values, by at most 0.2 of their size (a); 1 tensors of another shape or type (b); other tensors (z)"
    assert differences.between(*pair, "m.safetensors") == said
    pair[1].write_bytes(pair[1].read_bytes()[:50])
    assert differences.between(*pair, "m.safetensors").startswith("can't be compared: ")


def test_lines_and_bytes(pair) -> None:
    assert told(pair, "v.txt", "a\nb\nc\n", "a\nx\nc\n") == "1 of 4 lines"
    assert told(pair, "unknown", "abc", "abcd") == "4 bytes, committed 3"


def test_a_relative_difference_is_that_by_the_larger() -> None:
    assert differences.relative(4.0, 5.0) == differences.relative(-5.0, -4.0) == pytest.approx(0.2)
    assert differences.relative(math.nan, math.nan) == differences.relative(0.0, -0.0) == 0
    assert differences.relative(math.inf, 1.0) == differences.relative(math.nan, 1.0) == math.inf
