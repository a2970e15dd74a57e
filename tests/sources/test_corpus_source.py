"""Corpora of files and of the hub: formats, what is refused, and how much is read."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import datasets
import pandas
import pyarrow
import pytest
from pyarrow import parquet

from tasks import fetch
from tasks.algorithms.errors import InputError
from tasks.sources import corpus_source
from tests.support.fetch_stage import REVISION, TEXTS, refusal


@pytest.mark.parametrize(
    ("name", "write", "row"),
    [
        ("a.txt", lambda path: path.write_text("one\n\ntwo", encoding="utf-8"), 1),
        (
            "a.parquet",
            lambda path: pandas.DataFrame({"text": ["one", None, "two"], "n": [1, 2, 3]}).to_parquet(path),
            1,
        ),
        (
            "a.jsonl",
            lambda path: path.write_text('\ufeff{"text": "one"}\n\n{"text": null}\n{"text": "two"}', encoding="utf-8"),
            1,
        ),
    ],
)
def test_local_formats(make_fetch, tmp_path: Path, name: str, write, row: int) -> None:
    write(tmp_path / name)
    stage = make_fetch(test={"path": str(tmp_path / name)})
    fetch.run(stage)
    frame = pandas.read_json(stage.output("corpora") / "test.jsonl", lines=True)
    assert list(frame["text"]) == ["one", "two"]
    assert json.loads(stage.output("source.json").read_text())["corpora"]["test"]["empty_rows_dropped"] == row


CORPORA = {
    "missing": ("gone.jsonl", None, "fetch.corpora.test.path = {path} is no .jsonl, .parquet, .txt file; name one"),
    "suffix": ("a.csv", b"text\none\n", "fetch.corpora.test.path = {path} is no .jsonl, .parquet, .txt file; name one"),
    "no rows": ("a.jsonl", b"", "corpus test ({path}) is empty: 0 rows, none with text; name another"),
    "no text": ("a.txt", b"\n \n", "corpus test ({path}) is empty: 2 rows, none with text; name another"),
    "column": ("a.jsonl", b'{"body": "x"}\n', "{path}, line 1: no column `text`, only body; set `field`"),
    "json": ("a.jsonl", b'{"text": "x"}\n{"text": \n', "{path}, line 2: not valid JSON (Expecting value"),
    "list": ("a.jsonl", b'["x"]\n', "{path}, line 1: holds list, expected an object with `text`"),
    "type": ("a.jsonl", b'{"text": 5}\n', "line 1 of corpus test: `text` is int, expected text"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 of corpus test is no valid Unicode"),
    "latin-1": ("a.txt", "Straße".encode("latin-1"), "{path}: not valid UTF-8 after line 0; save it as UTF-8"),
    "parquet": ("a.parquet", b"PAR1", "{path} is no valid parquet file"),
}


@pytest.mark.parametrize("kind", CORPORA)
def test_bad_corpora(make_fetch, tmp_path: Path, no_weights_read, kind: str) -> None:
    name, content, sentence = CORPORA[kind]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refusal(make_fetch(test={"path": str(tmp_path / name)}))
    asked, declared = str(tmp_path / name), os.path.relpath(tmp_path / name)  # as in params.yaml, as in dvc.yaml
    assert message.startswith((sentence.format(path=asked), sentence.format(path=declared)))


def test_wrong_column_of_a_parquet_file(make_fetch, tmp_path: Path) -> None:
    pandas.DataFrame({"body": ["x"]}).to_parquet(tmp_path / "a.parquet")
    assert "no column `text`, only body; set `field`" in refusal(make_fetch(test={"path": str(tmp_path / "a.parquet")}))


def damage(path: Path, kind: str) -> None:
    """A parquet file of 2000 rows: a page with other bytes, a page header without sense, a text that is no UTF-8."""
    if kind == "text":
        column = pyarrow.array([b"one", b"\xff\xfe"], pyarrow.binary())
        column = pyarrow.Array.from_buffers(pyarrow.string(), 2, column.buffers())
        parquet.write_table(pyarrow.table({"text": column}), path)
        return
    texts = [f"The pump {row} shall stop, and report it {'x' * (row % 50)}." for row in range(2000)]
    parquet.write_table(pyarrow.table({"text": texts}), path, compression="snappy", use_dictionary=False)
    content = bytearray(path.read_bytes())
    if kind == "page":
        content[4000:4200] = bytes(200)
    else:
        content[4:24] = b"\xff" * 20
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("page", "a.parquet is no valid parquet file (Corrupt snappy compressed data.); write it again"),
        ("header", "a.parquet is no valid parquet file (Couldn't deserialize thrift"),
        ("text", "a.parquet, after row 0: `text` is no UTF-8 text (invalid start byte); write it again"),
    ],
)
def test_a_damaged_parquet_file(make_fetch, tmp_path: Path, no_weights_read, kind: str, sentence: str) -> None:
    damage(tmp_path / "a.parquet", kind)
    assert sentence in refusal(make_fetch(test={"path": str(tmp_path / "a.parquet")}))


def test_a_disk_that_fails_is_not_the_file_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(parquet, "ParquetFile", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(corpus_source.READERS[".parquet"](tmp_path / "a.parquet", "text"))


def test_a_long_corpus_is_tokenised_only_as_far_as_needed(tmp_path: Path) -> None:
    corpus, asked = tmp_path / "train.jsonl", []

    def tokenizer(text: str, **_) -> dict:
        asked.append(text.count("\n") + 1)
        return {"input_ids": text.split()}

    corpus.write_text(json.dumps({"text": "two words"}) + "\n", encoding="utf-8")
    corpus.write_text(corpus.read_text(encoding="utf-8") * 10_000, encoding="utf-8")
    corpus_source.check_length(corpus, tokenizer, 300, "lora.length")
    assert asked == [64, 256]
    with pytest.raises(InputError, match="has 20000 tokens, 20001 are needed"):
        corpus_source.check_length(corpus, tokenizer, 20_001, "lora.length")
    assert asked[-1] == 10_000


DATA = {"hub": "a/data", "revision": REVISION, "config": "small", "split": "test", "field": "body"}


def test_hub_data_sets_are_pinned(make_fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*positional, **named):
        calls.append((positional, named))
        return datasets.Dataset.from_dict({"body": TEXTS, "n": [1, 2, 3, 4]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    stage = make_fetch(test=DATA)
    fetch.run(stage)
    assert not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    assert calls == [(("a/data", "small"), {"split": "test", "revision": REVISION})]
    source = json.loads(stage.output("source.json").read_text())["corpora"]
    assert source["test"]["rows"] == 2 and source["test"]["hub"] == "a/data" and source["test"]["revision"] == REVISION
    assert source["test"]["sha256"] == source["train"]["sha256"]
    assert "no column `text`, only body, n" in refusal(make_fetch(test=DATA | {"field": "text"}))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (datasets.exceptions.DatasetNotFoundError("not there"), f"the hub has no data set a/data at {REVISION}"),
        (ConnectionError("no network"), "the hub can't be reached for data set a/data"),
        (
            ValueError("BuilderConfig 'small' not found.\nmore"),
            "data set a/data can't be loaded: BuilderConfig 'small' not found.",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "data set a/data can't be loaded: Dataset scripts"),
    ],
)
def test_data_sets_that_fail(
    make_fetch, monkeypatch: pytest.MonkeyPatch, no_weights_read, error: Exception, sentence: str
) -> None:
    def load(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert refusal(make_fetch(test=DATA)).startswith(sentence)
