"""How much of what 2:4 pruning lost does each way of recovery bring back, and at what cost?

    OMP_NUM_THREADS=1 python -m tests.benchmarks.recovery --threads 1 [--model stories260k] [--only KD]

Each arm is the lora stage with other parameters, on the same pruned model, measured before quantisation. Closed gaps
are shares of the arm "none"'s distance to a dense model, 0 to 1, in perplexity and (…_nats) in its logarithm, where a
huge perplexity right after pruning counts for less: to the fetched model, and to the fetched model after the same
recovery (stage baseline_lora with the losses of the arm), the fair one: recovery also teaches the dense model. An arm
that only makes sense under masks (remasked, the EoRA start, block reconstruction) has the reference of masked KD.
`seconds` is the stage's time when it was computed, on whatever else the machine did then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from tests.benchmarks.chain import Chain
from tests.benchmarks.table import Row, Subject, main

PRUNED = {"wanda.pattern": "n_m", "wanda.keep": 2, "wanda.of": 4}
CAUSAL = {"lora.distillation.weight": 0.0, "lora.distillation.hidden": 0.0}
KD = {"lora.distillation.weight": 0.5, "lora.distillation.hidden": 0.0}
KD_ONLY = {"lora.distillation.weight": 1.0, "lora.distillation.hidden": 0.0}
HIDDEN = {"lora.distillation.weight": 0.5, "lora.distillation.hidden": 1.0}
MASKED = {"lora.method": "masked", "lora.start": "zeros"}
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "none": ({"lora.enabled": False}, None),
    "remasked": ({**MASKED, **KD, "lora.method": "remasked"}, KD),
    "masked, causal LM": ({**MASKED, **CAUSAL}, CAUSAL),
    "masked, KD": ({**MASKED, **KD}, KD),
    "masked, KD weight 1": ({**MASKED, **KD_ONLY}, KD_ONLY),
    "masked, KD + hidden": ({**MASKED, **HIDDEN}, HIDDEN),
    "masked, KD, EoRA start": ({**MASKED, **KD, "lora.start": "eora"}, KD),
    "block reconstruction": ({**MASKED, **KD, "lora.method": "block_reconstruction"}, KD),
}
"""arm -> its parameters, and the losses of the dense model's recovery that it is compared with."""
DENSE = {
    "fetched": None,
    "fetched, causal LM": CAUSAL,
    "fetched, KD": KD,
    "fetched, KD weight 1": KD_ONLY,
    "fetched, KD + hidden": HIDDEN,
}
"""Dense models for the table's end."""
COLUMNS = [
    "arm",
    "ppl_test",
    "ppl_ood",
    "closed_to_fetched",
    "closed_to_recovered",
    "closed_to_fetched_nats",
    "closed_to_recovered_nats",
    "seconds",
]


def rows(base: Chain, subject: Subject) -> Iterator[Row]:
    """The arms, then the dense models."""
    pruned = base.variant(PRUNED)
    for arm, (params, losses) in ARMS.items():
        yield {"arm": arm}, partial(recovered, pruned, params, losses)
    for name, losses in DENSE.items():
        yield {"arm": name}, partial(dense, base, losses)


def recovered(pruned: Chain, params: Mapping[str, Any], losses: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """One arm's row."""
    arm = pruned.variant(params)
    reached, none = arm.perplexity("lora"), pruned.variant(ARMS["none"][0]).perplexity("lora")["test"]
    figures = {"ppl_test": reached["test"], "ppl_ood": reached["test_ood"]}
    if losses is None:
        return figures
    fetched, again = pruned.perplexity("fetch")["test"], reference(pruned, losses)["test"]
    return {
        **figures,
        "closed_to_fetched": closed(none, reached["test"], fetched),
        "closed_to_recovered": closed(none, reached["test"], again),
        "closed_to_fetched_nats": closed(*map(math.log, (none, reached["test"], fetched))),
        "closed_to_recovered_nats": closed(*map(math.log, (none, reached["test"], again))),
        "seconds": arm.seconds("lora"),
    }


def dense(base: Chain, losses: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The row of a dense model: as fetched, or recovered with these losses."""
    reached = base.perplexity("fetch") if losses is None else reference(base, losses)
    return {"ppl_test": reached["test"], "ppl_ood": reached["test_ood"]}


def reference(base: Chain, losses: Mapping[str, Any]) -> dict[str, float]:
    """Perplexities of the fetched model after the same recovery."""
    return base.variant({**MASKED, **losses}).perplexity("baseline_lora")


def closed(none: float, reached: float, dense: float) -> float:
    """Share of the distance from `none` to `dense` that lies behind `reached`; above 1 beyond the dense model."""
    return math.nan if none == dense else (none - reached) / (none - dense)


if __name__ == "__main__":
    main("recovery", COLUMNS, rows)
