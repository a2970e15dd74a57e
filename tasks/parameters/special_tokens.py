"""Tokens that stages ask of a tokenizer (eos, bos, offsets), looked for before hours of other stages.

Known exactly where the tokenizer is loaded, in fetch. A parameter that is changed afterwards doesn't run fetch again:
so each stage looks into the files, which tell it where the tokenizer's class adds no token by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tasks.algorithms.scoring import protocols
from tasks.parameters.schema import Params

GENERIC = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes whose special tokens are those that the files name; another may have some of its own."""
LARGEST = 2**24
"""Bytes of a file that is read; the folder is untrusted."""


class Known(NamedTuple):
    """Whether a tokenizer has these tokens, and says which text a token stands for."""

    bos: bool
    eos: bool
    offsets: bool


def problems(params: Params, known: Known) -> Iterator[str]:
    """A sentence for each thing that an enabled stage asks of the tokenizer, and that it lacks."""
    if params.harness.enabled and not known.eos:
        yield (
            "the tokenizer has no eos token, which lm_eval begins and ends texts with; set `eos_token` in"
            " tokenizer_config.json, or harness.enabled to false"
        )
    if params.evaluate.enabled and params.evaluate.protocol == "rolling" and not (known.bos or known.eos):
        yield (
            "evaluate.protocol = rolling begins each document with the tokenizer's bos or eos token, and it has"
            f" neither; take one of {', '.join(name for name in protocols.NAMES if name != 'rolling')}"
        )
    measured = [name for name in ("evaluate", "kv_cache") if getattr(params, name).enabled]
    if measured and not known.offsets:
        yield (
            f"the tokenizer doesn't say which text a token stands for, so {' and '.join(measured)} can't measure bits"
            " per byte; take a model with a tokenizer.json"
        )


def of_files(folder: Path) -> Known | None:
    """What a model folder's files say; None where they don't tell."""
    described = _json(folder / "tokenizer_config.json")
    if described is None or described.get("tokenizer_class") not in GENERIC:
        return None
    named = {**(_json(folder / "special_tokens_map.json") or {}), **described}
    return Known(*(named.get(key) is not None for key in ("bos_token", "eos_token")), offsets=True)


def _json(path: Path) -> Mapping[str, Any] | None:
    """A file's object; None where there is none that can be read: fetch has its own sentences for that."""
    try:
        if path.stat().st_size > LARGEST:
            return None
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
