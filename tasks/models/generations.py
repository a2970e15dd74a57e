"""What transformers 5 writes, so that transformers 4 reads the same: both spellings of an entry, or the one both know.

transformers 4 looks for `rope_theta`, `rope_scaling` and `torch_dtype`; 5 writes `rope_parameters` and `dtype`, of
which 4 sees nothing: it computes with a theta of 10000 and no scaling, without a word. 5 reads either and, given both,
the same (`PreTrainedConfig.convert_rope_params_to_dict`, 5.23). Its `TokenizersBackend` is 4's
`PreTrainedTokenizerFast`, a name that 5 still knows. Of layers with several rotary embeddings (Gemma 3, OLMo 3) 4 has
the full attention's under the same names, and the other's theta by one of its own; GPT-NeoX had names of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.models.model_files import CONFIG, TOKENIZER_CONFIG
from tasks.runtime import files

FULL, SLIDING = "full_attention", "sliding_attention"
OWN = {"gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}}
"""model_type -> what transformers 4 calls an entry of `rope_parameters` there."""
ROTARY = ("rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base")
PARTIAL = ("partial_rotary_factor", "rotary_pct")
"""Entries of `config` that repeat `rope_parameters`; the second ones where that has a part."""


def config(described: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with both spellings; one that transformers 4 wrote stays as it is."""
    found = dict(described)
    rotary = found.get("rope_parameters")
    if isinstance(rotary, dict) and isinstance(rotary.get(FULL), dict):
        local = rotary.get(SLIDING) or {}
        rotary = rotary[FULL]
        if local.get("rope_theta", rotary.get("rope_theta")) != rotary.get("rope_theta"):
            found["rope_local_base_freq"] = local["rope_theta"]
    if isinstance(rotary, dict) and "rope_theta" in rotary:
        scaling = {key: value for key, value in rotary.items() if key not in ("rope_theta", "partial_rotary_factor")}
        found["rope_theta"] = rotary["rope_theta"]
        found["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        if "partial_rotary_factor" in rotary:
            found["partial_rotary_factor"] = rotary["partial_rotary_factor"]
        for older, key in OWN.get(found.get("model_type"), {}).items():
            if key in rotary:
                found[older] = rotary[key]
    if dtype := found.get("dtype"):
        found["torch_dtype"] = dtype
    return found


def repeated(described: Mapping[str, Any]) -> tuple[str, ...]:
    """The entries of a config.json that repeat others."""
    rotary = described.get("rope_parameters")
    if not isinstance(rotary, dict):
        return ()
    rotary = rotary.get(FULL) or rotary
    return ROTARY + (PARTIAL if "partial_rotary_factor" in rotary else ())


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
