"""Give the tensors of a fetched model the names that transformers' model has for them.

Files of the hub have older ones: without the name of the base model ("wte.weight" of GPT-2), or a head by another name
("embed_out" of GPT-NeoX), and masks that were once stored as buffers. transformers knows these when it loads a model;
all later stages read tensors by their names, so they are put right here, once. Values stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from tasks.models import model_files, skeleton, tensor_files
from tasks.models.stored_tensors import NOT_WEIGHTS, StoredTensors

BUFFERS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$")
"""Causal masks that old checkpoints hold; GPT-2's, GPT-Neo's, GPT-NeoX's."""


def rewrite(folder: Path) -> bool:
    """Rename tensors and drop stored masks, into one file; returns whether there was anything to do.

    Raises:
        InputError: there are no weights as safetensors, or a file is damaged.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    stored, model = StoredTensors(folder), skeleton.build(config)
    names = _names(list(stored.entries), model)
    if all(new == old for old, new in names.items()):
        return False
    files = model_files.tensors(folder)
    entries = {new: stored.entries[old] for old, new in names.items() if new}
    unfinished = folder / ".renamed.safetensors"
    with tensor_files.writing(unfinished, entries, {"format": "pt"}) as write:
        for old, new in names.items():
            if new:
                write(new, stored.read(old))
    for path in (*files, folder / model_files.INDEX):
        path.unlink(missing_ok=True)
    unfinished.replace(folder / model_files.SINGLE)
    return True


def _names(stored: list[str], model: PreTrainedModel) -> dict[str, str | None]:
    """The name of each stored tensor in the model; None of one that holds no weights, itself of an unknown one."""
    expected = model.state_dict()
    known = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    found: dict[str, str | None] = {}
    for old in stored:
        new, _ = rename_source_key(old, known, [], model.base_model_prefix, expected)
        if new in expected and new not in found.values():
            found[old] = new
        else:
            found[old] = None if BUFFERS.search(f".{old}") and not old.endswith(NOT_WEIGHTS) else old
    return found
