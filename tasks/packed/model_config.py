"""The config of a packed model: which of its entries are kept, and the model without weights that it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PreTrainedModel

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.models import generations
from tasks.models.skeleton import build

UNSAFE = ("quantization_config", "auto_map", "attn_implementation", "experts_implementation", "dtype", "torch_dtype")
"""Of a config: what would change how it is loaded."""
UNUSED = ("num_labels", "id2label", "label2id")
"""What a language model has no use for."""


def clean(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the entries that `skeleton` refuses, and without second spellings."""
    dropped = UNSAFE + UNUSED + generations.repeated(config)
    return {key: value for key, value in config.items() if key not in dropped and not key.startswith("_")}


def skeleton(config: Mapping[str, Any]) -> PreTrainedModel:
    """The model without weights, on the meta device: no memory, no random numbers.

    Raises:
        InputError: the config has entries that none needs here, or makes no model.
    """
    unsafe = [key for key in config if key in UNSAFE + UNUSED or key.startswith("_")]
    if unsafe:
        raise InputError(f"the config of a packed model has the entry {unsafe[0]!r}: the folder is damaged")
    try:
        kind = getattr(transformers, families.family(config).architecture)
        return build(kind.config_class.from_dict(dict(config)))
    except InputError:
        raise
    except Exception as error:  # a config can be wrong in as many ways as transformers reads it
        raise InputError(f"the config makes no model that is known here: {str(error)[:200]}") from error
