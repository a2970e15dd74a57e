"""Removing blocks against the same model with those blocks bypassed, and the choice against brute force."""

import json

import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tasks import depth_prune as stage_module
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.pruning import depth_prune, importance
from tasks.models import dense_folder, streamed_folder, tensor_files

WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
MODELS = [
    *((architecture, {}) for architecture in sorted(families.BY_HEART)),
    ("MistralForCausalLM", {"sliding_window": 4}),
    ("Qwen2ForCausalLM", WINDOWED),
    ("Qwen3ForCausalLM", WINDOWED),
]


def bypassed_logits(model, ids, removed):
    blocks = families.blocks(model)
    for index in removed:
        blocks[index].forward = lambda hidden, *_, **__: hidden
    logits = model(input_ids=ids).logits.detach()
    for index in removed:
        del blocks[index].forward
    return logits


@pytest.mark.parametrize(("architecture", "config"), MODELS)
@pytest.mark.parametrize("removed", [[1], [0, 2], [3, 1], []])
def test_logits_equal_those_with_the_blocks_bypassed(architecture, config, removed, make_model, make_windows, tmp_path):
    model, ids = make_model(architecture, **config), make_windows(2, 12)
    smaller = depth_prune.without(model, removed)
    expected = bypassed_logits(model, ids, removed)
    assert torch.equal(smaller(input_ids=ids).logits, expected)
    smaller.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 4 - len(removed)
    assert torch.equal(again(input_ids=ids).logits, expected)


@pytest.mark.parametrize(("architecture", "config"), MODELS)
def test_generation_is_the_same_with_and_without_the_cache(architecture, config, make_model, make_windows, tmp_path):
    smaller = depth_prune.without(make_model(architecture, **config), [0, 2])
    smaller.save_pretrained(tmp_path)
    for model in (smaller, transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        texts = [model.generate(make_windows(1, 6), use_cache=cached, **options).tolist() for cached in (True, False)]
        assert texts[0] == texts[1]
        indices = [block.self_attn.layer_idx for block in families.blocks(model)]
        assert indices == [0, 1]


def test_per_layer_lists_follow_the_blocks_that_stay(make_model):
    smaller = depth_prune.without(make_model("Qwen2ForCausalLM", **WINDOWED), [0, 3])
    assert smaller.config.layer_types == ["full_attention", "sliding_attention"]
    assert smaller.config.max_window_layers == 1


def test_the_given_model_stays_as_it_is_and_lends_its_weights(make_model, make_windows):
    model, ids = make_model("Qwen2ForCausalLM"), make_windows(2, 12)
    before = model(input_ids=ids).logits
    smaller = depth_prune.without(model, [0, 1])
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.config.num_hidden_layers == len(model.config.layer_types) == 4
    assert [block.self_attn.layer_idx for block in families.blocks(model)] == [0, 1, 2, 3]
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in own for parameter in smaller.parameters())
    assert smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight


@pytest.mark.parametrize(("remove", "expected"), [(0, []), (1, [5]), (2, [5, 2]), (3, [5, 2, 3]), (4, [5, 2, 3, 4])])
def test_one_shot_takes_the_lowest_unprotected_and_the_lower_index_of_equals(remove, expected):
    scores = [0, 0, 2, 3, 3, 1, 0, 0]
    assert depth_prune.one_shot(scores, remove, 2, 2) == expected


@pytest.mark.parametrize(("remove", "first", "last"), [(3, 4, 2), (9, 0, 0), (1, 5, 5), (8, 0, 0)])
def test_too_many_are_refused(remove, first, last):
    with pytest.raises(InputError, match=f"remove = {remove}"):
        depth_prune.one_shot(list(range(8)), remove, first, last)


@pytest.mark.parametrize("method", [*importance.SCORES, importance.COMPOUND])
def test_greedy_equals_a_loop_that_prunes_and_scores(method, make_model, make_windows):
    model, ids = make_model(num_hidden_layers=6), make_windows(2, 12)
    scores = importance.score(model, ids, method)
    found = depth_prune.greedy(model, scores, lambda m: importance.score(m, ids, method), 3, 1, 1)
    current, names = model, list("012345")
    for _ in range(3):
        ranked = sorted(zip(importance.score(current, ids, method).tolist(), range(len(names)), strict=True))
        position = next(index for _, index in ranked if names[index] not in "05")
        current = depth_prune.without(current, [position])
        names.pop(position)
    assert sorted(set(range(6)) - set(found)) == [int(name) for name in names]
    if method == "magnitude":  # a block's magnitude doesn't depend on the others
        assert found == depth_prune.one_shot(scores, 3, 1, 1)


@pytest.fixture
def ready(model_folder, make_stage, make_windows, tmp_path):
    """ready(out, **params) -> the stage with its inputs."""
    ids = make_windows(3, 16)
    tensor_files.save_tensors(tmp_path / "windows.safetensors", {"input_ids": ids.int()}, {})
    model = dense_folder.load_dense(model_folder)
    table = {method: importance.score(model, ids[:2], method).numpy() for method in (*importance.SCORES, "compound")}
    pd.DataFrame({"layer": range(4), **table}).to_csv(tmp_path / "scores.csv", index=False)
    names = ("windows.safetensors", "scores.csv")
    inputs = {"vocabulary/model": model_folder, **{name: tmp_path / name for name in names}}

    def make(out="out", method="block_influence", **params):
        params = {"remove": 2, "protect_first": 1, "protect_last": 0, "schedule": "one_shot", **params}
        return make_stage({"depth_prune": params, "importance": {"windows": 2, "method": method}}, inputs, out)

    return make


@pytest.mark.parametrize("schedule", ["one_shot", "greedy"])
@pytest.mark.parametrize("method", [*importance.SCORES, importance.COMPOUND])
def test_the_stage_s_model_loads_with_stock_code(method, schedule, ready, model_folder, make_windows, tmp_path, capsys):
    for out in ("a", "b"):
        stage_module.run(ready(out, method, schedule=schedule))
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    record = json.loads((tmp_path / "a/removed.json").read_text())
    assert sorted(record["removed"] + record["kept"]) == [0, 1, 2, 3]
    assert 0 in record["kept"]
    assert (record["method"], record["schedule"]) == (method, schedule)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a/model").eval()
    transformers.AutoTokenizer.from_pretrained(tmp_path / "a/model")
    ids = make_windows(2, 12)
    expected = bypassed_logits(dense_folder.load_dense(model_folder), ids, record["removed"])
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert f"removed layers {record['removed']} of 4" in capsys.readouterr().out


def test_weights_keep_the_type_that_they_are_stored_in(ready, model_folder, tmp_path):
    dense_folder.load_dense(model_folder, torch.bfloat16).save_pretrained(model_folder)
    before = load_file(model_folder / "model.safetensors")
    stage_module.run(ready(method="magnitude"))
    kept = json.loads((tmp_path / "out/removed.json").read_text())["kept"]
    written = load_file(tmp_path / "out/model/model.safetensors")
    for name, weight in written.items():
        parts = name.split(".")
        source = ".".join([*parts[:2], str(kept[int(parts[2])]), *parts[3:]]) if "layers" in name else name
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, before[source])
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/model").dtype == torch.bfloat16


@pytest.mark.parametrize("method", importance.SCORES)
def test_scores_of_one_block_at_a_time_are_those_of_the_model_in_memory(method, model_folder, make_windows):
    whole, streamed = dense_folder.load_dense(model_folder), streamed_folder.open_dense(model_folder)
    for removed in ([], [1], [0, 2]):
        models = [depth_prune.without(model, removed) for model in (whole, streamed)]
        scores = [importance.score(model, make_windows(3, 12), method) for model in models]
        assert torch.equal(*scores) and len(scores[0]) == 4 - len(removed)


def test_the_stored_weights_are_only_those_that_stay(ready, tmp_path):
    stage_module.run(ready())
    kept = {name.split(".")[2] for name in load_file(tmp_path / "out/model/model.safetensors") if "layers" in name}
    assert kept == {"0", "1"}


@pytest.mark.parametrize("run", [lambda stage: stage_module.skip(stage), lambda stage: stage_module.run(stage)])
def test_nothing_to_remove_passes_the_bytes_on(run, ready, model_folder, tmp_path):
    run(ready(remove=0))
    for path in model_folder.iterdir():
        assert (tmp_path / "out/model" / path.name).read_bytes() == path.read_bytes()
    record = json.loads((tmp_path / "out/removed.json").read_text())
    assert (record["removed"], record["kept"]) == ([], [0, 1, 2, 3])


def test_the_stage_refuses_too_many_before_it_reads_weights(ready, model_folder):
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="remove = 4"):
        stage_module.run(ready(remove=4))
