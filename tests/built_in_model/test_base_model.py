"""The built-in base model: the promised shape, a tokenizer that loses nothing, and better than a 5-gram model."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from tasks.algorithms.model import shape
from tasks.algorithms.scoring import perplexity
from tasks.built_in_model import documents, splits
from tasks.models import dense_folder, tensor_headers
from tests.support.built_in_corpus import load
from tests.support.kneser_ney import KneserNey
from tests.support.paths import ROOT

MODEL = ROOT / "data/base_model/model"


@pytest.fixture(scope="module")
def tokenizer():
    return dense_folder.load_tokenizer(MODEL)


def test_it_has_the_promised_shape() -> None:
    entries = tensor_headers.entries(MODEL)
    parameters = sum(int(np.prod(entry.shape)) for entry in entries.values())
    assert 2_500_000 < parameters < 2_700_000
    assert "lm_head.weight" not in entries  # tied
    assert all(columns % 128 == 0 for _, columns in shape.shape_of_config(dense_folder.config(MODEL)).linears.values())
    assert 2 * parameters > 4 * 2**20  # in bf16 it does not fit Siracusa's weight memory


def test_its_weights_are_those_of_its_parameters() -> None:
    p = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["base_model"]
    config = dense_folder.config(MODEL)
    named = {"layers": "num_hidden_layers", "hidden": "hidden_size", "mlp": "intermediate_size"}
    named |= {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "vocabulary": "vocab_size"}
    assert {key: config[value] for key, value in named.items()} == {key: p[key] for key in named}
    assert config["model_type"] == p["architecture"]


def test_the_gpt_2_is_of_the_same_size_text_and_tokens() -> None:
    folder = ROOT / "data/gpt2_model"
    config, entries = dense_folder.config(folder / "model"), tensor_headers.entries(folder / "model")
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert sum(int(np.prod(entry.shape)) for entry in entries.values()) == 2_707_200
    assert (folder / "model/tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()
    curve = pd.read_csv(folder / "training.csv")
    assert len(curve) >= 20 and curve["calibration"].min() < 0.5 * curve["calibration"].iloc[0]


def test_the_tokenizer_loses_nothing_of_unseen_text(tokenizer) -> None:
    for row in (ROOT / "data/grammar/prose.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(row)["text"] + " Grüße, naïve 漢字 \t🙂\n  end"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert max(ids) < len(tokenizer) <= dense_folder.config(MODEL)["vocab_size"]


def test_the_training_kept_the_best_point_of_its_curve() -> None:
    curve = pd.read_csv(ROOT / "data/base_model/training.csv")
    assert len(curve) >= 20
    assert curve["calibration"].min() < 0.5 * curve["calibration"].iloc[0]


def test_kneser_ney_is_a_distribution_and_agrees_with_counting_by_hand() -> None:
    tokens = np.array([0, 1, 2, 0, 1, 3, 0, 1, 2, 2, 0, 3])
    model = KneserNey(tokens, vocabulary=4, order=2)
    for context in range(4):
        grams = np.array([[context, word] for word in range(4)])
        assert model.probability(grams).sum() == pytest.approx(1)
    bigrams = list(zip(tokens[:-1], tokens[1:], strict=True))
    kinds = sorted(set(bigrams))
    counts = [bigrams.count(kind) for kind in kinds]
    discount = counts.count(1) / (counts.count(1) + 2 * counts.count(2))
    before = [len({a for a, b in kinds if b == word}) for word in range(4)]
    n1, n2 = before.count(1), before.count(2)
    low = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
    unigram = (max(before[2] - low, 0) + low * sum(c > 0 for c in before) / 4) / len(kinds)
    after = [b for a, b in bigrams if a == 1]
    expected = (after.count(2) - discount + discount * len(set(after)) * unigram) / len(after)
    assert model.probability(np.array([[1, 2]]))[0] == pytest.approx(expected)


@pytest.mark.slow
def test_it_beats_a_5_gram_model_on_the_same_predictions(tokenizer) -> None:
    """The figures of the README: `pytest -s -k 5_gram`."""
    p = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["corpus"]
    parts = splits.split(*(load(name) for name in ("domains.yaml", "frames.yaml")), p["seed"])
    train, test = (
        perplexity.tokenise(tokenizer, [row["text"] for row in documents.documents(parts[name], size, p["seed"])])
        for name, size in (("train", p["train_bytes"]), ("test", p["test_bytes"]))
    )
    windows = perplexity.windows(test, 512, 512, 60)
    five_gram = KneserNey(train.numpy(), vocabulary=len(tokenizer)).perplexity(windows.numpy())
    own = perplexity.perplexity(dense_folder.load_dense(MODEL), windows, batch=4)
    print(f"test perplexity on {windows[:, 1:].numel()} tokens: base {own:.3f}, 5-gram Kneser-Ney {five_gram:.3f}")
    assert own < 0.8 * five_gram
