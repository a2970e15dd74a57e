"""Copies of a tokenizer in fewer bytes, against the tokenizer itself."""

import json

import tokenizers

from tasks.models import dense_folder
from tasks.models.tokenizer_files import copy_tokenizer
from tests.support.paths import ROOT


def test_merges_are_stored_as_strings_and_make_the_same_tokenizer(tmp_path):
    source = ROOT / "data/base_model/model"
    copy_tokenizer(source, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    given = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(content["model"]["merges"]) > 1000 and all(" " in merge for merge in content["model"]["merges"])
    content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
    assert content == given
    first, second = (dense_folder.load_tokenizer(folder) for folder in (tmp_path, source))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    text = (ROOT / "data/grammar/prose.jsonl").read_text(encoding="utf-8")[:20_000]
    assert first(text).input_ids == second(text).input_ids


def test_a_tokenizer_that_is_no_bpe_or_has_merges_with_blanks_stays_as_it_is(tmp_path):
    blank = tokenizers.models.BPE({"a": 0, " ": 1, "b": 2, "a ": 3, "a b": 4}, [("a", " "), ("a ", "b")])
    for place, model in enumerate((tokenizers.models.WordLevel({"a b": 0, "?": 1}, unk_token="?"), blank)):
        source, folder = tmp_path / f"source{place}", tmp_path / f"folder{place}"
        source.mkdir()
        given = tokenizers.Tokenizer(model)
        given.save(str(source / "tokenizer.json"))
        assert copy_tokenizer(source, folder) == ["tokenizer.json"]
        found = (folder / "tokenizer.json").read_text()
        assert tokenizers.Tokenizer.from_str(found).to_str() == given.to_str()
        assert json.loads(found) == json.loads((source / "tokenizer.json").read_text())
