"""A backward pass block by block against autograd through the whole model, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tasks.algorithms.model import backward, families, rows
from tasks.models import dense_folder, streamed_folder

NAMES = families.BY_HEART["LlamaForCausalLM"].linears


def loss(_: Any, __: Any, logits: Any) -> Any:
    return logits.square().sum() / 100


def gone_through(model: Any, ids: Any, **options: Any) -> dict[str, Any]:
    """Full name -> gradient of every linear's weight."""
    found = {}

    def visit(index: int, block: Any, back: Any) -> None:
        gradients = back([block.get_submodule(name).weight for name in NAMES])
        found.update({f"model.layers.{index}.{name}": each for name, each in zip(NAMES, gradients, strict=True)})

    backward.backward(model, ids, loss, visit, **options)
    return found


@pytest.mark.parametrize("architecture", sorted(families.BY_HEART))
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_are_those_of_the_whole_loss(
    architecture: str, batch: int, make_model: Any, make_windows: Any
) -> None:
    model, ids = make_model(architecture, tie_word_embeddings=False), make_windows(3, 10)
    linears = families.block_linears(model)
    for each in ids.split(batch):
        loss(None, None, model(input_ids=each).logits).backward()
    expected = {name: linear.weight.grad.clone() for name, linear in linears.items()}
    model.zero_grad()
    found = gone_through(model, ids, batch=batch)
    assert list(found)[0].startswith("model.layers.3.") and found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("largest", [1, 7 * 96])
def test_chunks_of_logits_move_rounding_alone(
    largest: int, make_model: Any, make_windows: Any, monkeypatch: Any
) -> None:
    model, ids = make_model(), make_windows(2, 10)
    expected = gone_through(model, ids)
    monkeypatch.setattr(rows, "LARGEST", largest)
    for name, gradient in gone_through(model, ids).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_blocks_on_disk_have_the_gradients_of_those_in_memory(model_folder: Any, make_windows: Any) -> None:
    models = dense_folder.load_dense(model_folder), streamed_folder.open_dense(model_folder)
    whole, streamed = (gone_through(model, make_windows(3, 10)) for model in models)
    assert all(torch.equal(streamed[name], gradient) for name, gradient in whole.items())


def test_an_interrupted_pass_goes_on_where_it_was(make_model: Any, make_windows: Any) -> None:
    model, ids, states = make_model(), make_windows(3, 10), []
    whole = gone_through(model, ids, reached=lambda here: states.append(here._replace(gradient=here.gradient.clone())))
    assert [here.block for here in states] == [2, 1, 0]
    rest = gone_through(model, ids, begun=states[1])
    assert {name.split(".")[2] for name in rest} == {"0", "1"}
    assert all(torch.equal(gradient, whole[name]) for name, gradient in rest.items())
