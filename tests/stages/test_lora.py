"""LoRA recovery against independent answers: dense products, naive losses, PEFT's own merge, the stage's files."""

from __future__ import annotations

import copy
import csv
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks import baseline_lora, lora
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, families, layers
from tasks.algorithms.pruning import depth_prune
from tasks.algorithms.recovery import distillation, masked_lora
from tasks.compression import recovery_training
from tasks.models import dense_folder, mask_files
from tasks.parameters.compression_sections import Distillation, Lora
from tasks.runtime.files import write_json
from tasks.runtime.stage import Inputs
from tests.support.paths import ROOT

VOCABULARY = 256
RECIPE = masked_lora.Recipe(
    steps=30, batch=4, length=16, learning_rate=0.02, warmup=0.1, distillation=0.0, temperature=2.0, seed=7
)


def llama(seed: int = 0, blocks: int = 2, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for linear in families.block_linears(model).values():
            nn.init.normal_(linear.weight, std=0.2)  # transformers' 0.02 leaves blocks that hardly do anything
        nn.init.normal_(model.model.embed_tokens.weight, std=0.3)  # and logits that can't single out a token
    return model.eval()


def prune(model: nn.Module, only: str = "") -> dict[str, Tensor]:
    """Zero two random weights of each group of four, in place; returns the keep masks."""
    generator = torch.Generator().manual_seed(3)
    keep = {}
    for name, linear in families.block_linears(model).items():
        if only in name:
            ranks = torch.rand(linear.weight.numel() // 4, 4, generator=generator).argsort(1)
            keep[name] = (ranks < 2).reshape(linear.weight.shape)
            linear.weight.data *= keep[name]
    return keep


def attach(model: nn.Module, keep: dict[str, Tensor], **changes: object):
    settings = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "seed": 0} | changes
    return masked_lora.attach(model, list(families.block_linears(model)), keep, **settings)


def stir(adapted: nn.Module) -> None:
    """Give every adapter factor random values, as after a training."""
    generator = torch.Generator().manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def logits(model: nn.Module, seed: int = 1) -> Tensor:
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits


def text_tokens() -> Tensor:
    """A corpus that a tiny model learns quickly: a fixed sequence of 24 tokens, over and over."""
    motif = torch.randint(VOCABULARY, (24,), generator=torch.Generator().manual_seed(2))
    return motif.repeat(20)


@pytest.fixture
def pruned() -> tuple[LlamaForCausalLM, dict[str, Tensor]]:
    model = llama()
    return model, prune(model)


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
    masked_lora.train(adapted, text_tokens(), RECIPE)
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
    masked_lora.train(adapted, text_tokens(), RECIPE)
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
    recipe = masked_lora.Recipe(**vars(RECIPE) | {"distillation": distillation, "steps": 60})
    history = masked_lora.train(attach(model, keep), text_tokens(), recipe, teacher=teacher)
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
    history = masked_lora.train(attach(model, keep), ids, RECIPE)
    assert history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_distillation_is_the_hand_computed_divergence():
    student = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]]])
    teacher = torch.tensor([[[math.log(9.0), 0.0], [0.0, 0.0]]])
    ids = torch.zeros(1, 2, dtype=torch.int64)
    # At T = 2 the odds are their square roots: teacher 3:1 against 1:1, then 1:1 against sqrt(3):1.
    root = math.sqrt(3.0)
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    second = 0.5 * math.log(0.5 / (root / (1 + root))) + 0.5 * math.log(0.5 / (1 / (1 + root)))
    got = distillation.token_losses(student, ids, teacher, 1.0, 2.0)
    assert float(got.distilled) == float(got.loss) == pytest.approx(4 * (first + second) / 2, rel=1e-6)
    assert float(got.causal) == pytest.approx(math.log(2.0), rel=1e-6)
    same = distillation.token_losses(teacher, ids, teacher, 0.5, 3.0)
    assert float(same.distilled) == pytest.approx(0.0, abs=1e-7)
    alone = distillation.token_losses(student, ids, None, 0.5, 3.0)
    assert float(alone.loss) == float(alone.causal) and math.isnan(alone.distilled)


@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 40, 2**18])
def test_token_losses_and_their_gradient_are_autograds_of_the_plain_formula(weight, chunk, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", chunk)  # logits: one row, 3 rows, or all 15 at once
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(13, (3, 5), generator=generator)
    student = (torch.randn(3, 5, 13, generator=generator) * 3).requires_grad_()
    teacher = None if weight is None else torch.randn(3, 5, 13, generator=generator) * 3
    plain = student.detach().clone().double().requires_grad_()
    causal = F.cross_entropy(plain[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected = causal
    if teacher is not None:
        p, q = ((each.double() / 1.7).softmax(-1) for each in (teacher, plain))
        divergence = 1.7**2 * (p * (p / q).log()).sum(-1).mean()
        expected = (1 - weight) * causal + weight * divergence
    (2.5 * expected).backward()
    got = distillation.token_losses(student, ids, teacher, weight or 0.0, 1.7)
    (2.5 * got.loss).backward()
    torch.testing.assert_close(got.loss.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.causal.double(), causal.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(student.grad.double(), plain.grad, rtol=1e-4, atol=1e-7)


def boundaries(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """The hidden states before each block and after the last one, by the walk that calibrations use."""
    seen: list[Tensor] = []
    final = layers.walk(model, ids, lambda index, block, inputs: seen.append(inputs.hidden.clone()))
    return [*seen, final]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_hidden_loss_is_the_naive_one_at_the_corresponding_blocks(weight, make_model):
    """A corpus of exactly one window; the student has lost blocks 0 and 2 of four, so the last ones match."""
    teacher = make_model(seed=1)
    student = copy.deepcopy(depth_prune.without(teacher, [0, 2]))
    keep = prune(student)
    ids = torch.randint(96, (16,), generator=torch.Generator().manual_seed(0))
    wanted, got = boundaries(teacher, ids[None]), boundaries(student, ids[None])
    errors = [
        sum((a - b) ** 2 for a, b in zip(got[i + 1].flatten().tolist(), wanted[j + 1].flatten().tolist(), strict=True))
        / sum(b**2 for b in wanted[j + 1].flatten().tolist())
        for i, j in enumerate((1, 3))
    ]
    recipe = masked_lora.Recipe(**vars(RECIPE) | {"hidden": 10.0, "distillation": weight})
    history = masked_lora.train(attach(student, keep), ids, recipe, teacher=teacher, kept=[1, 3])
    first = history[0]
    assert first["hidden"] == pytest.approx(sum(errors) / 2, rel=1e-4)
    tokens = (1 - weight) * first["causal_lm"] + (weight * first["distillation"] if weight else 0.0)
    assert first["loss"] == pytest.approx(tokens + 10 * first["hidden"], rel=1e-5)
    assert math.isnan(first["distillation"]) == (weight == 0)
    assert history[-1]["hidden"] < first["hidden"]  # it has a gradient


def test_a_removed_block_that_does_nothing_costs_nothing(make_model):
    teacher = make_model(seed=1)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        teacher.model.layers[1].get_submodule(name).weight.data.zero_()
    student = copy.deepcopy(depth_prune.without(teacher, [1]))
    ids = torch.randint(96, (16,), generator=torch.Generator().manual_seed(0))
    recipe = masked_lora.Recipe(**vars(RECIPE) | {"hidden": 1.0, "distillation": 1.0, "steps": 1})
    for kept, fits in (([0, 2, 3], True), ([0, 1, 2], False)):
        adapted = attach(copy.deepcopy(student), {})
        row = masked_lora.train(adapted, ids, recipe, teacher=teacher, kept=kept)[0]
        assert (row["hidden"] < 1e-10) == fits
        assert row["distillation"] == pytest.approx(0.0, abs=1e-5)


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
    masked_lora.start_from_eora(adapted, teacher, ids, batch=2)
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
    masked_lora.start_from_eora(adapted, teacher, make_windows(2, 8), batch=1)
    assert all(torch.equal(before[name], value) for name, value in adapted.state_dict().items())


def test_learning_rate_rises_linearly_then_follows_half_a_cosine():
    recipe = masked_lora.Recipe(**vars(RECIPE) | {"steps": 10, "warmup": 0.2, "learning_rate": 1.0})
    rates = [masked_lora.rate(step, recipe) for step in range(1, 11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)  # half of the 8 falling steps are done
    assert all(a > b > 0 for a, b in zip(rates[2:], rates[3:], strict=False))
    for warmup in (0.0, 1.0):
        edge = masked_lora.Recipe(**vars(recipe) | {"warmup": warmup})
        assert all(0 < masked_lora.rate(step, edge) <= 1 for step in range(1, 11))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_runs_give_the_same_bytes_and_leave_the_global_random_state(dropout):
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        model = llama()
        keep = prune(model)
        adapted = attach(model, keep, dropout=dropout)
        history = masked_lora.train(adapted, text_tokens(), RECIPE)
        assert torch.equal(torch.get_rng_state(), state)
        results.append((history, masked_lora.merge(adapted, keep).state_dict()))
    (first, weights), (second, again) = results
    assert str(first) == str(second)
    assert all(weights[name].numpy().tobytes() == value.numpy().tobytes() for name, value in again.items())


def test_seed_changes_the_windows(pruned):
    model, keep = pruned
    losses = []
    for seed in (0, 1):
        recipe = masked_lora.Recipe(**vars(RECIPE) | {"seed": seed, "steps": 1})
        losses.append(masked_lora.train(attach(copy.deepcopy(model), keep), text_tokens(), recipe)[0]["loss"])
    assert losses[0] != losses[1]


def test_dense_layers_hold_no_mask(pruned):
    model, keep = pruned
    name = next(iter(keep))
    model.get_submodule(name).weight.data.fill_(1.0)
    attach(model, {name: torch.ones_like(keep[name])})
    assert all(layer.pruned is None for layer in model.modules() if isinstance(layer, masked_lora.MaskedLinear))


def test_targets():
    names = list(families.block_linears(llama()))
    assert masked_lora.select(names, "all-linear") == names
    attention, mlp = masked_lora.select(names, "attention"), masked_lora.select(names, "mlp")
    assert {name.split(".")[-1] for name in attention} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name.split(".")[-1] for name in mlp} == {"gate_proj", "up_proj", "down_proj"}
    assert sorted(attention + mlp) == sorted(names)
    with pytest.raises(InputError, match="targets = 'heads'"):
        masked_lora.select(names, "heads")
    with pytest.raises(InputError, match="fits none"):
        masked_lora.select(mlp, "attention")


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
        masked_lora.train(adapted, text_tokens()[:15], RECIPE)
    for change in ({"distillation": 0.5}, {"hidden": 0.5}):
        with pytest.raises(ValueError, match="without a teacher"):
            masked_lora.train(adapted, text_tokens(), masked_lora.Recipe(**vars(RECIPE) | change))
    with pytest.raises(ValueError, match="with a teacher"):
        masked_lora.train(adapted, text_tokens(), RECIPE, teacher=llama())
    model.model.norm.weight.data.fill_(math.inf)
    with pytest.raises(InputError, match=re.escape("loss of step 1 is nan at a learning rate of 0.00667")):
        masked_lora.train(attach(model, keep), text_tokens(), RECIPE)


class FakeStage(Inputs):
    """What a stage module sees of tasks.runtime.stage.Stage, over folders of a test; dvc.yaml says which."""

    def __init__(self, folder: Path, params: Lora, run: str = "run", name: str = "lora") -> None:
        deps = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"][name]["deps"]
        data = [Path(dep) for dep in deps if dep.startswith("data/")]
        super().__init__(name, {path: folder / path.relative_to("data") for path in data})
        self.folder, self.out, self.name = folder, folder / run, name
        self.journal = checkpoints.NOTHING
        self.params = SimpleNamespace(device="cpu", lora=params, wanda=SimpleNamespace(enforce=True))
        self.updates: list[tuple[int, float]] = []
        self.total = 0

    def output(self, name: str) -> Path:
        path = self.out / (name if "/" in name else f"{self.name}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def pass_on(self, source: Path, target: Path) -> None:
        shutil.copytree(source, target)

    def progress(self, description: str, total: int) -> FakeStage:
        self.total = total
        return self

    def __enter__(self) -> FakeStage:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, done: int, loss: float) -> None:
        self.updates.append((done, loss))


def distil(weight: float = 0.5, hidden: float = 0.0) -> Distillation:
    return Distillation(weight=weight, temperature=2.0, hidden=hidden)


def params(**changes: object) -> Lora:
    settings = {"enabled": True, "seed": 0, "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear"}
    settings |= {"steps": 5, "batch": 2, "length": 32, "learning_rate": 0.01, "warmup": 0.2}
    settings |= {"method": "masked", "start": "zeros", "distillation": distil()}
    return Lora(**settings | changes)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The stage's inputs: a bf16 teacher of three blocks, without its second and pruned, masks, 40 short documents."""
    tokenizer = byte_tokenizer()
    model = llama(blocks=3).bfloat16()
    dense_folder.save_dense(model, tokenizer, tmp_path / "vocabulary/model")
    model = depth_prune.without(model, [1])
    keep = prune(model)
    dense_folder.save_dense(model, tokenizer, tmp_path / "wanda/model")
    mask_files.save_masks(tmp_path / "wanda/masks.safetensors", keep, "2:4")
    (tmp_path / "depth_prune").mkdir()
    write_json(tmp_path / "depth_prune/removed.json", {"removed": [1], "kept": [0, 2]})
    (tmp_path / "fetch/corpora").mkdir(parents=True)
    rows = [json.dumps({"text": f"The pump must report {n} litres."}) + "\n" for n in range(40)]
    (tmp_path / "fetch/corpora/train.jsonl").write_text("".join(rows), encoding="utf-8")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


ARMS = {
    "masked": {},
    "hidden": {"distillation": distil(0.5, 1.0)},
    "eora": {"start": "eora"},
    "remasked": {"method": "remasked"},
    "remasked_eora": {"method": "remasked", "start": "eora"},
    "block": {"method": "block_reconstruction"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_stage_writes_a_stock_checkpoint_with_the_masks_and_dtype_kept(folder, arm):
    stage = FakeStage(folder, params(**ARMS[arm]))
    lora.run(stage)
    keep, _ = mask_files.load_masks(folder / "wanda/masks.safetensors")
    model = AutoModelForCausalLM.from_pretrained(stage.out / "lora/model", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert type(model) is LlamaForCausalLM
    assert masked_lora.revived(model, keep) == {}
    before = AutoModelForCausalLM.from_pretrained(folder / "wanda/model", dtype="auto")
    names = set(families.block_linears(model))
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) != (name.removesuffix(".weight") in names), name
    history = rows(stage.out / "lora/history.csv")
    steps = 10 if arm == "block" else 5  # per block
    assert [int(row["step"]) for row in history] == [step for step, _ in stage.updates] == list(range(1, steps + 1))
    assert stage.total == steps
    assert tuple(history[0]) == masked_lora.COLUMNS
    assert float(history[-1]["loss"]) == pytest.approx(stage.updates[-1][1], rel=1e-8)
    computed = {name for name in ("causal_lm", "distillation", "hidden") if history[0][name]}
    losses = {"block": {"hidden"}, "hidden": {"causal_lm", "distillation", "hidden"}}
    assert computed == losses.get(arm, {"causal_lm", "distillation"})
    ledger = rows(stage.out / "lora/sparsity.csv")
    assert [row["linear"] for row in ledger] == list(families.block_linears(model))
    assert all(row["revived"] == row["violations"] == "0" and int(row["groups"]) > 0 for row in ledger)


def test_eora_start_lowers_the_first_loss_and_compares_with_the_teachers_corresponding_blocks(folder, monkeypatch):
    keep, _ = mask_files.load_masks(folder / "wanda/masks.safetensors")
    teacher = dense_folder.load_dense(folder / "vocabulary/model")
    start, seen = masked_lora.start_from_eora, {}

    def watched(adapted, wanted, *rest):
        seen.update(wanted)
        start(adapted, wanted, *rest)

    monkeypatch.setattr(masked_lora, "start_from_eora", watched)
    first = {}
    for arm in ("zeros", "eora"):
        stage = FakeStage(folder, params(start=arm, method="remasked", distillation=distil(1.0), rank=16))
        first[arm] = recovery_training.recover(stage, folder / "wanda/model", keep, [0, 2]).history[0]["loss"]
    assert first["eora"] < first["zeros"]
    assert set(seen) == set(keep)
    for name, weight in seen.items():
        assert torch.equal(weight, teacher.get_submodule(name.replace("layers.1", "layers.2")).weight)


def test_a_broken_pattern_ends_the_stage_only_where_it_is_enforced(folder, monkeypatch):
    monkeypatch.setattr(masked_lora, "apply_masks", lambda model, keep: None)
    stage = FakeStage(folder, params(method="remasked"))
    with pytest.raises(InputError, match=r"lora broke the sparsity pattern of model\.layers\.0\.self_attn\.q_proj"):
        lora.run(stage)
    stage.params.wanda.enforce = False
    lora.run(stage)
    assert all(int(row["revived"]) > 0 for row in rows(stage.out / "lora/sparsity.csv"))


@pytest.mark.parametrize("arm", ["eora", "block", "remasked"])
def test_stage_repeats_its_bytes(folder, arm):
    for run, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        lora.run(FakeStage(folder, params(dropout=0.1, **ARMS[arm]), run))
    assert files(folder / "one") == files(folder / "two")


def test_remasked_is_pefts_merge_and_then_the_masks(folder):
    """The oracle trains with PEFT's stock layer and merges with PEFT's own merge."""
    stage = FakeStage(folder, params(method="remasked", distillation=distil(0.0)))
    keep, _ = mask_files.load_masks(folder / "wanda/masks.safetensors")
    model = dense_folder.load_dense(folder / "wanda/model")
    torch.manual_seed(0)
    plain = get_peft_model(model, LoraConfig(r=4, lora_alpha=8.0, lora_dropout=0.0, target_modules=list(keep)))
    tokens = recovery_training.perplexity.tokenise(
        byte_tokenizer(), [f"The pump must report {n} litres." for n in range(40)]
    )
    masked_lora.train(plain.base_model, tokens, recovery_training._recipe(stage.params.lora))
    merged = plain.merge_and_unload()
    assert all(masked_lora.revived(merged, {name: mask}) for name, mask in keep.items())  # plain LoRA fills the zeros
    recovered = recovery_training.recover(stage, folder / "wanda/model", keep, [0, 2])
    for name, linear in families.block_linears(recovered.model).items():
        expected = torch.where(keep[name], merged.get_submodule(name).weight.detach(), 0.0).bfloat16()
        torch.testing.assert_close(linear.weight.detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("arm", ARMS)
def test_the_plain_model_is_its_own_teacher_and_needs_no_masks(folder, arm):
    stage = FakeStage(folder, params(**ARMS[arm]), name="baseline_lora")
    baseline_lora.run(stage)
    first = rows(stage.out / "baseline_lora/history.csv")[0]
    assert float(first["hidden"] or 0) == 0
    assert float(first["distillation"] or 0) == pytest.approx(0.0, abs=1e-6)
    before, after = (
        families.block_linears(dense_folder.load_dense(path / "model"))
        for path in (folder / "vocabulary", stage.out / "baseline_lora")
    )
    # Reconstruction has nothing to do; the others learn the corpus.
    assert all(torch.equal(before[name].weight, after[name].weight) == (arm == "block") for name in before)


def test_stage_without_distillation_needs_no_teacher(folder):
    shutil.rmtree(folder / "vocabulary/model")
    stage = FakeStage(folder, params(distillation=distil(0.0), targets="mlp"))
    lora.run(stage)
    first = rows(stage.out / "lora/history.csv")[0]
    assert first["distillation"] == first["hidden"] == ""


def test_stage_names_what_does_not_fit(folder):
    with pytest.raises(InputError, match="length = 65 is above the model's context of 64"):
        lora.run(FakeStage(folder, params(length=65)))
    with pytest.raises(InputError, match=r"lora\.start = eora .* set lora\.start to zeros"):
        lora.run(FakeStage(folder, params(start="eora", method="block_reconstruction")))
    for kept in ([0], [0, 3]):
        write_json(folder / "depth_prune/removed.json", {"kept": kept})
        with pytest.raises(InputError, match=rf"{len(kept)} of the teacher's 3 blocks .* run stage depth_prune again"):
            lora.run(FakeStage(folder, params()))
    write_json(folder / "depth_prune/removed.json", {"kept": [0, 2]})
    dense_folder.save_dense(llama(blocks=3, vocabulary=250), byte_tokenizer(), folder / "vocabulary/model")
    with pytest.raises(InputError, match="the model has 256 tokens, its teacher 250"):
        lora.run(FakeStage(folder, params()))
    (folder / "fetch/corpora/train.jsonl").write_text('{"text": "Pump."}\n')
    with pytest.raises(InputError, match="has 5 tokens, less than one window of 32"):
        lora.run(FakeStage(folder, params(distillation=distil(0.0))))


@pytest.mark.parametrize("method", ["masked", "remasked", "block_reconstruction"])
def test_a_model_of_other_masks_is_refused(folder, method):
    model = dense_folder.load_dense(folder / "wanda/model")
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    dense_folder.save_dense(model, byte_tokenizer(), folder / "wanda/model")
    with pytest.raises(InputError, match=r"pruned weights of model\.layers\.0\.mlp\.up_proj are not zero"):
        lora.run(FakeStage(folder, params(method=method)))


def test_skip_passes_the_model_on(folder):
    stage = FakeStage(folder, params(enabled=False))
    lora.skip(stage)
    assert files(stage.out / "lora/model") == files(folder / "wanda/model")
    assert (stage.out / "lora/history.csv").read_text() == ",".join(masked_lora.COLUMNS) + "\n"
    assert {row["revived"] for row in rows(stage.out / "lora/sparsity.csv")} == {"0"}
