"""What transformers 5 writes, so that transformers 4 reads the same: both spellings of an entry, or the one both know.

transformers 4 looks for `rope_theta`, `rope_scaling` and `torch_dtype`; 5 writes `rope_parameters` and `dtype`, of
which 4 sees nothing: it computes with a theta of 10000 and no scaling, without a word. 5 reads either and, given both,
the same (`PreTrainedConfig.convert_rope_params_to_dict`, 5.23). Its `TokenizersBackend` is 4's
`PreTrainedTokenizerFast`, a name that 5 still knows. Families whose layers have several rotary embeddings are not among
ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.models.model_files import CONFIG, TOKENIZER_CONFIG
from tasks.runtime import files

ROTARY = ("rope_theta", "rope_scaling")
"""Entries of `config` that repeat `rope_parameters`."""


def config(described: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with both spellings; one that transformers 4 wrote stays as it is."""
    found = dict(described)
    rotary = found.get("rope_parameters")
    if isinstance(rotary, dict) and "rope_theta" in rotary:
        scaling = {key: value for key, value in rotary.items() if key != "rope_theta"}
        found["rope_theta"] = rotary["rope_theta"]
        found["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if dtype := found.get("dtype"):
        found["torch_dtype"] = dtype
    return found


def tokenizer_config(described: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json in the words that both know."""
    found = dict(described)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):  # 4 expects a table of that name, and has this for a list
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found


def rewrite(folder: Path) -> None:
    """Both files of a folder that transformers 5 has written."""
    for name, spelled in SPELLINGS.items():
        path = folder / name
        if path.exists():
            files.write_json(path, spelled(json.loads(path.read_text(encoding="utf-8"))))


SPELLINGS = {CONFIG: config, TOKENIZER_CONFIG: tokenizer_config}
