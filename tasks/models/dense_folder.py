"""Read and write dense model folders with transformers; quantised folders are `gptq_folder`'s.

Only safetensors are read or written, never a pickle, and no code of a model folder is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.algorithms.model import families
from tasks.algorithms.model.shape import shape_of_model
from tasks.models import generations, model_files, tokenizer_archive

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        InputError: it is larger than any config.
    """
    model_files.check_sizes(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        InputError: one of its files is larger than any tokenizer's, or damaged where it is compressed.
    """
    from transformers import AutoTokenizer  # here: a switched-off stage only asks for the config

    model_files.check_sizes(folder)
    with tokenizer_archive.unpacked(folder) as path:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    tokenizer.name_or_path = str(folder)
    return tokenizer


def load_dense(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A dense checkpoint on the CPU, in evaluation mode, in float32 or the type asked for; matrices are [out, in].

    Raises:
        InputError: a text of the folder is larger than any model's, or it holds two sets of weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from tasks.models import skeleton

    model_files.check_sizes(folder)
    model_files.check_unambiguous(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    return skeleton.with_linears(model).eval()


def save_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model as transformers made it: a checkpoint that stock `from_pretrained` loads, of 4 as of 5."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    generations.rewrite(folder)


def parameter_count(model: PreTrainedModel) -> int:
    """Weights of the model; those of a matrix count alike whether quantised or not, an adapter doesn't count."""
    modules = families.block_linears(model)
    inside = tuple(f"{name}." for name in modules)
    rest = sum(w.numel() for name, w in model.named_parameters() if not name.startswith(inside))
    biases = sum(linear.bias.numel() for linear in modules.values() if linear.bias is not None)
    return rest + biases + shape_of_model(model).in_blocks
