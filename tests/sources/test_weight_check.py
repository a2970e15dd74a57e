"""Weights against config.json: names, shapes, types and values."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file

from tasks import fetch
from tasks.models import dense_folder
from tests.support.fetch_stage import UP, edit, refusal, rewrite


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP][3, :2] = torch.tensor([float("nan"), float("inf")])


WEIGHTS = {
    "nan": (poison, f"the weights hold NaN or infinity in {UP} (2 of 1536 values); fetch or train the model again"),
    "missing": (
        lambda tensors: tensors.pop(UP),
        f"the weights lack {UP}; weights and config.json don't belong together",
    ),
    "extra": (
        lambda tensors: tensors.update(extra=torch.ones(2)),
        "the weights have unexpected extra; weights and config",
    ),
    "shape": (
        lambda tensors: tensors.update({UP: torch.ones(4, 4)}),
        f"the weights' {UP} is [4, 4], config.json makes it [48, 32]; weights and config don't belong together",
    ),
    "type": (
        lambda tensors: tensors.update({UP: torch.ones(48, 32, dtype=torch.int8)}),
        f"the weights' {UP} is stored as I8, expected F64, F32, F16, BF16",
    ),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_bad_weights(make_fetch, model_folder: Path, kind: str) -> None:
    change, sentence = WEIGHTS[kind]
    rewrite(model_folder, change)
    assert refusal(make_fetch()).startswith(sentence)


def test_weights_that_are_no_safetensors(make_fetch, model_folder: Path) -> None:
    whole = (model_folder / "model.safetensors").read_bytes()
    (model_folder / "model.safetensors").write_bytes(whole[:-100])
    assert refusal(make_fetch()).startswith("model.safetensors is no whole safetensors file")


def test_a_head_that_the_config_ties_but_the_weights_do_not(make_fetch, model_folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    rewrite(model_folder, add)
    assert refusal(make_fetch()) == (
        "the weights hold model.embed_tokens.weight and another lm_head.weight, which config.json ties to it"
        " (tie_word_embeddings); set that to false, or leave lm_head.weight out"
    )
    edit(model_folder / "config.json", tie_word_embeddings=False)
    fetch.run(make_fetch())


def test_tied_head_and_old_buffers_are_welcome(make_fetch, model_folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(model_folder, change)
    stage = make_fetch()
    fetch.run(stage)
    written, original = (load_file(folder / "model.safetensors") for folder in (stage.output("model"), model_folder))
    assert written.keys() == original.keys() > {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert all(torch.equal(tensor, original[name]) for name, tensor in written.items())


def test_a_tied_matrix_may_be_stored_under_the_heads_name(make_fetch, model_folder: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    before = dense_folder.load_dense(model_folder)
    rewrite(model_folder, rename)
    stage = make_fetch()
    fetch.run(stage)
    after = dense_folder.load_dense(stage.output("model"))
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    rewrite(model_folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert refusal(make_fetch()).startswith("the weights lack model.embed_tokens.weight, lm_head.weight")


def test_an_untied_head_that_is_the_embedding_is_told(make_fetch, model_folder: Path, capsys) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(model_folder, add)
    edit(model_folder / "config.json", tie_word_embeddings=False)
    fetch.run(make_fetch())
    said = "lm_head.weight and model.embed_tokens.weight are equal: with tie_word_embeddings true in config.json one of"
    assert said in capsys.readouterr().out


def test_an_untied_head_must_be_there(make_fetch, model_folder: Path) -> None:
    edit(model_folder / "config.json", tie_word_embeddings=False)
    assert refusal(make_fetch()).startswith("the weights lack lm_head.weight")


def test_a_type_that_torch_does_not_know(make_fetch, model_folder: Path) -> None:
    save_numpy({UP: numpy.ones(3, dtype=numpy.uint16)}, model_folder / "model.safetensors")
    assert "is stored as U16" in refusal(make_fetch())
