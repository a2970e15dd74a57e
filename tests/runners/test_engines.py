"""The engine of PyTorch against PyTorch's own calls; the others' are in tests/export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tasks.packed import reader
from tasks.runners import engines
from tests.support import random_package

NEW = 24


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    tokenizer, folder = tiny_llama(tmp_path_factory.mktemp("tokenizer")), tmp_path_factory.mktemp("packed")
    return random_package.write(folder, tokenizer, **random_package.CASES["adapter"])


def test_perplexity_is_that_of_pytorch_s_cross_entropy(packed):
    engine, windows = engines.load(packed), random_package.windows_of(packed)
    model, losses = reader.load_model(packed), []
    for window in torch.tensor(np.stack(windows)):
        with torch.no_grad():
            losses.append(F.cross_entropy(model(window[None]).logits[0, :-1], window[1:], reduction="none"))
    assert engines.perplexity(engine, windows) == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)


def test_greedy_tokens_are_those_of_generate(packed):
    ids = np.random.default_rng(2).integers(1, 257, (4, 8))
    model = reader.load_model(packed)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(torch.tensor(ids), **settings)[:, 8:]
    assert np.array_equal(engines.load(packed).generate(ids, NEW), expected)
