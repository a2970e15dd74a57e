"""Training of a tiny model on a few of the built-in texts: what is kept is the best point, and the seed decides."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from tasks.algorithms.errors import InputError
from tasks.algorithms.scoring import perplexity
from tasks.built_in_model import tokenizer, training
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
        model = LlamaForCausalLM(training.config(params, bpe))
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


def test_too_little_text_for_a_vocabulary_is_one_sentence() -> None:
    with pytest.raises(InputError, match="the corpus yields 2.. BPE tokens, base_model.vocabulary asks for 400; raise"):
        tokenizer.train_tokenizer(["a"], 400, 32)
