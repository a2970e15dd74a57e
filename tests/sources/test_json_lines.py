"""JSON lines: which lines count, and that whatever can't be read is refused by the number of its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.sources import json_lines


@pytest.fixture
def write(tmp_path: Path):
    """write(bytes) -> the file."""

    def written(content: bytes) -> Path:
        path = tmp_path / "a.jsonl"
        path.write_bytes(content)
        return path

    return written


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_are_skipped_wherever_they_are_but_counted(write, end: str) -> None:
    content = end.join(['{"text": "a"}', "", "  \t", '{"text": "naïve 水"}', "", " "])
    assert list(json_lines.rows(write(content.encode()))) == [(1, {"text": "a"}), (4, {"text": "naïve 水"})]
    assert json_lines.read(write(content.encode())) == ["a", "naïve 水"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(write) -> None:
    path = write(b"\xef\xbb\xbf1\n2")
    assert list(json_lines.rows(path)) == [(1, 1), (2, 2)]
    assert list(json_lines.lines(path)) == [(1, "1\n"), (2, "2")]


def test_an_empty_file_has_no_row(write) -> None:
    assert json_lines.read(write(b"")) == []


@pytest.mark.parametrize("line", [b'{"text": ', b"{'text': 1}", b"[" * 100_000, b"1" * 10_000, b"{} {}"])
def test_what_is_no_json_is_refused_by_its_number(write, line: bytes) -> None:
    path = write(b"1\n\n" + line + b"\n2\n")
    with pytest.raises(json_lines.BadLine) as caught:
        list(json_lines.rows(path))
    assert str(caught.value).startswith(f"{path}, line 3: not valid JSON (")
    assert caught.value.number == 3 and not isinstance(caught.value, json_lines.NoText)


@pytest.mark.parametrize("bad", [b"\xff", "Straße".encode("latin-1"), b"\xed\xa0\x80", b"\xe6\xb0"])
def test_what_is_no_utf_8_is_refused_by_its_number_however_far_down(write, bad: bytes) -> None:
    path = write("naïve\n".encode() * 5_000 + bad)
    with pytest.raises(json_lines.NoText, match="a.jsonl: not valid UTF-8 after line 5000; save it as UTF-8") as caught:
        list(json_lines.lines(path))
    assert caught.value.number == 5001


def test_documents_are_read_one_by_one(write) -> None:
    stream = json_lines.documents(write(b'{"text": "a"}\n{'))
    assert next(stream) == "a"
    with pytest.raises(json_lines.BadLine):
        next(stream)
