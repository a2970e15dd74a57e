"""What the defaults of a small model do to a real one: layers removed, patterns, learning rates; nothing quantised.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.defaults --model smollm2-135m --folder DIR --threads 1 [--only rate]

Perplexity after depth pruning and after WANDA is one-shot. Rates are compared by a short recovery at 2:4 (`SHORT`), as
their order is asked for, not the figures that a whole recovery would reach. `tasks.parameters.rules` has what became of
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from tests.benchmarks.chain import Chain
from tests.benchmarks.table import Row, Subject, main

SHORT = {"lora.steps": 16, "lora.batch": 4}
"""16,384 tokens at the default length of 256."""
NOTHING = {"depth_prune.remove": 0, "wanda.enabled": False}
RATES = (0.001, 0.003, 0.006, 0.01)


def _pattern(keep: int, of: int) -> dict[str, Any]:
    return {"wanda.pattern": "n_m", "wanda.keep": keep, "wanda.of": of}


POINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fetched": ("fetch", {}),
    **{f"{count} layers removed": ("depth_prune", NOTHING | {"depth_prune.remove": count}) for count in (1, 2, 3)},
    **{f"{keep}:{of}": ("wanda", _pattern(keep, of)) for keep, of in ((3, 4), (4, 8), (2, 4))},
    **{f"2:4, rate {rate}": ("lora", _pattern(2, 4) | SHORT | {"lora.learning_rate": rate}) for rate in RATES},
    "3:4, rate 0.003": ("lora", _pattern(3, 4) | SHORT | {"lora.learning_rate": 0.003}),
}
"""Name -> the stage whose model is measured, and the parameters."""
COLUMNS = ["point", "ppl_test", "ppl_ood", "seconds"]


def rows(base: Chain, subject: Subject) -> Iterator[Row]:
    """One row per point."""
    for name, (stage, params) in POINTS.items():
        yield {"point": name}, partial(_measured, base.variant(params), stage)


def _measured(chain: Chain, stage: str) -> Mapping[str, Any]:
    perplexity = chain.perplexity(stage)
    return {"ppl_test": perplexity["test"], "ppl_ood": perplexity["test_ood"], "seconds": chain.seconds(stage)}


if __name__ == "__main__":
    main("defaults", COLUMNS, rows)
