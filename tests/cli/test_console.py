"""Tables as text and on a terminal, and JSON that a script can read."""

from __future__ import annotations

import json
import re

from tasks.cli import console


def test_a_table_without_a_terminal_is_a_line_per_row_however_wide(capsys) -> None:
    wide = "x" * 500
    rows = [["a", "1,234", wide], ["b", "5", ":smile: [b]"]]
    console.show(console.table(["name", "bytes", "why"], rows, left=["why"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "name  bytes  why"
    assert set(lines[1]) == {"-"} and len(lines[1]) == len(lines[2])
    assert lines[2:] == [f"a     1,234  {wide}", "b         5  :smile: [b]"]


def test_a_row_that_is_none_is_a_rule() -> None:
    lines = console.text(console.table(["name", "n"], [["a", "1"], None, ["b", "22"]])).splitlines()
    assert lines == ["name   n", "--------", "a      1", "--------", "b     22"]


def test_on_a_terminal_long_cells_are_folded(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    console.show(console.table(["name", "why"], [["a", "one two three four five"]], left=["why"]), "a sentence")
    lines = re.sub("\033.*?m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 20 and len(lines) > 4 and lines[-1] == "a sentence"


def test_json_has_no_number_that_json_does_not_have(capsys) -> None:
    console.show_json({"b": (1.5, float("nan")), "a": [{"c": float("inf")}]})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": [{"c": None}], "b": [1.5, None]} and out.index('"a"') < out.index('"b"')
