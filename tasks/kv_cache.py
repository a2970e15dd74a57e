"""Stage kv_cache: what the packaged model loses, and a device saves, when the cache holds keys and values in few bits.

kv_cache.csv has a row per context length and number of bits; 16 bits (float16) always lead, as what the others are
compared with. The text is the first `tokens` tokens of the test split for every context, cut into windows of its length
(protocol `joined`), each read from an empty cache.

| column | |
|---|---|
| context, bits | tokens of a window; bits of a cached value |
| protocol, windows, predictions | how the text was cut, and how many tokens were predicted |
| perplexity, bits_per_byte | as in `tasks.evaluate` |
| nats | mean negative log-likelihood per prediction above that of 16 bits on the same tokens |
| nats_error | standard error of `nats` over the windows; empty where there is one |
| bytes | held after a window, all layers, one sequence, of which `codes`, `scales` (and zero points), `float16` |
| bytes_per_token | `bytes` / `context` |
| ratio | bytes at 16 bits / `bytes` |

How the cache is filled and what isn't counted: `tasks.algorithms.scoring.kv_cache`. It measures no speed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tasks.algorithms.model import layers
from tasks.algorithms.model.shape import shape_of_model
from tasks.algorithms.scoring import kv_cache, likelihood, protocols
from tasks.models import dense_folder
from tasks.runners import any_folder
from tasks.runtime import files
from tasks.sources import json_lines

if TYPE_CHECKING:
    import pandas as pd

    from tasks.runtime.stage import Stage

FULL = 16
COLUMNS = (
    "context",
    "bits",
    "protocol",
    "windows",
    "predictions",
    "perplexity",
    "bits_per_byte",
    "nats",
    "nats_error",
    "bytes",
    "codes",
    "scales",
    "float16",
    "bytes_per_token",
    "ratio",
)


def run(stage: Stage) -> None:
    """Write kv_cache.csv."""
    folder, p = stage.model_in, stage.params.kv_cache
    model, tokenizer = any_folder.load_or_stream(folder, stage.params.device), dense_folder.load_tokenizer(folder)
    documents = json_lines.read(stage.input("corpora") / "test.jsonl")
    rows, bits = [], [FULL, *p.bits]
    with stage.progress("kv_cache", len(p.contexts) * len(bits)) as progress, layers.opening_themselves(model):
        for context in p.contexts:
            protocol = protocols.protocol("joined", context, context)
            protocols.check_context(protocol, shape_of_model(model).context)
            prepared = likelihood.prepare(protocol, tokenizer, documents, p.tokens // context)
            reference = None
            for width in bits:
                cached = kv_cache.Cached(model, width, p.group_size, p.residual)
                score = likelihood.score(cached, prepared, saved=stage.journal.part(f"{context}-{width}"))
                reference = reference or score
                if not cached.cache.get_seq_length():  # all windows were in the journal
                    cached.base_model(prepared.ids[0][None, :context])
                rows.append({"context": context, "bits": width, **_row(score, reference), **_held(cached, context)})
                progress.update(len(rows), perplexity=score.perplexity)
    import pandas as pd

    table = pd.DataFrame(rows)
    table["ratio"] = table.groupby("context")["bytes"].transform("first") / table["bytes"]
    _write(stage, table)
    print(table[["context", "bits", "perplexity", "nats", "nats_error", "bytes", "ratio"]].to_string(index=False))


def skip(stage: Stage) -> None:
    """Say that nothing was measured: no rows."""
    files.write_header(stage.output("kv_cache.csv"), COLUMNS)


def _write(stage: Stage, table: pd.DataFrame) -> None:
    files.write_csv(stage.output("kv_cache.csv"), table, "%.9g", COLUMNS)


def _row(score: likelihood.Score, reference: likelihood.Score) -> dict[str, Any]:
    differences = (score.nll - reference.nll).view(score.windows, -1).mean(dim=1)
    return {
        "protocol": score.label,
        "windows": score.windows,
        "predictions": len(score.nll),
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "nats": float(differences.mean()),
        "nats_error": float(differences.std() / math.sqrt(score.windows)) if score.windows > 1 else None,
    }


def _held(cached: kv_cache.Cached, context: int) -> dict[str, Any]:
    parts = kv_cache.held_bytes(cached.cache)
    total = sum(parts.values())
    return {"bytes": total, **parts, "bytes_per_token": total / context}
