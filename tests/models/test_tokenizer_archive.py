"""The tokenizer's archive: what comes out is what went in, whatever that is; what is damaged is refused."""

from __future__ import annotations

import bz2
import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tasks.algorithms.errors import InputError
from tasks.models import dense_folder, model_files, tokenizer_archive
from tasks.models.tokenizer_files import copy_tokenizer
from tests.support.paths import ROOT

BUILT_IN = ROOT / "data/base_model/model"
BPE = {"version": "1.0", "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"]}}


def compact(content: object) -> str:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


@pytest.fixture
def built_in(tmp_path: Path) -> Path:
    copy_tokenizer(BUILT_IN, tmp_path / "plain")
    return tmp_path / "plain"


def packed(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    tokenizer_archive.pack(target)
    return target


def test_the_built_in_tokenizer_takes_a_sixth_and_comes_back(built_in: Path, tmp_path: Path) -> None:
    folder = packed(built_in, tmp_path / "packed")
    before = {path.name: path.read_bytes() for path in built_in.iterdir()}
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) - set(after) == {"tokenizer.json", "tokenizer_config.json"}
    assert 6 * len(after[model_files.ARCHIVE]) < len(before["tokenizer.json"])
    with tokenizer_archive.unpacked(folder) as path:
        found = {each.name: each.read_bytes() for each in path.iterdir()}
        stock = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert found == before and not path.exists()
    text = 'The pump shall ≥ 3 µm, naïve — "ok"\n\t日本'
    tokenizers = [dense_folder.load_tokenizer(each) for each in (built_in, folder)]
    first, second, third = (one(text).input_ids for one in (*tokenizers, stock))
    assert first == second == third and tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    grown = sum(map(len, before.values())) - sum(map(len, after.values()))
    assert tokenizer_archive.added_bytes(folder) == grown and tokenizer_archive.added_bytes(built_in) == 0


def test_it_is_copied_unpacked_and_packs_to_the_same_bytes(built_in: Path, tmp_path: Path) -> None:
    folder = packed(built_in, tmp_path / "packed")
    names = copy_tokenizer(folder, tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == {
        path.name: path.read_bytes() for path in built_in.iterdir()
    }
    assert sorted(names) == sorted(path.name for path in built_in.iterdir())
    again = packed(tmp_path / "copy", tmp_path / "again")
    assert (again / model_files.ARCHIVE).read_bytes() == (folder / model_files.ARCHIVE).read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        compact(BPE),
        compact(BPE | {"model": BPE["model"] | {"vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}}}),  # a token behind
        compact(BPE | {"model": BPE["model"] | {"vocab": {"<s>": 0, "ab": 1, "a": 2, "b": 3}}}),  # in another place
        compact(BPE | {"model": BPE["model"] | {"vocab": {"<s>": 1, "a": 0, "b": 2, "ab": 3}}}),  # ids in disorder
        compact(BPE | {"model": BPE["model"] | {"vocab": {"<s>": 5, "a": 6, "b": 7, "ab": 9}}}),  # with gaps
        compact(BPE | {"model": BPE["model"] | {"merges": []}}),
        compact(BPE | {"model": BPE["model"] | {"merges": [["a", "b"]]}}),
        compact(BPE | {"model": BPE["model"] | {"merges": ["a b", "a b"]}}),
        compact(BPE | {"model": BPE["model"] | {"vocab": [["a"], []]}}),
        compact({"model": {"type": "WordPiece", "vocab": {"a": 0}}}),
        compact({"model": 5}),
        json.dumps(BPE, indent=2),
        '{"a":1,"a":2}',
        '{"a":1.0e5}',
        "{ broken",
        '"text"',
        "[1,2]",
        "",
        "null",
    ],
)
def test_every_text_comes_back_to_the_character(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes(b"#version\r\na b\n")
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xfe\x00")  # no text: stays
    tokenizer_archive.pack(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [model_files.ARCHIVE, "tokenizer.model"]
    assert tokenizer_archive.read(tmp_path) == {"tokenizer.json": text, "merges.txt": "#version\r\na b\n"}
    with tokenizer_archive.unpacked(tmp_path) as path:
        assert (path / "merges.txt").read_bytes() == b"#version\r\na b\n"
        assert (path / "tokenizer.model").read_bytes() == b"\xff\xfe\x00"


def test_a_folder_without_a_tokenizer_stays_as_it_is(tmp_path: Path) -> None:
    tokenizer_archive.pack(tmp_path)
    assert list(tmp_path.iterdir()) == [] and tokenizer_archive.read(tmp_path) == {}
    with tokenizer_archive.unpacked(tmp_path) as path:
        assert path == tmp_path


def test_damaged_archives_are_refused_or_the_same(built_in: Path, tmp_path: Path) -> None:
    folder = packed(built_in, tmp_path / "packed")
    path, expected, chance = folder / model_files.ARCHIVE, tokenizer_archive.read(folder), random.Random(0)
    whole, refused = path.read_bytes(), 0
    for _ in range(300):
        data, at = bytearray(whole), chance.randrange(len(whole))
        how = chance.randrange(4)
        if how == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            data += chance.randbytes(chance.randrange(1, 9))
        else:
            data[at : at + 4] = chance.randbytes(4)
        path.write_bytes(data)
        try:
            assert tokenizer_archive.read(folder) == expected
        except InputError as error:
            assert "tokenizer.bz2 is damaged" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 290


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"5",
        b"[" * 100_000,
        b'{"../evil":"x"}',
        b'{"config.json":"{}"}',
        b'{"tokenizer.json":5}',
        b'{"tokenizer.json":{"model":{"vocab":[1],"merges":[]}}}',
        b'{"tokenizer.json":{"model":{"vocab":[["a"],[]],"merges":[5]}}}',
        b'{"tokenizer.json":{"model":{"vocab":[["a"],[{}]],"merges":[]}}}',
    ],
)
def test_archives_of_something_else_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / model_files.ARCHIVE).write_bytes(bz2.compress(content))
    with pytest.raises(InputError, match="tokenizer.bz2 is damaged"):
        tokenizer_archive.read(tmp_path)
    with pytest.raises(InputError, match="tokenizer.bz2 is damaged"):
        dense_folder.load_tokenizer(tmp_path)


def test_one_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "LARGEST", {"tokenizer.json": 2**20})
    content = compact({"tokenizer.json": " " * 2**21}).encode()
    (tmp_path / model_files.ARCHIVE).write_bytes(bz2.compress(content))
    with pytest.raises(InputError, match="more than 1048576 bytes"):
        tokenizer_archive.read(tmp_path)
