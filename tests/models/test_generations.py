"""What is written is read by transformers 4, too: its spellings are there, and 5 reads the same with and without them.

What 4 sees is what is left without the words that only 5 knows; test_transformers4 has 4 itself.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers

from tasks.models import dense_folder, generations, model_files
from tasks.models.tokenizer_files import copy_tokenizer
from tasks.packed.model_config import clean
from tests.support.family_list import FAMILIES, LLAMA3
from tests.support.project import tiny_llama

ONLY_5 = ("rope_parameters", "dtype")
IDS = torch.arange(120).unsqueeze(0)


@pytest.fixture(params=[LLAMA3, {"rope_type": "default", "rope_theta": 500000.0}])
def saved(request, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint as transformers 5 writes it, and as a stage does."""
    plain, ours = tiny_llama(tmp_path / "plain"), tmp_path / "ours"
    model = transformers.AutoModelForCausalLM.from_pretrained(plain)
    model.config.rope_parameters = dict(request.param)
    model.save_pretrained(plain)
    tokenizer = dense_folder.load_tokenizer(plain)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(plain)
    dense_folder.save_dense(dense_folder.load_dense(plain), tokenizer, ours)
    return plain, ours


LATER = {
    "Gemma 3": {"rope_theta": 1000000.0, "rope_scaling": None, "rope_local_base_freq": 10000.0},
    "OLMo 3": {"rope_theta": 500000.0, "rope_scaling": None},
    "GPT-NeoX, Pythia": {"rotary_emb_base": 10000.0, "rotary_pct": 0.25},
    "Phi": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "StableLM": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
"""By what transformers 4.57 calls them in its configs of these families."""


@pytest.mark.parametrize("name", LATER)
def test_families_with_rotary_embeddings_of_their_own_are_spelled_for_4(name: str) -> None:
    config = FAMILIES[name].make().config
    written = generations.config(config.to_dict())
    assert LATER[name].items() <= written.items()
    for seen in (written, {key: value for key, value in written.items() if key not in ONLY_5}):
        assert type(config).from_dict(copy.deepcopy(seen)).rope_parameters == config.rope_parameters
    again = clean(written)
    assert not set(LATER[name]) & set(again) and again["rope_parameters"] == config.rope_parameters


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return dense_folder.load_dense(folder)(IDS).logits


def test_what_4_sees_is_the_same_model(saved: tuple[Path, Path]) -> None:
    plain, ours = saved
    expected, path = logits(plain), ours / "config.json"
    config = json.loads(path.read_text())
    assert config["rope_theta"] == 500000.0 and config["torch_dtype"] == "float32"
    assert torch.equal(logits(ours), expected)  # 5, with both spellings
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in ONLY_5}))
    assert torch.equal(logits(ours), expected)
    neither = {key: value for key, value in config.items() if key not in (*ONLY_5, *generations.ROTARY)}
    path.write_text(json.dumps(neither))
    assert not torch.equal(logits(ours), expected)  # what 4 made of the model before


def test_5_reads_the_same_with_and_without(saved: tuple[Path, Path]) -> None:
    plain, ours = (transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in saved)
    assert plain | {"_name_or_path": ""} == ours | {"_name_or_path": ""}
    first, second = (transformers.AutoTokenizer.from_pretrained(folder) for folder in saved)
    assert type(first) is type(second) and first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert first.special_tokens_map == second.special_tokens_map
    assert first.all_special_tokens == second.all_special_tokens == ["<end>", "<tool>"]


def test_the_tokenizer_has_a_class_that_4_knows(saved: tuple[Path, Path], tmp_path: Path) -> None:
    plain, ours = saved
    assert json.loads((plain / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    copy_tokenizer(plain, tmp_path / "package")
    for folder in (ours, tmp_path / "package"):
        described = json.loads((folder / "tokenizer_config.json").read_text())
        assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert described["additional_special_tokens"] == ["<tool>"] and "extra_special_tokens" not in described


def test_a_config_of_4_and_a_tokenizer_of_its_own_stay_as_they_are() -> None:
    config = {"rope_theta": 5e5, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16"}
    assert generations.config(config) == config
    described = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image": "<image>"}}
    assert generations.tokenizer_config(described) == described


def test_the_second_spelling_is_not_packed(saved: tuple[Path, Path]) -> None:
    plain, ours = (json.loads((folder / model_files.CONFIG).read_text()) for folder in saved)
    assert clean(ours) == clean(plain)
