"""durations: rows against a count of what PyTorch multiplies, and how they answer to parameters and sizes."""

import contextlib
import dataclasses
from collections.abc import Callable

import pytest
import torch
import transformers
import yaml
from torch.utils.flop_counter import FlopCounterMode

from tasks.algorithms.model import families, layers, matrices
from tasks.algorithms.model.shape import ModelShape, shape_of_config, shape_of_model
from tasks.algorithms.pruning import importance
from tasks.algorithms.quantisation import sensitivity
from tasks.algorithms.recovery import masked_lora, training
from tasks.algorithms.scoring import likelihood, protocols
from tasks.parameters import durations, schema
from tasks.parameters.durations import work
from tasks.parameters.work import Work
from tests.parameters.test_preflight import with_values
from tests.support.paths import ROOT

SPEED = {field.name: 1.0 for field in dataclasses.fields(Work)}
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 96}
SMALL = {
    "calibrate.windows": 6,
    "calibrate.length": 32,
    "importance.windows": 2,
    "depth_prune.remove": 0,
    "lora.steps": 2,
    "lora.batch": 2,
    "lora.length": 32,
    "lora.rank": 4,
    "evaluate.length": 32,
    "evaluate.stride": 32,
    "evaluate.max_windows": 6,
    "evaluate.new_tokens": 1,
    "gptq.embedding.bits": 16,
}


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, **SIZES
    )
    return transformers.LlamaForCausalLM(config).eval()


def shape(**changed: int) -> ModelShape:
    """Of `llama`, with other sizes."""
    given = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": 2}
    return shape_of_config(given | SIZES | {"tie_word_embeddings": True} | changed)


def windows(number: int, length: int = 32) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (number, length), generator=torch.Generator().manual_seed(1))


class _NoModules(contextlib.nullcontext):
    """In the place of what tells modules apart by hooks that `torch.autograd.grad` can't have (torch 2.13)."""

    parents = ("Global",)


def _calibrate(model: transformers.LlamaForCausalLM) -> None:
    by_block = matrices.by_block(model)

    def visit(index: int, block: torch.nn.Module, inputs: layers.BlockInputs) -> None:
        layers.input_statistics(by_block[index], block, inputs, carry=True)

    layers.walk(model, windows(6), visit, durations.BATCH)


def _recovery(masked: bool) -> Callable[[transformers.LlamaForCausalLM], None]:
    def run(model: transformers.LlamaForCausalLM) -> None:
        keep = {}
        if masked:
            keep = {name: torch.rand(weight.shape) > 0.5 for name, weight in matrices.weights(model).items()}
            masked_lora.apply_masks(model, keep)
        targets = masked_lora.select(model, "all-linear")
        adapted = masked_lora.attach(model, targets, keep, rank=4, alpha=8, dropout=0.0, seed=0)
        recipe = training.Recipe(2, 2, 32, 0.001, 0.0, 0.5, 2.0, 0)
        training.train(adapted, windows(1, 500)[0], recipe, teacher=llama())

    return run


def _evaluate(model: transformers.LlamaForCausalLM) -> None:
    protocol = protocols.protocol("joined", 32, 32)
    ids = windows(1, 6 * 32)[0]
    spans, documents = torch.ones_like(ids), torch.zeros_like(ids)
    cut = protocols.windows(protocol, [len(ids)])
    for _ in range(2):  # splits
        likelihood.score(model, likelihood.Prepared("", 32, [ids], [spans], [documents], cut), 4)
    model.generate(windows(durations.PROMPTS, 1), max_new_tokens=1, do_sample=False)


def _sensitivity(model: transformers.LlamaForCausalLM) -> None:
    sensitivity.measure(model, windows(1), lambda name, weight, bits: weight.clone() + 1, (2, 3, 4, 8), 3)


RUNS = {
    "calibrate": ("calibrate", {}, _calibrate),
    **{
        method: (
            "importance",
            {"importance.method": method},
            lambda model, method=method: importance.score(model, windows(2), method),
        )
        for method in ("taylor", "perplexity", "block_influence", "compound")
    },
    "lora": ("lora", {}, _recovery(masked=True)),
    "baseline_lora": ("baseline_lora", {}, _recovery(masked=False)),
    "evaluate": ("evaluate@fetch", {}, _evaluate),
    "sensitivity": ("sensitivity", {}, _sensitivity),
}


@pytest.mark.parametrize("name", RUNS)
def test_products_are_those_that_pytorch_counts(name: str) -> None:
    address, values, run = RUNS[name]
    model = llama()
    expected = shape_of_model(model)
    counted = FlopCounterMode(display=False)
    counted.mod_tracker = _NoModules()
    with counted:
        run(model)
    assert 1 / 1.5 < work(with_values(SMALL | values), expected, address).products / counted.get_total_flops() < 1.5


def test_sizes_of_the_test_are_those_of_the_model() -> None:
    assert dataclasses.replace(shape(), context=None) == dataclasses.replace(shape_of_model(llama()), context=None)
    assert len(families.blocks(llama())) == SIZES["num_hidden_layers"]


MORE = {
    "calibrate.windows": ("calibrate", "wanda", "gptq", "eora", "baseline"),
    "calibrate.length": ("calibrate", "importance", "wanda", "gptq", "sensitivity"),
    "importance.windows": ("importance",),
    "lora.steps": ("lora", "baseline_lora"),
    "lora.batch": ("lora", "baseline_lora"),
    "lora.length": ("lora", "baseline_lora"),
    "lora.rank": ("lora", "baseline_lora"),
    "gptq.descent_cycles": ("gptq", "baseline"),
    "evaluate.max_windows": ("evaluate@package",),
    "evaluate.new_tokens": ("evaluate@package",),
    "measure.generations": ("measure",),
    "measure.rounds": ("measure",),
    "kv_cache.tokens": ("kv_cache",),
    "harness.limit": ("harness@fetch-arc_easy",),
}
BASE = SMALL | {"harness.limit": 4, "kv_cache.contexts": [64], "kv_cache.tokens": 128, "depth_prune.remove": 1}


def section(values: dict, key: str) -> float:
    found = with_values(values)
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("key", "address"), [(key, each) for key, stages in MORE.items() for each in stages])
def test_more_of_a_parameter_takes_longer(key: str, address: str) -> None:
    once = section(BASE, key)
    took = [work(with_values(BASE | {key: times * once}), shape(), address).seconds(SPEED) for times in (1, 2, 3)]
    assert took[0] < took[1] < took[2]


HEAVY = [name for name in durations.WORK if name not in (*durations.LIGHT, "vocabulary")]


@pytest.mark.parametrize("address", [*HEAVY, "evaluate@fetch", "harness@fetch-corpus"])
@pytest.mark.parametrize("size", SIZES)
def test_a_larger_model_takes_longer(size: str, address: str) -> None:
    params = with_values(BASE | {"gptq.embedding.bits": 4})
    small, large = (work(params, shape(**{size: times * SIZES[size]}), address) for times in (1, 2))
    assert large.seconds(SPEED) > small.seconds(SPEED)


def test_work_adds_up() -> None:
    params = {steps: with_values(SMALL | {"lora.steps": steps}) for steps in (1, 2, 5)}
    found = {steps: work(each, shape(), "lora") for steps, each in params.items()}
    step = found[2] + -1 * found[1]
    assert dataclasses.astuple(found[5]) == pytest.approx(dataclasses.astuple(found[1] + 4 * step))
    assert (found[1] + found[2]).seconds(SPEED) == pytest.approx(found[1].seconds(SPEED) + found[2].seconds(SPEED))
    assert Work(products=6, bytes=4).seconds(SPEED | {"products": 2.0, "bytes": 8.0}) == 3.5


def test_what_is_off_takes_its_start_alone() -> None:
    off = with_values(BASE | {"lora.enabled": False, "baseline.enabled": False, "evaluate.enabled": False})
    for address in ("lora", "baseline_lora", "sensitivity", "baseline", "evaluate@lora"):
        assert work(off, shape(), address) == Work(starts=durations.SHORT)


def test_pruned_layers_are_not_computed_with() -> None:
    none, one = (with_values(BASE | {"depth_prune.remove": remove}) for remove in (0, 1))
    for address, fewer in {"lora": True, "gptq": True, "evaluate@eora": True, "evaluate@fetch": False}.items():
        took = [work(params, shape(), address).seconds(SPEED) for params in (none, one)]
        assert (took[1] < took[0]) == fewer
    assert work(none, shape(), "baseline_lora") == work(one, shape(), "baseline_lora")


def test_every_stage_is_known() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    known = {*durations.WORK, *durations.MATRIX, *durations.LIGHT}
    assert set(stages) - {name for name, stage in stages.items() if stage.get("frozen")} <= known <= set(stages)
    assert set(durations.WORK) | set(durations.MATRIX) <= set(schema.Params.model_fields)
