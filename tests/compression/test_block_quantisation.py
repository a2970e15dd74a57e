"""What the stages that quantise share: sizes of linears, moments of the head, the embedding before the linears."""

from __future__ import annotations

import math

import pytest
import torch

from tasks.algorithms.model import layers
from tasks.algorithms.quantisation import rounding
from tasks.compression import block_quantisation, linear_quantisation
from tasks.models import streamed_folder
from tests.support.matrices import normal, two_of_four
from tests.support.pruned_model import inputs_of_the_stage, sections


@pytest.fixture(scope="module")
def pruned(tiny_llama, tmp_path_factory):
    """The inputs of the stage: a 2:4 pruned model, its masks, windows."""
    return inputs_of_the_stage(tmp_path_factory.mktemp("gptq"), tiny_llama)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "dense"])
@pytest.mark.parametrize(("symmetric", "act_order"), [(True, "none"), (False, "descending")])
def test_bytes_of_a_linear(pattern, symmetric, act_order):
    weight = normal(8, 64)
    keep = None if pattern == "dense" else two_of_four(weight)
    chosen = sections(symmetric=symmetric, act_order=act_order)["gptq"]
    kept = weight.numel() if keep is None else int(keep.sum())
    found = block_quantisation.linear_bytes(tuple(weight.shape), kept, pattern, 4, chosen)
    # 12 cases of 6 fit 4 bytes, 8 remain; 512 weights of 512 or 256; 16 groups; 64 inputs in one of two groups
    positions = {"2:4": 10 * 4 + 3, "unstructured": math.log2(math.comb(512, 256)) / 8, "dense": 0}[pattern]
    codes = (512 if keep is None else 256) * 4 / 8
    assert found == math.ceil(positions) + codes + 16 * 2 + (0 if symmetric else 16 * 4 / 8 + 64 / 8)


def test_what_was_measured_is_read_back_to_the_last_bit(tmp_path):
    harm = {f"linear{i}": {2: float(normal(1, seed=i)), 4: float(normal(1, seed=-i)) / 3} for i in range(1, 40)}
    harm["tiny"] = {2: 5e-324, 4: 1 / 3}
    block_quantisation.write_harm(tmp_path / "harm.csv", harm)
    assert block_quantisation.read_harm(tmp_path / "harm.csv") == harm


def test_calibration_sees_the_quantised_embedding(pruned, make_stage, tmp_path, monkeypatch):
    params = sections(embedding={"bits": 4, "group_size": 16, "method": "nearest"})
    model, stage = streamed_folder.open_dense(pruned.files["lora/model"]), make_stage(params, pruned.files)
    coded = block_quantisation.compress_embedding(model, pruned.windows, params["gptq"])
    seen = []
    walk = layers.walk
    monkeypatch.setattr(layers, "walk", lambda model, ids, visit, batch=1: walk(model, ids, watching(visit), batch))

    def watching(visit):
        def visited(index, block, inputs):
            seen.append(inputs.hidden.clone())
            visit(index, block, inputs)

        return visited

    linear_quantisation.quantise_linears(stage, model, pruned.windows, pruned.keep, 4, tmp_path / "quantised")
    assert torch.equal(seen[0], rounding.values(coded["embedding"])[pruned.windows.long()])
    assert torch.equal(model.model.embed_tokens.weight, rounding.values(coded["embedding"]))


def test_the_heads_moments_are_those_of_its_inputs(pruned):
    seen = []
    handle = pruned.model.lm_head.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(0, 1).double())
    )
    with torch.no_grad():
        pruned.model(input_ids=pruned.windows)
    handle.remove()
    x = torch.cat(seen)
    assert torch.allclose(
        block_quantisation.head_moments(pruned.model, pruned.windows), x.T @ x / len(x), rtol=1e-4, atol=1e-5
    )
