"""Logits in chunks: cuts by hand, the model's own logits and losses, and how much is held at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tasks.algorithms.model import head, layers, rows
from tasks.algorithms.pruning import importance
from tasks.algorithms.quantisation import eora_ranks
from tasks.algorithms.recovery import training
from tests.support.family_list import FAMILIES
from tests.support.pruned_llama import RECIPE, attach, prune

SIZES = (1, 7 * 96, 2**24)
"""Logits that are held at once: a row, seven rows, all of a test's batch."""


@pytest.fixture(params=SIZES)
def largest(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(rows, "LARGEST", request.param)
    return request.param


@pytest.mark.parametrize(
    ("count", "vocabulary", "sizes"),
    [
        (0, 96, []),
        (4096, 2048, [4096]),  # a batch of the built-in model: one chunk
        (8193, 2048, [4097, 4096]),  # equal parts, not all but one and one
        (2, 2**25, [1, 1]),  # a row is never cut
        (1000, 2**22, [4] * 250),
    ],
)
def test_rows_are_cut_into_equal_chunks(count: int, vocabulary: int, sizes: list[int]) -> None:
    found = rows.chunks(count, vocabulary)
    assert [each.stop - each.start for each in found] == sizes
    assert [place for each in found for place in range(each.start, each.stop)] == list(range(count))


def test_nats_are_those_of_the_model_s_own_logits(largest: int, make_model: Any, make_windows: Any) -> None:
    model, ids, following = make_model(), make_windows(3, 9), make_windows(3, 9, seed=1)
    with torch.no_grad():
        expected = -model(input_ids=ids).logits.double().log_softmax(-1).gather(-1, following.unsqueeze(-1))
    found = head.nats(model, ids, following)
    assert found.shape == (3, 9) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.squeeze(-1), rtol=1e-5, atol=1e-5)


CHANGED = {
    "Gemma 3": {"final_logit_softcapping": 5.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("name", CHANGED)
def test_logits_that_a_family_caps_or_scales_are_the_model_s(name: str) -> None:
    model = FAMILIES[name].make(**CHANGED[name])
    ids = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, states = model(input_ids=ids).logits, head.states(model, ids)
        found = torch.cat([each for _, each in head.logits(model, states)]).view_as(expected)
        last = layers.walk(model, ids, lambda *_: None)
        plain = model.get_output_embeddings()(states).view_as(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.of(model)(head.finished(model, last)), expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1


def test_a_training_in_chunks_takes_the_same_steps(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(96, (200,), generator=torch.Generator().manual_seed(0))
    recipe = training.Recipe(**vars(RECIPE) | {"distillation": 0.5, "steps": 3})
    histories = []
    for size in SIZES:
        monkeypatch.setattr(rows, "LARGEST", size)
        student = make_model()
        adapted = attach(student, prune(student))
        histories.append(training.train(adapted, tokens, recipe, teacher=make_model(seed=1)))
    for history in histories[:2]:
        for row, whole in zip(history, histories[2], strict=True):
            for name in ("loss", "causal_lm", "distillation"):
                assert row[name] == pytest.approx(whole[name], rel=1e-5)


ASKS = {
    "taylor": lambda model, ids: importance.taylor(model, ids),
    "perplexity": lambda model, ids: importance.perplexity(model, ids),
    "curvature": lambda model, ids: eora_ranks.curvature(model, ids),
    "recovery": lambda model, ids: training.train(
        attach(model, {}), ids.flatten(), RECIPE, teacher=model if RECIPE.distillation else None
    ),
}


@pytest.mark.parametrize("name", ASKS)
def test_no_more_logits_are_made_at_once_than_allowed(
    name: str, make_model: Any, make_windows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LARGEST", 5 * 96)
    model, made = make_model(), []
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: made.append(out.numel() // out.shape[-1]))
    ASKS[name](model, make_windows(2, 16))
    assert made and max(made) <= 5
