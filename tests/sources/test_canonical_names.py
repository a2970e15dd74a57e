"""Names of the hub's files, against what stock transformers loads from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tasks.sources import canonical_names
from tests.support.family_list import FAMILIES


def hub(name: str, folder: Path, prefix: str, masks: str) -> Path:
    """A model as old files have it: no name of the base model, and causal masks beside the weights."""
    FAMILIES[name].save(folder)
    found = load_file(folder / "model.safetensors")
    older = {key.removeprefix(prefix): value.clone() for key, value in found.items()}
    for block in range(3):
        older[masks.format(block)] = torch.ones(1, 1, 8, 8).tril()
    save_file(older, folder / "model.safetensors", {"format": "pt"})
    return folder


OLDER = {
    "GPT-2": ("transformer.", "h.{}.attn.bias"),
    "BLOOM": ("transformer.", "h.{}.self_attention.attn.masked_bias"),
    "GPT-NeoX, Pythia": ("", "gpt_neox.layers.{}.attention.bias"),
}


@pytest.mark.parametrize("name", OLDER)
def test_older_names_become_the_model_s(name: str, tmp_path: Path) -> None:
    folder = hub(name, tmp_path / "model", *OLDER[name])
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert canonical_names.rewrite(folder)
    found = load_file(folder / "model.safetensors")
    assert set(found) <= set(expected) and set(expected) - set(found) <= {"lm_head.weight"}
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    before = (folder / "model.safetensors").read_bytes()
    assert not canonical_names.rewrite(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_shards_become_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    FAMILIES["GPT-NeoX, Pythia"].make().save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert canonical_names.rewrite(folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
