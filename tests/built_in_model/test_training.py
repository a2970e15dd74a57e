"""Training of a tiny model on a few of the built-in texts: what is kept is the best point, and the seed decides."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import base_model
from tasks.algorithms.errors import InputError
from tasks.algorithms.scoring import perplexity
from tasks.built_in_model import tokenizer, training
from tasks.models import skeleton
from tasks.parameters import schema
from tests.support.built_in_corpus import sample
from tests.support.paths import ROOT

TINY = {"layers": 2, "hidden": 32, "mlp": 48, "vocabulary": 400, "context": 32, "tokens": 1920, "batch": 4}


@pytest.fixture(scope="module")
def params():
    return schema.load(ROOT / "params.yaml").base_model.model_copy(update=TINY)


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train_tokenizer(list(sample("train", 40)), 400, 32)


@pytest.fixture
def train(params, bpe, make_stage):
    """train() -> the model and its curve."""

    def trained():
        tokens = perplexity.tokenise(bpe, list(sample("train", 20))).long()
        held_out = {name: perplexity.windows(tokens, 32, 32, 8) for name in ("calibration", "test")}
        model = training.model(params, bpe)
        curve = training.train(model, tokens, held_out, params, make_stage({}, {}))
        return model, curve

    return trained


def test_the_weights_kept_are_those_of_the_best_point(train, monkeypatch) -> None:
    """The perplexity is made to rise again after the fifth of 15 points."""
    seen = []

    def measured(model, windows, batch):
        seen.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return 1.0 + abs(len(seen) - 9)  # two splits per point, calibration first: the ninth is the fifth's

    monkeypatch.setattr(perplexity, "perplexity", measured)
    model, curve = train()
    assert list(curve["tokens"]) == [128 * step for step in curve["step"]] and curve["tokens"].iloc[-1] == 1920
    assert (len(seen), curve["calibration"].idxmin(), curve["calibration"].min()) == (30, 4, 1.0)
    assert all(torch.equal(weight, seen[8][name]) for name, weight in model.state_dict().items())
    assert not all(torch.equal(weight, seen[-1][name]) for name, weight in model.state_dict().items())


def test_the_seed_decides(train) -> None:
    torch.manual_seed(1)
    first, curve = train()
    torch.manual_seed(2)
    second, again = train()
    assert curve.equals(again) and curve["calibration"].iloc[-1] < curve["calibration"].iloc[0]
    assert all(torch.equal(weight, second.state_dict()[name]) for name, weight in first.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("LlamaForCausalLM", {}), ("GPT2LMHeadModel", {"architecture": "gpt2", "kv_heads": 4})],
)
def test_the_stage_s_folder_is_the_trained_model_for_stock_transformers(
    params, make_stage, tmp_path, architecture, changes
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, rows in (("train", 40), ("calibration", 12), ("test", 12)):
        texts = [json.dumps({"text": text}) for text in sample("train", rows)]
        (corpus / f"{name}.jsonl").write_text("\n".join(texts), encoding="utf-8")
    base_model.run(make_stage({"base_model": params.model_copy(update=changes)}, {"corpus": corpus}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/model")
    assert type(model).__name__ == architecture
    tokens = perplexity.tokenise(tokenizer, list(sample("train", 12)))
    windows = perplexity.windows(tokens, 32, 32, base_model.MEASURED)
    best = pd.read_csv(tmp_path / "out/training.csv")["calibration"].min()
    assert perplexity.perplexity(model.eval(), windows, batch=4) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "last"),
    [("llama", {"self_attn.o_proj", "mlp.down_proj"}), ("gpt2", {"attn.c_proj", "mlp.c_proj"})],
)
def test_what_writes_into_the_residual_stream_starts_at_zero(params, bpe, architecture, last) -> None:
    model = skeleton.with_linears(training.model(params.model_copy(update={"architecture": architecture}), bpe))
    training.initialise(model, torch.Generator().manual_seed(0))
    zero = [name.split(".") for name, weight in model.named_parameters() if not weight.any()]
    assert {".".join(parts[-3:-1]) for parts in zero if parts[-1] == "weight"} == last


def test_too_little_text_for_a_vocabulary_is_one_sentence() -> None:
    with pytest.raises(InputError, match="the corpus yields 2.. BPE tokens, base_model.vocabulary asks for 400; raise"):
        tokenizer.train_tokenizer(["a"], 400, 32)
