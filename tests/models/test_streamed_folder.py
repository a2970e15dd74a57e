"""A streamed model against the same one loaded whole, bit for bit; what it writes against stock loading."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, head, layers, matrices
from tasks.models import dense_folder, model_files, skeleton, streamed_folder
from tests.support.family_list import FAMILIES

UP = "model.layers.2.mlp.up_proj.weight"
KINDS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "sharded": {"max_shard_size": "20KB"},
    "bf16": {"dtype": torch.bfloat16},
    "fp16, untied and sharded": {"tie_word_embeddings": False, "max_shard_size": "20KB", "dtype": torch.float16},
    **{architecture: {"architecture": architecture} for architecture in sorted(families.BY_HEART)},
}


@pytest.fixture
def make_folder(model_folder, make_model, tmp_path):
    """make_folder(architecture, dtype, max_shard_size, **config) -> a model folder with the tokenizer."""

    def make(architecture="LlamaForCausalLM", dtype=torch.float32, max_shard_size="1GB", **config):
        folder = tmp_path / "made"
        shutil.copytree(model_folder, folder)
        (folder / model_files.SINGLE).unlink()
        model = make_model(architecture, **config).to(dtype)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make


def rewrite(folder, change):
    tensors = load_file(folder / model_files.SINGLE)
    change(tensors)
    save_file(tensors, folder / model_files.SINGLE, {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_as_the_model_in_memory(kind, make_folder, make_windows):
    folder, ids = make_folder(**KINDS[kind]), make_windows(5, 12)
    assert (len(model_files.weights(folder)) > 3) == ("sharded" in kind)
    whole, streamed, seen = dense_folder.load_dense(folder), streamed_folder.open_dense(folder), []

    def visit(index, block, inputs):
        own = families.blocks(whole)[index].state_dict()
        assert {name: tensor.dtype for name, tensor in block.state_dict().items()} == {
            name: torch.float32 for name in own
        }
        assert all(torch.equal(tensor, own[name]) for name, tensor in block.state_dict().items())
        seen.append(layers.input_statistics(matrices.by_block(streamed)[index], block, inputs))

    found = layers.walk(streamed, ids, visit, batch=2)
    expected = layers.walk(whole, ids, lambda *_: None, batch=2)
    assert len(seen) == 4 and torch.equal(found, expected)
    with torch.no_grad():
        logits = streamed.get_output_embeddings()(streamed.base_model.norm(expected[:2]))
        assert torch.equal(logits, whole(input_ids=ids[:2]).logits)
    tied = streamed.get_output_embeddings().weight is streamed.get_input_embeddings().weight
    assert tied == ("untied" not in kind)
    assert streamed.generation_config == whole.generation_config
    assert streamed.config.to_dict() | {"dtype": 0} == whole.config.to_dict() | {"dtype": 0}


def test_a_block_is_in_memory_while_it_is_open_and_no_longer(model_folder):
    model = streamed_folder.open_dense(model_folder)
    blocks = families.blocks(model)
    names = [
        f"model.layers.{index}.{name}" for index, block in enumerate(blocks) for name, _ in block.named_parameters()
    ]
    assert skeleton.missing(model) == names
    matrix = matrices.by_block(model)[1]["model.layers.1.mlp.up_proj"]
    with layers.opened(blocks[1]):
        assert {name.split(".")[2] for name in skeleton.missing(model)} == {"0", "2", "3"}
        before = matrix.weight.clone()
        matrix.set(torch.zeros(48, 32))
        with layers.opened(blocks[1]):
            assert not matrix.weight.any()
        assert not matrix.weight.any()  # the inner context neither reads anew nor closes
    assert skeleton.missing(model) == names
    with layers.opened(blocks[1]):
        assert torch.equal(matrix.weight, before) and before.any()


def test_blocks_that_open_themselves_serve_the_models_own_forward(model_folder, make_windows):
    whole, streamed = dense_folder.load_dense(model_folder), streamed_folder.open_dense(model_folder)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with layers.opening_themselves(whole), layers.opening_themselves(streamed):
        texts = [model.generate(make_windows(2, 6), **options).tolist() for model in (whole, streamed)]
    assert texts[0] == texts[1]
    assert len(skeleton.missing(streamed)) == 4 * 9
    assert not any("forward" in vars(block) for block in families.blocks(streamed))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_the_stored_model(kind, make_folder, tmp_path):
    folder, out = make_folder(**KINDS[kind]), {name: tmp_path / name for name in ("opened", "copied", "stock")}
    model, tokenizer = streamed_folder.open_dense(folder), dense_folder.load_tokenizer(folder)
    with streamed_folder.writing(model, tokenizer, out["opened"]) as writer:
        for index in (2, 0, 3, 1):
            with layers.opened(families.blocks(model)[index]):
                writer.block(index)
    with streamed_folder.writing(model, tokenizer, out["copied"]) as writer:
        writer.copy()
    dtype = KINDS[kind].get("dtype", torch.float32)
    dense_folder.save_dense(dense_folder.load_dense(folder, dtype), tokenizer, out["stock"])
    names = sorted(path.name for path in out["stock"].iterdir())
    assert names == sorted(path.name for path in out["opened"].iterdir())
    for name in names:
        contents = {(folder / name).read_bytes() for folder in out.values()}
        assert len(contents) == 1, name


def test_a_block_that_was_not_written_leaves_no_checkpoint(model_folder, tmp_path):
    model, tokenizer = streamed_folder.open_dense(model_folder), dense_folder.load_tokenizer(model_folder)
    with (
        pytest.raises(RuntimeError, match=r"lacks model\.layers\.3"),
        streamed_folder.writing(model, tokenizer, tmp_path / "out") as writer,
    ):
        for index in range(3):
            with layers.opened(families.blocks(model)[index]):
                writer.block(index)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop(UP), f"the weights lack {UP}; weights and config.json don't belong together"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "the weights have unexpected extra; weights and config"),
        (lambda tensors: tensors.update({UP: torch.ones(4, 4)}), f"the weights' {UP} is [4, 4], config.json makes it"),
    ],
)
def test_weights_that_are_not_the_config_s_are_refused(change, sentence, model_folder):
    rewrite(model_folder, change)
    with pytest.raises(InputError) as caught:
        streamed_folder.open_dense(model_folder)
    assert str(caught.value).startswith(sentence)


def test_damaged_and_absent_files_are_refused(make_folder):
    folder = make_folder(max_shard_size="20KB")
    shard = folder / model_files.weights(folder)[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(InputError, match="is no safetensors file or is cut off"):
        streamed_folder.open_dense(folder)
    shard.unlink()
    with pytest.raises(InputError, match="which is not there"):
        streamed_folder.open_dense(folder)
    shard.write_bytes(whole)
    model = streamed_folder.open_dense(folder)
    for path in model_files.tensors(folder):
        path.write_bytes(whole[:100])
    with pytest.raises(InputError, match="can't be read"), layers.opened(families.blocks(model)[0]):
        pass


def test_a_tied_matrix_may_have_the_heads_name_and_old_buffers_are_passed_over(model_folder, make_windows, tmp_path):
    before = layers.walk(dense_folder.load_dense(model_folder), make_windows(2, 9), lambda *_: None)

    def change(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(model_folder, change)
    model = streamed_folder.open_dense(model_folder)
    assert torch.equal(layers.walk(model, make_windows(2, 9), lambda *_: None), before)
    with streamed_folder.writing(model, dense_folder.load_tokenizer(model_folder), tmp_path / "out") as writer:
        writer.copy()
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(layers.walk(stock.eval(), make_windows(2, 9), lambda *_: None), before)
    written = load_file(tmp_path / "out" / model_files.SINGLE)
    assert not {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"} & written.keys()


def test_settings_of_generation_may_be_in_the_config(model_folder):
    (model_folder / model_files.GENERATION).unlink()
    path = model_folder / model_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 5, "bos_token_id": 3}))
    found = streamed_folder.open_dense(model_folder).generation_config
    assert found == dense_folder.load_dense(model_folder).generation_config and found.eos_token_id == 5


@pytest.mark.parametrize("name", ["GPT-2", "GPT-J", "Gemma 3"])
def test_other_families_stay_on_disk_and_come_back_as_they_are(name, tmp_path):
    folder = FAMILIES[name].save(tmp_path / "model")
    streamed, whole = streamed_folder.open_dense(folder), dense_folder.load_dense(folder)
    ids = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        found = head.of(streamed)(next(head.states_of(streamed, [ids])))
    torch.testing.assert_close(found.view_as(expected), expected, rtol=1e-5, atol=1e-5)
    with streamed_folder.writing(streamed, dense_folder.load_tokenizer(folder), tmp_path / "copy") as writer:
        writer.copy()
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "copy"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(stock(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
