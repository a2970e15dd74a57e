"""Packed folders that several files of tests look at: of what the stages hand to the package, and tiny random ones."""

from types import SimpleNamespace

import pytest
import torch

from tasks.algorithms.model import families
from tasks.algorithms.model.shape import shape_of_config
from tasks.algorithms.quantisation import rounding
from tasks.models import gptq_folder, mask_files
from tasks.models.tokenizer_files import copy_tokenizer
from tasks.packed import source_folder
from tasks.packed.stored_model import Model
from tasks.packed.writer import save
from tests.support.packed_models import (
    CASES,
    REALISTIC,
    Recipe,
    branches,
    normal,
    quantise,
    random_dense,
    random_linear,
    save_coded,
)


@pytest.fixture(scope="session")
def tokenizer(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def windows():
    return torch.randint(0, 257, (6, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


@pytest.fixture(scope="session")
def build(tokenizer, windows, tmp_path_factory):
    """build(case) -> what the stages hand to the package, and it packed and, in coding `entropy`, coded."""
    made = {}

    def build(case):
        if case in made:
            return made[case]
        chosen, folder = CASES[case], tmp_path_factory.mktemp(case)
        dense = {key: chosen[key] for key in ("architecture", "pattern", "config") if key in chosen}
        model, keep = random_dense(folder / "dense", tokenizer, **dense)
        mask_files.save_masks(folder / "masks.safetensors", keep, chosen.get("pattern", "dense"))
        quantise(folder, windows, keep, chosen.get("settings", {}), chosen.get("embedding", 16), chosen.get("steps"))
        factors, coded = branches(model, chosen.get("ranks", [0]), chosen.get("adapter", 16))
        gptq_folder.save_adapter(folder / "model", factors)
        save_coded(folder / "adapter.safetensors", coded, chosen.get("adapter", 16))
        parts = [folder / f"{name}.safetensors" for name in ("masks", "embedding", "adapter")]
        save(source_folder.read(folder / "model", *parts), folder / "packed")
        copy_tokenizer(folder / "model", folder / "packed")
        save(source_folder.read(folder / "model", *parts), folder / "coded", "entropy")
        folders = {"model": folder / "model", "packed": folder / "packed", "coded": folder / "coded"}
        made[case] = SimpleNamespace(**folders, parts=parts, keep=keep)
        return made[case]

    return build


@pytest.fixture(scope="session")
def tiny(build, tmp_path_factory):
    """Small packed folders: one with every feature, one with entropy coded positions; in each it entropy coded."""
    folders = []
    for pattern, bits in (("2:4", 4), ("unstructured", 2)):
        config = REALISTIC | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20}
        config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        linears = []
        for layer in range(2):
            recipe = Recipe(bits, pattern, 8, zeros=True, order=layer == 0, scales=5 if layer else 6)
            shapes = shape_of_config(config).linears.items()
            block = {
                f"model.layers.{layer}.{name}": random_linear(shape, recipe, place, seed=7 * layer + place)
                for place, (name, shape) in enumerate(shapes)
            }
            linears.append(block)
        for block in linears:
            for linear in block.values():
                linear.adapter = tuple(rounding.quantise(normal(2, side), 4, 8) for side in linear.shape[::-1])
        norms = [f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in families._LLAMA.norms]
        rest = {name: torch.ones(16, dtype=torch.float16) for name in [*norms, "model.norm.weight"]}
        folder = tmp_path_factory.mktemp("tiny")
        model = Model(config, linears, rounding.quantise(normal(20, 16), 8, 16), None, rest)
        save(model, folder)
        save(model, folder / "coded", "entropy")
        folders.append(folder)
    return folders
