"""`auto`: what each rule says for known models, and that all stages of a DAG come to one value."""

import json

import pytest
import yaml

from tasks.algorithms.errors import InputError
from tasks.algorithms.model.shape import ModelShape, shape_of_config
from tasks.parameters import rules, schema
from tasks.parameters.section import AUTO
from tests.benchmarks.random_models import LLAMA_1B, LLAMA_8B, SMOLLM2_135M
from tests.support.paths import ROOT

BUILT_IN = json.loads((ROOT / "data/base_model/model/config.json").read_text(encoding="utf-8"))
RAW = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def settled(config: dict, device: str = "cpu", **changed) -> schema.Params:
    raw = RAW | {"device": device} | {name: RAW[name] | own for name, own in changed.items()}
    return rules.settle_all(schema.parse(raw, "params.yaml"), shape(config))


def shape(config: dict) -> ModelShape:
    return shape_of_config({"architectures": ["LlamaForCausalLM"]} | config)


def asked(section: dict, prefix: str = "") -> list[str]:
    inside = [key for name, own in section.items() if isinstance(own, dict) for key in asked(own, f"{prefix}{name}.")]
    return inside + [f"{prefix}{name}" for name, value in section.items() if value == AUTO]


def test_the_project_s_own_values_for_the_built_in_model() -> None:
    """Those that were chosen on it, in the days when params.yaml named them."""
    params = settled(BUILT_IN)
    assert (params.wanda.keep, params.evaluate.max_windows) == (2, 60)
    assert (params.depth_prune.remove, params.lora.steps, params.lora.learning_rate) == (2, 90, 0.01)
    assert rules.settle(schema.parse(RAW, "params.yaml").eora, shape(BUILT_IN | {"num_hidden_layers": 10}), "cpu") == (
        schema.parse(RAW, "").eora.model_copy(update={"budget_bytes": 8000})
    )


def test_nothing_is_left_to_settle() -> None:
    assert asked(RAW) and asked(settled(BUILT_IN).model_dump()) == []


def test_what_is_given_stays() -> None:
    given = {"depth_prune": {"remove": 1}, "lora": {"steps": 7, "learning_rate": 0.5}, "eora": {"budget_bytes": 99}}
    params = settled(SMOLLM2_135M, **given)
    assert (params.depth_prune.remove, params.lora.steps, params.lora.learning_rate) == (1, 7, 0.5)
    assert params.eora.budget_bytes == 99
    by_rank = settled(SMOLLM2_135M, eora={"rank": 4, "budget_bytes": None})
    assert (by_rank.eora.rank, by_rank.eora.budget_bytes) == (4, None)


@pytest.mark.parametrize("config", [BUILT_IN, SMOLLM2_135M, LLAMA_1B, LLAMA_8B])
def test_layers_and_tokens_that_are_left_change_no_recovery(config: dict) -> None:
    """The plain model's recovery has all layers, the pruned one's fewer; a trimmed model has fewer tokens."""
    smaller = config | {"num_hidden_layers": config["num_hidden_layers"] - 2, "vocab_size": 300}
    assert settled(smaller).lora == settled(config).lora


def test_larger_models_get_smaller_rates_and_no_more_steps() -> None:
    found = [settled(config).lora for config in (BUILT_IN, SMOLLM2_135M, LLAMA_1B, LLAMA_8B)]
    rates, steps = [own.learning_rate for own in found], [own.steps for own in found]
    assert rates == sorted(set(rates), reverse=True) and steps == sorted(set(steps), reverse=True)
    assert {settled(config, device="cuda").lora.steps for config in (BUILT_IN, LLAMA_8B)} == {90}


def test_a_text_that_is_neither() -> None:
    with pytest.raises(InputError) as caught:
        settled(BUILT_IN, lora={"steps": "many"})
    assert str(caught.value) == "params.yaml: `lora.steps` = 'many': input should be a valid integer, or auto"
