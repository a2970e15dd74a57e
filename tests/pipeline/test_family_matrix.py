"""Every family of the list goes through the whole DAG; what stages wrote computes as a model made by hand does."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import masks
from tasks.packed import reader, self_test
from tasks.parameters import preflight
from tests.support import family_matrix
from tests.support.family_list import FAMILIES, REFUSED, refused_config

CHANGED = {"Llama 3": {"wanda.keep": 1}}
"""Family: parameters that are others than the rest's."""
IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


def stock(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def blocks_of(model, count):
    """The list of blocks, found by its length alone."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return next(each for each in lists if len(each) == count)


def by_hand(original, gone, layers):
    """The original in which one block hands its inputs on."""
    model = copy.deepcopy(original)

    def through(_, arguments, named, output):
        hidden = arguments[0] if arguments else named["hidden_states"]
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    blocks_of(model, layers)[gone].register_forward_hook(through, with_kwargs=True)
    return model


def filled(model, smaller, gone, layers):
    """The model by hand with all weights of a smaller one, whose blocks come after a removed one."""
    ours, theirs = blocks_of(model, layers), blocks_of(smaller, layers - 1)
    for place, block in enumerate(theirs):
        ours[place + (place >= gone)].load_state_dict(block.state_dict())
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_through_the_whole_dag(name, tmp_path):
    changed = CHANGED.get(name, {})
    keep = changed.get("wanda.keep", 2)
    done = list(family_matrix.run(tmp_path, name, **changed))
    assert {"fetch", "package", "evaluate@package", "baseline", "hardware_fit", "report"} <= set(done)
    data, layers = tmp_path / "data", 3
    original, removed = stock(tmp_path / "source/model"), json.loads((data / "depth_prune/removed.json").read_text())
    (gone,) = removed["removed"]
    expected = by_hand(original, gone, layers)
    torch.testing.assert_close(logits(stock(data / "depth_prune/model")), logits(expected), rtol=1e-4, atol=1e-4)
    kept = load_file(data / "wanda/masks.safetensors")
    for stage in ("wanda", "lora"):
        written = stock(data / stage / "model")
        same = filled(by_hand(original, gone, layers), written, gone, layers)
        torch.testing.assert_close(logits(written), logits(same), rtol=1e-4, atol=1e-4)
        pruned = 0
        for matrix, packed in kept.items():
            weight = written.get_submodule(matrix).weight
            if not isinstance(written.get_submodule(matrix), torch.nn.Linear):
                weight = weight.T  # Conv1D keeps [in, out]
            mask = masks.unpack(packed, *weight.shape)
            assert not weight[~mask].any() and mask.sum() * 4 == keep * mask.numel()
            pruned += 1
        assert pruned == len(kept) > 0
    tied = original.get_input_embeddings().weight is original.get_output_embeddings().weight
    shipped = reader.load_model(data / "package/model")
    assert (shipped.get_input_embeddings().weight is shipped.get_output_embeddings().weight) == tied
    scores = [json.loads((data / f"evaluate/{each}/metrics.json").read_text()) for each in ("qad", "package")]
    assert scores[0]["perplexity"] == scores[1]["perplexity"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_isn_t_supported_is_refused_by_name_in_one_sentence(name):
    architecture, sentence = REFUSED[name]
    with pytest.raises(InputError) as refused:
        config = refused_config(architecture)
        preflight.model_shape(config)
        self_test.check(config)
    said = str(refused.value)
    assert architecture in said and sentence in said and "\n" not in said
