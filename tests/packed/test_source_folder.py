"""What is to be packed, read from a model folder and the codes beside it."""

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.models import mask_files, tensor_files
from tasks.packed import reader, source_folder
from tasks.packed.writer import save
from tests.support.packed_models import packed_tensors, random_dense


def test_a_tied_folder_stays_tied_and_an_untied_one_untied(tmp_path, tokenizer):
    random_dense(tmp_path / "dense", tokenizer)
    path = tmp_path / "dense/model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in packed_tensors(path).items()}
    tensor_files.save_tensors(path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, {})
    with pytest.raises(InputError, match="has a head of its own, but its config ties it"):
        source_folder.read(tmp_path / "dense")
    untied = random_dense(tmp_path / "untied", tokenizer, config={"tie_word_embeddings": False})[0]
    save(source_folder.read(tmp_path / "untied"), tmp_path / "packed")
    loaded = reader.load_model(tmp_path / "packed")
    assert torch.equal(loaded.lm_head.weight, untied.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_codes_that_are_not_the_folder_s_are_refused(build, tmp_path):
    made = build("coded")
    for place, message in ((1, "codes of the embedding aren't"), (2, "codes of the adapter of .* aren't")):
        tensors = packed_tensors(made.parts[place])
        name = next(name for name in sorted(tensors) if name.endswith("codes"))
        tensors[name][0, 0] += 1
        tensor_files.save_tensors(tmp_path / "changed.safetensors", tensors, {"bits": "8" if place == 1 else "4"})
        parts = list(made.parts)
        parts[place] = tmp_path / "changed.safetensors"
        with pytest.raises(InputError, match=message):
            save(source_folder.read(made.model, *parts), tmp_path / "out")
    mask_files.save_masks(tmp_path / "m.safetensors", {"model.layers.7.x": torch.ones(2, 8, dtype=torch.bool)}, "2:4")
    with pytest.raises(InputError, match=r"a mask or an adapter for model.layers.7.x"):
        source_folder.read(made.model, tmp_path / "m.safetensors")
