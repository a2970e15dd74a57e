"""LoRA recovery against independent answers: dense products, hand-computed losses, PEFT's own merge."""

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
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks import checkpoint, lora
from tasks.algorithms import families, masked_lora
from tasks.algorithms.errors import InputError
from tasks.params import Distillation, Lora

VOCABULARY = 256
RECIPE = masked_lora.Recipe(
    steps=30, batch=4, length=16, learning_rate=0.02, warmup=0.1, distillation=0.0, temperature=2.0, seed=7
)


def llama(seed: int = 0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
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
    # At T = 2 the odds are their square roots: teacher 3:1 against 1:1, then 1:1 against sqrt(3):1.
    root = math.sqrt(3.0)
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    second = 0.5 * math.log(0.5 / (root / (1 + root))) + 0.5 * math.log(0.5 / (1 / (1 + root)))
    got = masked_lora.distillation_loss(student, masked_lora.log_probabilities(teacher, 2.0), 2.0)
    assert float(got) == pytest.approx(4 * (first + second) / 2, rel=1e-6)
    same = masked_lora.distillation_loss(teacher, masked_lora.log_probabilities(teacher, 3.0), 3.0)
    assert float(same) == pytest.approx(0.0, abs=1e-7)


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
    with pytest.raises(ValueError, match="without a teacher"):
        masked_lora.train(adapted, text_tokens(), masked_lora.Recipe(**vars(RECIPE) | {"distillation": 0.5}))
    model.model.norm.weight.data.fill_(math.inf)
    with pytest.raises(InputError, match=re.escape("loss of step 1 is nan at a learning rate of 0.00667")):
        masked_lora.train(attach(model, keep), text_tokens(), RECIPE)


class FakeStage:
    """What a stage module sees of tasks.stage.Stage, over folders of a test."""

    def __init__(self, folder: Path, params: Lora, run: str = "run") -> None:
        self.folder, self.params, self.out = folder, SimpleNamespace(lora=params), folder / run
        self.updates: list[tuple[int, float]] = []

    def input(self, name: str) -> Path:
        return self.folder / {"masks.safetensors": "wanda/masks.safetensors"}.get(name, name)

    def output(self, name: str) -> Path:
        path = self.out / {"model": "lora/model", "history.csv": "lora/history.csv"}.get(name, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def pass_on(self, source: Path, target: Path) -> None:
        shutil.copytree(source, target)

    def progress(self, description: str, total: int) -> FakeStage:
        assert (description, total) == ("lora", self.params.lora.steps)
        return self

    def __enter__(self) -> FakeStage:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, done: int, loss: float) -> None:
        self.updates.append((done, loss))


def params(**changes: object) -> Lora:
    settings = {"enabled": True, "seed": 0, "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear"}
    settings |= {"steps": 5, "batch": 2, "length": 32, "learning_rate": 0.01, "warmup": 0.2}
    settings["distillation"] = Distillation(weight=0.5, temperature=2.0)
    return Lora(**settings | changes)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The stage's inputs: a bf16 teacher, its pruned copy with masks, a corpus of 40 short documents."""
    tokenizer = byte_tokenizer()
    model = llama().bfloat16()
    checkpoint.save_dense(model, tokenizer, tmp_path / "fetch/model")
    keep = prune(model)
    checkpoint.save_dense(model, tokenizer, tmp_path / "wanda/model")
    checkpoint.save_masks(tmp_path / "wanda/masks.safetensors", keep, "2:4")
    (tmp_path / "fetch/corpora").mkdir()
    rows = [json.dumps({"text": f"The pump must report {n} litres."}) + "\n" for n in range(40)]
    (tmp_path / "fetch/corpora/train.jsonl").write_text("".join(rows), encoding="utf-8")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_stage_writes_a_stock_checkpoint_with_the_masks_and_dtype_kept(folder):
    stage = FakeStage(folder, params())
    lora.run(stage)
    keep, _ = checkpoint.load_masks(folder / "wanda/masks.safetensors")
    model = AutoModelForCausalLM.from_pretrained(stage.out / "lora/model", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert type(model) is LlamaForCausalLM
    assert masked_lora.revived(model, keep) == {}
    before = AutoModelForCausalLM.from_pretrained(folder / "wanda/model", dtype="auto")
    names = set(families.block_linears(model))
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) != (name.removesuffix(".weight") in names), name
    with open(stage.out / "lora/history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [step for step, _ in stage.updates] == [1, 2, 3, 4, 5]
    assert tuple(rows[0]) == masked_lora.COLUMNS
    assert float(rows[-1]["loss"]) == pytest.approx(stage.updates[-1][1], rel=1e-8)


def test_stage_repeats_its_bytes(folder):
    for run in ("one", "two"):
        lora.run(FakeStage(folder, params(dropout=0.1), run))
    assert files(folder / "one") == files(folder / "two")


def test_stage_without_distillation_needs_no_teacher(folder):
    shutil.rmtree(folder / "fetch/model")
    stage = FakeStage(folder, params(distillation=Distillation(weight=0.0, temperature=1.0), targets="mlp"))
    lora.run(stage)
    assert (stage.out / "lora/history.csv").read_text().splitlines()[1].split(",")[3] == ""


def test_stage_names_what_does_not_fit(folder):
    with pytest.raises(InputError, match="length = 65 is above the model's context of 64"):
        lora.run(FakeStage(folder, params(length=65)))
    (folder / "fetch/corpora/train.jsonl").write_text('{"text": "Pump."}\n')
    with pytest.raises(InputError, match="has 5 tokens, less than one window of 32"):
        lora.run(FakeStage(folder, params()))


def test_skip_passes_the_model_on(folder):
    stage = FakeStage(folder, params(enabled=False))
    lora.skip(stage)
    assert files(stage.out / "lora/model") == files(folder / "wanda/model")
    assert (stage.out / "lora/history.csv").read_text() == "step,loss,causal_lm,distillation,learning_rate\n"
