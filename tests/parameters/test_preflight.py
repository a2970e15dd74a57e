"""preflight: each bad value's sentence, and that the sizes behind the estimates are those of a real model."""

import copy
import json
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
import transformers
import yaml

from tasks.algorithms.errors import InputError
from tasks.parameters import needs, preflight, schema
from tests.support.paths import ROOT

AVAILABLE_MEMORY = needs.available_memory
USAGE = namedtuple("USAGE", "total used free")  # what shutil.disk_usage gives
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 12,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
GOOD = {
    "calibrate.windows": 10,
    "calibrate.length": 512,
    "importance.windows": 4,
    "depth_prune.remove": 2,
    "depth_prune.protect_first": 4,
    "depth_prune.protect_last": 2,
    "wanda.method": "wanda",
    "wanda.pattern": "n_m",
    "wanda.keep": 2,
    "wanda.of": 4,
    "lora.rank": 16,
    "lora.targets": "all-linear",
    "lora.length": 256,
    "gptq.group_size": 32,
    "eora.rank": 8,
    "eora.budget_bytes": None,
    "evaluate.length": 512,
    "evaluate.stride": 512,
    "hardware_fit.device": "siracusa",
}
SWITCHES = tuple(
    name
    for name, field in schema.Params.model_fields.items()
    if "enabled" in getattr(field.annotation, "model_fields", ())
)


def with_values(values: dict) -> schema.Params:
    """params.yaml with every stage on and the values of `GOOD`, then `values`."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for key, value in ({f"{name}.enabled": True for name in SWITCHES} | GOOD | values).items():
        *sections, last = key.split(".")
        place = raw
        for section in sections:
            place = place[section]
        assert last in place, key
        place[last] = value
    return schema.parse(raw, "params.yaml")


@pytest.fixture(autouse=True)
def roomy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with memory and disk, whatever this one has, and two devices."""
    for name in ("siracusa", "phone"):
        (tmp_path / "devices").mkdir(exist_ok=True)
        (tmp_path / "devices" / f"{name}.yaml").touch()
    monkeypatch.setattr(preflight, "DEVICES", tmp_path / "devices")
    monkeypatch.setattr(needs, "available_memory", lambda: 2**40)
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: USAGE(2**45, 0, 2**45))
    return tmp_path


def problems(values: dict, config: dict | None = None, **named) -> list[str]:
    try:
        preflight.check(with_values(values), CONFIG | (config or {}), **named)
    except InputError as error:
        return str(error).splitlines()
    return []


def test_a_good_run_passes() -> None:
    assert problems({}, tokenizer_size=2048) == []


SENTENCES = [
    (
        {"depth_prune.remove": 8},
        {},
        "depth_prune.remove = 8 of 12 layers, but 4 + 2 protected ones leave only 6 to choose from;"
        " lower depth_prune.remove, protect_first or protect_last",
    ),
    (
        {"depth_prune.remove": 1, "depth_prune.protect_first": 9, "depth_prune.protect_last": 9},
        {},
        "depth_prune.remove = 1 of 12 layers, but 9 + 9 protected ones leave only 0 to choose from;"
        " lower depth_prune.remove, protect_first or protect_last",
    ),
    (
        {"depth_prune.remove": 12, "depth_prune.protect_first": 0, "depth_prune.protect_last": 0},
        {},
        "depth_prune.remove = 12 would remove every layer of the model; lower it",
    ),
    (
        {"wanda.of": 5},
        {},
        "wanda.of = 5 does not divide the 128 inputs of self_attn.q_proj; choose a divisor of 128",
    ),
    (
        {"gptq.group_size": 128},
        {"intermediate_size": 352},
        "gptq.group_size = 128 does not divide the 352 inputs of mlp.down_proj; choose a divisor of 352",
    ),
    (
        {"gptq.group_size": -1},
        {"num_key_value_heads": 1, "head_dim": 8},
        "gptq packs 32 rows and columns at a time, but self_attn.k_proj is 8 x 128;"
        " switch gptq and eora off, or take another model",
    ),
    (
        {"lora.rank": 65},
        {},
        "lora.rank = 65 is above the smallest side of self_attn.k_proj (64 x 128); lower it to 64",
    ),
    (
        {"lora.rank": 129, "lora.targets": "mlp"},
        {},
        "lora.rank = 129 is above the smallest side of mlp.gate_proj (384 x 128); lower it to 128",
    ),
    (
        {"eora.rank": 65},
        {},
        "eora.rank = 65 is above the smallest side of self_attn.k_proj (64 x 128); lower it to 64",
    ),
    *[
        ({f"{name}.length": 513}, {}, f"{name}.length = 513 is above the model's context of 512 tokens; lower it")
        for name in ("calibrate", "lora", "evaluate")
    ],
    (
        {"kv_cache.contexts": [128, 513], "kv_cache.tokens": 600},
        {},
        "kv_cache.contexts = 513 is above the model's context of 512 tokens; lower it",
    ),
    (
        {"kv_cache.group_size": 24},
        {},
        "kv_cache.group_size = 24 does not divide the 32 values of an attention head;"
        " choose a divisor of 32, or null for the whole head",
    ),
    (
        {},
        {"sliding_window": 128},
        "kv_cache can't quantise the cache of a model whose attention has a window (sliding_window = 128 in its"
        " config.json): set kv_cache.enabled to false",
    ),
    (
        {"hardware_fit.device": "toaster"},
        {},
        "hardware_fit.device = toaster has no profile {devices}/toaster.yaml; known are phone, siracusa",
    ),
]


@pytest.mark.parametrize(("values", "config", "sentence"), SENTENCES)
def test_each_problem_has_its_sentence(roomy: Path, values: dict, config: dict, sentence: str) -> None:
    said = problems(values, config)
    if "num_key_value_heads" in config:  # a head of 8 also bounds the ranks
        said = [line for line in said if line.startswith("gptq")]
    assert said == [sentence.format(devices=roomy / "devices")]


@pytest.mark.parametrize(("values", "config", "sentence"), SENTENCES)
def test_a_stage_that_is_off_has_no_problems(values: dict, config: dict, sentence: str) -> None:
    everything_off = {f"{name}.enabled": False for name in SWITCHES}
    assert problems(values | everything_off, config) == []


def test_all_problems_at_once() -> None:
    assert len(problems({"depth_prune.remove": 8, "wanda.of": 5, "lora.rank": 500, "evaluate.length": 600})) == 4


@pytest.mark.parametrize(
    ("values", "config"),
    [
        ({"depth_prune.remove": 6}, {}),
        ({"depth_prune.remove": 0, "depth_prune.protect_first": 99}, {}),
        ({"lora.rank": 64, "eora.rank": 64}, {}),
        ({"lora.rank": 128, "lora.targets": "mlp"}, {}),
        ({"gptq.group_size": -1}, {"intermediate_size": 352}),
        ({"wanda.pattern": "unstructured", "wanda.sparsity": 0.5, "wanda.of": 5}, {}),
        ({"calibrate.length": 4096}, {"max_position_embeddings": None}),
        ({"kv_cache.group_size": 16}, {"sliding_window": 128, "use_sliding_window": False}),
        ({}, {"num_key_value_heads": None, "architectures": ["Qwen3ForCausalLM"]}),
    ],
)
def test_the_edge_is_allowed(values: dict, config: dict) -> None:
    assert problems(values, config) == []


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "MambaForCausalLM is a state-space model (state_size in its config), which isn't supported",
        ),
        (
            {"architectures": ["LlamaWithoutEnd"]},
            "the model's config.json names LlamaWithoutEnd, which is no language model",
        ),
        ({"architectures": None}, "the model's config.json names no architecture; expected one"),
        (
            {"architectures": "LlamaForCausalLM"},
            "the model's config.json has architectures = 'LlamaForCausalLM', expected",
        ),
        ({"auto_map": {}}, "the model's config.json has `auto_map`"),
        ({"quantization_config": {"bits": 4}}, "the model is quantised already"),
        *[
            ({key: value}, f"the model's config.json has {key} = {value!r}, expected a whole number above 0")
            for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
            for value in (None, 0, -1, 1.5, "12", True, 10**400)
        ],
        ({"head_dim": -8}, "the model's config.json has head_dim = -8, expected a whole number above 0"),
    ],
)
def test_a_config_that_cannot_be_run(config: dict, sentence: str) -> None:
    said = problems({}, config)
    assert len(said) == 1 and said[0].startswith(sentence)


def test_a_tokenizer_larger_than_the_embedding() -> None:
    (sentence,) = problems({}, tokenizer_size=2049)
    assert sentence.startswith("the tokenizer has 2049 tokens, the model's embedding 2048 rows (vocab_size)")


def test_memory_has_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "available_memory", lambda: 3 * 2**29)
    (sentence,) = problems({"evaluate.batch": 4096})
    needed = needs.LIBRARIES + needs.MEMORY["evaluate"](
        with_values({"evaluate.batch": 4096}), preflight.model_shape(CONFIG)
    )
    assert sentence.startswith(f"evaluate needs about {needed / 2**30:.1f} GiB of memory, 1.5 GiB are available;")


LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
"""Llama-3.2-1B's sizes, but for its heads."""


@pytest.mark.parametrize(
    ("values", "gibibytes"),
    [
        ({"lora.batch": 1024}, 24),
        ({"evaluate.batch": 512}, 24),
        ({"calibrate.windows": 1024}, 24),
        ({"lora.batch": 1024, "evaluate.batch": 512, "calibrate.windows": 1024}, 24),
        (
            {
                "importance.method": "taylor",
                "importance.windows": 64,
                "calibrate.windows": 64,
                "calibrate.length": 4096,
            },
            30,
        ),
    ],
)
def test_the_remedy_that_is_named_works(
    values: dict, gibibytes: int, roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(roomy)  # without documents, which would say how long they are
    monkeypatch.setattr(needs, "available_memory", lambda: gibibytes * 2**30)
    config = LARGE | {"max_position_embeddings": 131072}
    said = problems(values, config)
    assert said
    remedies = [re.search(r"lower (\S+) to (\d+),", sentence).groups() for sentence in said]
    named = {key: int(value) for key, value in remedies}
    assert len(named) == len(said)
    assert problems(values | named, config) == []
    for key, value in named.items():  # one more would be too many
        assert len(problems(values | named | {key: value + 1}, config)) == 1


def test_where_no_value_helps_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "available_memory", lambda: 2**30)
    said = problems({}, LARGE, stage="evaluate")
    assert said and all("lower" not in sentence and "take a smaller model" in sentence for sentence in said)


def test_disk_has_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: USAGE(2**40, 2**40, 3 * 2**20))
    large = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256}
    (sentence,) = problems({}, large)
    assert sentence.startswith("the stages still to run write about ") and ", 3.0 MiB are free" in sentence
    assert problems({}, large, stage="report") == []


def test_only_what_is_still_to_run_needs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "available_memory", lambda: 2**30)
    crowded = {"lora.batch": 4096}
    assert problems(crowded)[0].startswith("baseline_lora needs about")
    assert problems(crowded, stage="evaluate") == []
    assert problems(crowded | {"lora.enabled": False}) == []


def test_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs.machine, "CONTROL_GROUPS", (tmp_path / "gone", tmp_path / "limit"))
    assert 0 < AVAILABLE_MEMORY() <= psutil.virtual_memory().total
    (tmp_path / "limit").write_text("max\n")
    assert AVAILABLE_MEMORY() > 12345
    (tmp_path / "limit").write_text("12345\n")
    assert AVAILABLE_MEMORY() == 12345


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", [{"head_dim": 48}, {"num_key_value_heads": None}, {}])
def test_sizes_are_those_of_the_model(tied: bool, heads: dict) -> None:
    config = CONFIG | heads | {"tie_word_embeddings": tied}
    shape = preflight.model_shape(config)
    known = {key: value for key, value in config.items() if value is not None and key not in ("architectures", "dtype")}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**known))
    linears = {
        name: module for name, module in model.model.layers[0].named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert dict(shape.linears) == {name: (module.out_features, module.in_features) for name, module in linears.items()}
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    assert shape.in_blocks + shape.outside == matrices
    assert shape.stored == 2


def test_tables_name_stages() -> None:
    stages = set(schema.Params.model_fields)
    for table in (preflight.RULES, needs.MEMORY, needs.DISK):
        assert table and set(table) <= stages


def test_it_needs_no_torch() -> None:
    found = "[name for name in ('torch', 'transformers', 'dvc') if name in sys.modules]"
    code = f"import sys, tasks.parameters.preflight; print({found})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def workspace(roomy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(roomy)
    for folder in ("here", str(preflight.FETCHED)):
        (roomy / folder).mkdir(parents=True)
        (roomy / folder / "config.json").write_text(json.dumps(CONFIG))
    return roomy


LOCAL = {"fetch.model.path": "here", "fetch.model.hub": None, "fetch.model.revision": None}
AT_HUB = {"fetch.model.path": "here", "fetch.model.hub": "a/model", "fetch.model.revision": "0" * 40}
TOO_MANY = {"depth_prune.remove": 8}


def test_workspace_with_a_local_model(workspace: Path) -> None:
    preflight.check_workspace(with_values(LOCAL))
    for stage in (None, "corpus", "fetch", "report", "evaluate@gptq"):
        with pytest.raises(InputError, match="of 12 layers"):
            preflight.check_workspace(with_values(LOCAL | TOO_MANY), stage)


@pytest.mark.parametrize(("content", "words"), [(b" \n\n", "holds no prompt"), (b"\xff\n", "is no UTF-8")])
@pytest.mark.parametrize("values", [LOCAL | TOO_MANY, AT_HUB])
def test_workspace_with_a_file_without_prompts(workspace: Path, values: dict, content: bytes, words: str) -> None:
    Path("prompts.txt").write_bytes(content)
    values = values | {"evaluate.prompts": "prompts.txt"}
    for stage in (None, "code", "fetch"):
        with pytest.raises(InputError, match=f"evaluate.prompts = prompts.txt {words}") as caught:
            preflight.check_workspace(with_values(values), stage)
        assert ("of 12 layers" in str(caught.value)) == (values["fetch.model.hub"] is None)  # all at once
    preflight.check_workspace(with_values(values | {"evaluate.enabled": False} | {"depth_prune.remove": 1}))


def test_workspace_before_the_model_is_there(workspace: Path) -> None:
    (workspace / "here/config.json").unlink()
    preflight.check_workspace(with_values(LOCAL | TOO_MANY), "base_model")
    with pytest.raises(InputError, match="has no profile"):
        preflight.check_workspace(with_values(LOCAL | {"hardware_fit.device": "toaster"}), "base_model")


def test_workspace_with_a_hub_model(workspace: Path) -> None:
    preflight.check_workspace(with_values(AT_HUB | TOO_MANY), "fetch")  # what is there may be another model
    with pytest.raises(InputError, match="of 12 layers"):
        preflight.check_workspace(with_values(AT_HUB | TOO_MANY), "calibrate")


def test_workspace_with_a_broken_config(workspace: Path) -> None:
    (workspace / "here/config.json").write_text("{")
    with pytest.raises(InputError, match="here/config.json is not valid JSON"):
        preflight.check_workspace(with_values(LOCAL))


def test_what_was_checked_is_not_changed() -> None:
    config = copy.deepcopy(CONFIG)
    preflight.check(with_values({}), config)
    assert config == CONFIG


def test_a_gpu_that_is_not_there_is_said_before_any_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (sentence,) = problems({"device": "cuda"})
    assert sentence.startswith("device = cuda, but PyTorch ") and "set device to cpu" in sentence
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert problems({"device": "cuda"}) == []
