"""fetch: what it copies, and what it refuses before weights are read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tasks import fetch
from tasks.models import dense_folder
from tests.support.fetch_stage import TEXTS, edit, refusal


def test_copies_the_model_as_it_is(make_fetch, model_folder: Path) -> None:
    (model_folder / "README.md").write_text("not taken")
    (model_folder / "adapter_config.json").write_text("{}")
    (model_folder / "training_args.bin").write_bytes(b"not taken either")
    stage = make_fetch()
    fetch.run(stage)
    copied = sorted(path.name for path in stage.output("model").iterdir())
    assert copied == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in copied:
        copy, original = stage.output("model") / name, model_folder / name
        assert copy.read_bytes() == original.read_bytes()
        assert not os.path.samefile(copy, original)  # DVC makes its files read-only: not the user's
    model = dense_folder.load_dense(stage.output("model"))
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_corpora_are_normalised(make_fetch) -> None:
    stage = make_fetch()
    fetch.run(stage)
    for name in fetch.CORPORA:
        lines = (stage.output("corpora") / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [{"text": TEXTS[0]}, {"text": TEXTS[3]}]


def test_source_is_deterministic_and_true(make_fetch, model_folder: Path, corpus: Path) -> None:
    first, second = make_fetch(), make_fetch()
    fetch.run(first)
    fetch.run(second)
    text = first.output("source.json").read_text()
    assert text == second.output("source.json").read_text()
    source = json.loads(text)
    weights = (model_folder / "model.safetensors").read_bytes()
    assert source["files"]["model.safetensors"] == {
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert source["model"]["architecture"] == "LlamaForCausalLM"
    assert source["model"] | {"kind": "local", "path": str(model_folder)} == source["model"]
    test = source["corpora"]["test"]
    assert (test["rows"], test["empty_rows_dropped"], test["field"], test["path"]) == (2, 2, "text", str(corpus))


def test_a_sharded_model_stays_sharded(make_fetch, make_model, model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    make_model().save_pretrained(model_folder, max_shard_size="20KB")
    shards = sorted(path.name for path in model_folder.glob("*.safetensors"))
    assert len(shards) > 1
    stage = make_fetch()
    fetch.run(stage)
    assert sorted(path.name for path in stage.output("model").glob("*.safetensors")) == shards
    loaded, built = dense_folder.load_dense(stage.output("model")).state_dict(), make_model().state_dict()
    assert all(torch.equal(loaded[name], built[name]) for name in built)


CONFIGS = {
    "none": (lambda folder: (folder / "config.json").unlink(), "has no config.json, so it is no model folder"),
    "invalid": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds list, expected an object"),
    "architecture": (
        lambda folder: edit(folder / "config.json", architectures=["LlamaWithoutEnd"]),
        "the model's config.json names LlamaWithoutEnd, which is no language model that transformers",
    ),
    "code": (
        lambda folder: edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}),
        "the model's config.json has `auto_map`: it wants to run Python code of its own, which is never done",
    ),
    "nested code": (lambda folder: edit(folder / "config.json", text_config={"auto_map": {}}), "has `auto_map`"),
    "kernel": (
        lambda folder: edit(folder / "config.json", _attn_implementation="someone/kernel"),
        "the model's config.json asks for attention code from elsewhere",
    ),
    "tokenizer code": (
        lambda folder: edit(folder / "tokenizer_config.json", auto_map={}),
        "tokenizer_config.json has `auto_map`: it wants to run Python code, which is never done",
    ),
    "quantised": (
        lambda folder: edit(folder / "config.json", quantization_config={"bits": 4}),
        "the model is quantised already (`quantization_config` in its config.json)",
    ),
    "quantised beside": (
        lambda folder: (folder / "quantize_config.json").write_text("{}"),
        "the model is quantised already (quantize_config.json beside its weights)",
    ),
    "size": (
        lambda folder: edit(folder / "config.json", hidden_size="big"),
        "has hidden_size = 'big', expected a whole",
    ),
    "heads": (
        lambda folder: edit(folder / "config.json", num_attention_heads=0),
        "has num_attention_heads = 0, expected",
    ),
    "sentencepiece alone": (
        lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"),
        "the tokenizer is a tokenizer.model alone, which isn't read here; name a model folder with a tokenizer.json",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "the tokenizer can't be loaded"),
    "large tokenizer": (
        lambda folder: edit(folder / "config.json", vocab_size=95),
        "the tokenizer has 96 tokens, the model's embedding 95 rows (vocab_size)",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_refused_before_weights_are_read(make_fetch, model_folder: Path, no_weights_read, kind: str) -> None:
    alter, sentence = CONFIGS[kind]
    alter(model_folder)
    assert sentence in refusal(make_fetch())


@pytest.mark.parametrize("length, enough", [(36, True), (37, False)])  # one token per character, one for the newline
def test_a_corpus_shorter_than_one_window(make_fetch, no_weights_read, monkeypatch, length: int, enough: bool) -> None:
    stage = make_fetch()
    evaluate = SimpleNamespace(enabled=True, protocol="joined", length=length, stride=length)
    stage.everything = stage.everything.model_copy(update={"evaluate": evaluate})
    if enough:
        with pytest.raises(AssertionError, match="the weights were opened"):
            fetch.run(stage)
        return
    assert refusal(stage) == "corpus test has 36 tokens, 37 are needed; name a longer one, or lower evaluate.length"
