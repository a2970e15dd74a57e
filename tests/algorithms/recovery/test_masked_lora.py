"""Adapters that keep masks, against independent answers: dense products, PEFT's own merge, an SVD of outputs."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.recovery import eora_start, masked_lora, training
from tasks.models import dense_folder, streamed_folder
from tests.support.pruned_llama import RECIPE, VOCABULARY, attach, llama, prune, stir, text_tokens


@pytest.fixture
def pruned() -> tuple[LlamaForCausalLM, dict[str, Tensor]]:
    model = llama()
    return model, prune(model)


def logits(model: nn.Module, seed: int = 1) -> Tensor:
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_fresh_adapter_is_the_identity(pruned):
    model, keep = pruned
    before = logits(model)
    assert torch.equal(logits(attach(model, keep)), before)
    assert torch.equal(logits(attach(llama(), {})), logits(llama()))


@pytest.mark.parametrize("only", ["", "self_attn", "none"])
def test_merged_equals_unmerged_and_the_formula(only):
    """`only` names the masked linears; the others are dense, and take PEFT's own path."""
    model = llama()
    keep = prune(model, only)
    weights = {name: linear.weight.detach().clone() for name, linear in families.block_linears(model).items()}
    adapted = attach(model, keep)
    stir(adapted)
    unmerged = logits(adapted)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (8.0 / 4)
        weight += (product * keep[name] if name in keep else product).detach()
    merged = masked_lora.merge(adapted, keep)
    assert not torch.allclose(unmerged, logits(llama()), atol=1e-2)
    torch.testing.assert_close(logits(merged), unmerged, rtol=1e-5, atol=1e-5)
    for name, linear in families.block_linears(merged).items():
        torch.testing.assert_close(linear.weight, weights[name], rtol=1e-6, atol=1e-7)


def test_masks_hold_after_training_and_pefts_own_merge(pruned):
    model, keep = pruned
    adapted = attach(model, keep)
    training.train(adapted, text_tokens(), RECIPE)
    merged = adapted.merge_and_unload()
    for name, linear in families.block_linears(merged).items():
        assert type(linear) is nn.Linear
        assert torch.count_nonzero(linear.weight[~keep[name]]) == 0
        assert torch.count_nonzero(linear.weight) == keep[name].sum()
    assert masked_lora.revived(merged, keep) == {}


def test_plain_peft_breaks_the_masks_and_the_check_sees_it(pruned):
    model, keep = pruned
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=list(keep)))
    stir(adapted)
    with pytest.raises(RuntimeError, match=r"brought pruned weights back in model\.layers\.0.* and 13 more"):
        masked_lora.merge(adapted, keep)
    counts = masked_lora.revived(model, keep)
    assert counts == {name: int((~mask).sum()) for name, mask in keep.items()}


def test_only_adapters_get_gradients(pruned):
    model, keep = pruned
    frozen = copy.deepcopy(model.state_dict())
    adapted = attach(model, keep)
    training.train(adapted, text_tokens(), RECIPE)
    for name, parameter in adapted.named_parameters():
        assert ("lora_" in name) == parameter.requires_grad == (parameter.grad is not None), name
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_a_masked_gradient_is_that_of_the_dense_formula():
    """Autograd through the plain expression is the oracle for the layer's forward."""
    base = nn.Sequential(nn.Linear(12, 8))
    mask = torch.rand(8, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    base[0].weight.data *= mask
    adapted = masked_lora.attach(base, ["0"], {"0": mask}, rank=3, alpha=6.0, dropout=0.0, seed=0)
    stir(adapted)
    layer = base.get_submodule("0")
    a = layer.lora_A["default"].weight.detach().clone().requires_grad_()
    b = layer.lora_B["default"].weight.detach().clone().requires_grad_()
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    (x @ (layer.weight + mask * (b @ a) * 2.0).T + layer.bias).square().sum().backward()
    base(x).square().sum().backward()
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, a.grad)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, b.grad)


def test_dropout_acts_on_the_low_rank_input_alone():
    base = nn.Sequential(nn.Linear(12, 8))
    mask = torch.arange(96).reshape(8, 12) % 2 == 0
    base[0].weight.data *= mask
    adapted = masked_lora.attach(base, ["0"], {"0": mask}, rank=3, alpha=3.0, dropout=0.5, seed=0)
    stir(adapted)
    layer = base.get_submodule("0")
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    delta = layer.get_delta_weight("default")
    with torch.no_grad():
        torch.testing.assert_close(base.eval()(x), x @ (layer.weight + delta).T + layer.bias)
        base.train()
        torch.manual_seed(11)
        got = base(x)
        torch.manual_seed(11)
        dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(got, x @ layer.weight.T + layer.bias + dropped @ delta.T)


@pytest.mark.parametrize("distillation", [0.0, 0.5, 1.0])
def test_loss_falls(pruned, distillation):
    model, keep = pruned
    teacher = llama() if distillation else None
    recipe = training.Recipe(**vars(RECIPE) | {"distillation": distillation, "steps": 60})
    history = training.train(attach(model, keep), text_tokens(), recipe, teacher=teacher)
    assert [row["step"] for row in history] == list(range(1, 61))
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    for row in history:
        if distillation:
            mixed = (1 - distillation) * row["causal_lm"] + distillation * row["distillation"]
            assert row["loss"] == pytest.approx(mixed, rel=1e-5)
        else:
            assert row["loss"] == row["causal_lm"] and math.isnan(row["distillation"])


def test_first_loss_is_the_mean_negative_log_likelihood(pruned):
    """A corpus of exactly one window leaves no choice of place."""
    model, keep = pruned
    ids = text_tokens()[:16]
    with torch.no_grad():
        table = model(input_ids=ids[None]).logits[0].double().softmax(-1)
    expected = -sum(math.log(table[i, ids[i + 1]]) for i in range(15)) / 15
    history = training.train(attach(model, keep), ids, RECIPE)
    assert history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_eora_start_is_the_masked_product_of_its_factors(make_model, make_windows):
    """W_pruned + M * P with the P that minimises the energy of (W_fetched - W_pruned - P) X over rank-4 matrices."""
    fetched, ids = make_model(seed=2), make_windows(8, 16)
    model = copy.deepcopy(fetched)
    keep = prune(model)
    teacher = {name: linear.weight.detach() for name, linear in families.block_linears(fetched).items()}
    first = "model.layers.0.self_attn.q_proj"
    pruned = {name: linear.weight.detach().clone() for name, linear in families.block_linears(model).items()}
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)).flatten(0, 1).double()
    # Oracle without an eigenbasis of X^T X: the best rank-4 outputs are X D^T's own SVD, and P^T their preimage.
    outputs = x @ (teacher[first] - pruned[first]).double().T
    u, s, v = torch.linalg.svd(outputs, full_matrices=False)
    product = (torch.linalg.pinv(x) @ (u[:, :4] * s[:4]) @ v[:4]).T
    adapted = attach(model, keep, rank=4, alpha=6.0)
    eora_start.start_from_eora(adapted, teacher, ids, batch=2)
    assert not adapted.training
    layer = model.get_submodule(first)
    factors = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (6.0 / 4)
    torch.testing.assert_close(factors.detach().double(), product, rtol=1e-3, atol=1e-4)
    unmerged = logits_of(adapted, ids)
    merged = masked_lora.merge(adapted, keep)
    expected = pruned[first] + keep[first] * product.float()
    torch.testing.assert_close(merged.get_submodule(first).weight.detach(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits_of(merged, ids), unmerged, rtol=1e-4, atol=1e-4)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_eora_start_without_a_loss_stays_pefts(make_model, make_windows):
    model = make_model()
    teacher = {name: linear.weight.detach().clone() for name, linear in families.block_linears(model).items()}
    adapted = attach(model, {})
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    eora_start.start_from_eora(adapted, teacher, make_windows(2, 8), batch=1)
    assert all(torch.equal(before[name], value) for name, value in adapted.state_dict().items())


def test_learning_rate_rises_linearly_then_follows_half_a_cosine():
    recipe = training.Recipe(**vars(RECIPE) | {"steps": 10, "warmup": 0.2, "learning_rate": 1.0})
    rates = [training.rate(step, recipe) for step in range(1, 11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)  # half of the 8 falling steps are done
    assert all(a > b > 0 for a, b in zip(rates[2:], rates[3:], strict=False))
    for warmup in (0.0, 1.0):
        edge = training.Recipe(**vars(recipe) | {"warmup": warmup})
        assert all(0 < training.rate(step, edge) <= 1 for step in range(1, 11))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_runs_give_the_same_bytes_and_leave_the_global_random_state(dropout):
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        model = llama()
        keep = prune(model)
        adapted = attach(model, keep, dropout=dropout)
        history = training.train(adapted, text_tokens(), RECIPE)
        assert torch.equal(torch.get_rng_state(), state)
        results.append((history, masked_lora.merge(adapted, keep).state_dict()))
    (first, weights), (second, again) = results
    assert str(first) == str(second)
    assert all(weights[name].numpy().tobytes() == value.numpy().tobytes() for name, value in again.items())


@pytest.mark.parametrize("only", ["", "none"])
@pytest.mark.parametrize("hidden", [0.0, 1.0])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_computing_blocks_anew_changes_no_byte(only, hidden, dropout):
    """`only` names the masked linears; the others are dense, and take PEFT's own path."""
    results = []
    recipe = training.Recipe(**vars(RECIPE) | {"steps": 4, "distillation": 0.5, "hidden": hidden})
    for checkpointing in (False, True):
        model, passes = llama(), []
        keep = prune(model, only)
        adapted = attach(model, keep, dropout=dropout)
        model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        history = training.train(adapted, text_tokens(), recipe, teacher=llama(), checkpointing=checkpointing)
        assert len(passes) == (8 if checkpointing else 4)
        results.append((str(history), masked_lora.merge(adapted, keep).state_dict()))
    (first, weights), (second, again) = results
    assert first == second
    assert all(weights[name].numpy().tobytes() == value.numpy().tobytes() for name, value in again.items())


@pytest.mark.parametrize("only", ["", "self_attn"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_weights_in_their_stored_type_are_trained_and_merged_as_in_float32(tmp_path, only, dropout):
    """The oracle has every weight in float32, and rounds the merged ones at the end."""
    model = llama().bfloat16()
    keep = prune(model, only)
    model.save_pretrained(tmp_path)
    results = []
    for load in (dense_folder.load_dense, streamed_folder.load_stored):
        adapted = attach(load(tmp_path), keep, dropout=dropout)
        assert all(p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)
        recipe = training.Recipe(**vars(RECIPE) | {"steps": 4, "distillation": 0.5})
        history = training.train(adapted, text_tokens(), recipe, teacher=llama(seed=4))
        results.append((str(history), masked_lora.merge(adapted, keep)))
    (first, whole), (second, stored) = results
    assert first == second
    for name, linear in families.block_linears(stored).items():
        assert linear.weight.dtype == torch.bfloat16
        assert torch.equal(linear.weight, whole.get_submodule(name).weight.bfloat16())


def test_seed_changes_the_windows(pruned):
    model, keep = pruned
    losses = []
    for seed in (0, 1):
        recipe = training.Recipe(**vars(RECIPE) | {"seed": seed, "steps": 1})
        losses.append(training.train(attach(copy.deepcopy(model), keep), text_tokens(), recipe)[0]["loss"])
    assert losses[0] != losses[1]


def test_dense_layers_hold_no_mask(pruned):
    model, keep = pruned
    name = next(iter(keep))
    model.get_submodule(name).weight.data.fill_(1.0)
    attach(model, {name: torch.ones_like(keep[name])})
    assert all(layer.pruned is None for layer in model.modules() if isinstance(layer, masked_lora.MaskedLinear))


def test_targets():
    model = llama()
    names = list(families.block_linears(model))
    assert masked_lora.select(model, "all-linear") == names
    attention, mlp = masked_lora.select(model, "attention"), masked_lora.select(model, "mlp")
    assert {name.split(".")[-1] for name in attention} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name.split(".")[-1] for name in mlp} == {"gate_proj", "up_proj", "down_proj"}
    assert sorted(attention + mlp) == sorted(names)
    with pytest.raises(InputError, match="targets = 'heads'"):
        masked_lora.select(model, "heads")


def test_what_a_user_can_get_wrong(pruned):
    model, keep = pruned
    name = next(iter(keep))
    with pytest.raises(InputError, match=r"rank = 17 is above the smallest dimension of .*k_proj \(16, 32\).*most 16"):
        attach(copy.deepcopy(model), keep, rank=17)
    with pytest.raises(InputError, match="does not have"):
        attach(copy.deepcopy(model), {"model.layers.9.mlp.up_proj": keep[name]})
    with pytest.raises(InputError, match="has shape"):
        attach(copy.deepcopy(model), {name: keep[name][:-1]})
    with pytest.raises(InputError, match="pruned weights of .* are not zero"):
        attach(llama(), keep)
    adapted = attach(copy.deepcopy(model), keep)
    with pytest.raises(InputError, match="has 15 tokens, less than one window of 16"):
        training.train(adapted, text_tokens()[:15], RECIPE)
    for change in ({"distillation": 0.5}, {"hidden": 0.5}):
        with pytest.raises(ValueError, match="without a teacher"):
            training.train(adapted, text_tokens(), training.Recipe(**vars(RECIPE) | change))
    with pytest.raises(ValueError, match="with a teacher"):
        training.train(adapted, text_tokens(), RECIPE, teacher=llama())
    model.model.norm.weight.data.fill_(math.inf)
    with pytest.raises(InputError, match=re.escape("loss of step 1 is nan at a learning rate of 0.00667")):
        training.train(attach(model, keep), text_tokens(), RECIPE)
