"""Which files of a folder are the model, beside everything that a training or a hub's repository leaves there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from tasks import fetch
from tasks.algorithms.errors import InputError
from tasks.device_profiles import contents
from tasks.models import dense_folder, gptq_folder, model_files, tensor_headers
from tasks.models.tokenizer_files import copy_tokenizer
from tests.support.fetch_stage import edit
from tests.support.project import tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


def clutter(folder: Path) -> Path:
    """What `Trainer` and the hub's repositories leave beside a model."""
    (folder / "original").mkdir()
    (folder / "original/consolidated.00.pth").write_bytes(bytes(3_000_000))
    (folder / "optimizer.pt").write_bytes(bytes(2_000_000))
    (folder / "trainer_state.json").write_bytes(b" " * 18_000_000)
    (folder / "README.md").write_text("# a model")
    (folder / "checkpoint-5").mkdir()
    for name in ("checkpoint-5/model.safetensors", "consolidated.safetensors"):
        shutil.copyfile(next(folder.glob("model*.safetensors")), folder / name)
    return folder


def sharded(folder: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.mark.parametrize("make", [lambda folder: folder, sharded])
def test_what_is_beside_a_model_counts_for_nothing(folder: Path, make) -> None:
    make(folder)
    files = sorted(folder.iterdir())
    clean = contents.read(folder)
    assert clean.stored == sum(path.stat().st_size for path in files)
    assert model_files.every(clutter(folder)) == files
    assert contents.read(folder) == clean
    assert sum(tensor_headers.component_bytes(folder).values()) == clean.stored
    fetch.check_folder(folder)
    dense_folder.load_tokenizer(folder)
    assert sum(weight.numel() for weight in dense_folder.load_dense(folder).parameters()) == 139_328 + 9 * 64  # norms


def test_a_tokenizer_is_copied_without_it(folder: Path, tmp_path: Path) -> None:
    names = copy_tokenizer(clutter(folder), tmp_path / "to")
    assert names == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == names


def test_two_sets_of_weights_are_not_loaded_as_the_one_that_is_not_counted(folder: Path, tmp_path: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", tmp_path / "one")
    shutil.copyfile(tmp_path / "one", sharded(folder) / "model.safetensors")
    assert len(model_files.weights(folder)) == 3
    for load in (dense_folder.load_dense, gptq_folder.load_quantised):
        with pytest.raises(InputError, match="holds model.safetensors and shards that .* names: remove the one or"):
            load(folder)
    edit(folder / model_files.INDEX, weight_map={"model.norm.weight": "model.safetensors"})
    dense_folder.load_dense(folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", json.dumps({"weight_map": {"a": "gone.safetensors"}})])
def test_a_damaged_index_is_a_sentence_wherever_weights_are_counted(folder: Path, index: str) -> None:
    (folder / model_files.INDEX).write_text(index)
    for count in (contents.read, tensor_headers.entries, model_files.stored_bytes):
        with pytest.raises(InputError, match="index.json"):
            count(folder)
