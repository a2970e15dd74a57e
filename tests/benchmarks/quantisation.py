"""What each choice in quantisation costs: bits, groups, scales, order, damping, embedding, joint masks.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.quantisation --threads 1 [--model stories260k] [--only joint]

From the recovered 2:4 model and from the fetched one (nothing pruned or trained): bits x group size; then one factor at
a time beside `BASE` at each width; then the embedding; then SparseGPT's masks chosen in the GPTQ sweep (joint) beside
wanda's masks and GPTQ, without recovery, in as many bytes. EoRA is off. `bytes` are those of the package's
model.safetensors and model.json. A group size that doesn't divide the model's matrices is a row with a note.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from tests.benchmarks.chain import Chain
from tests.benchmarks.table import Row, Subject, main

WIDTHS, GROUPS = (4, 3, 2), (32, 64, 128)
BASE: dict[str, Any] = {
    "gptq.bits": 4,
    "gptq.budget_bytes": None,
    "gptq.group_size": 32,
    "gptq.scale_steps": None,
    "gptq.symmetric": True,
    "gptq.damp": 0.05,
    "gptq.act_order": "none",
    "gptq.mse": 0.0,
    "gptq.descent_cycles": 0,
    "gptq.masked": True,
    "gptq.joint": None,
    "gptq.embedding.bits": 16,
    "gptq.embedding.group_size": 32,
    "gptq.embedding.method": "nearest",
    "eora.enabled": False,
}
FACTORS: dict[str, dict[str, Any]] = {
    "mse 2.4": {"gptq.mse": 2.4},
    "descent 4": {"gptq.descent_cycles": 4},
    "group_aware": {"gptq.act_order": "group_aware"},
    "descending": {"gptq.act_order": "descending"},
    "damp 0.01": {"gptq.damp": 0.01},
    "damp 0.1": {"gptq.damp": 0.1},
    "scale_steps 8": {"gptq.scale_steps": 8},
    "asymmetric": {"gptq.symmetric": False},
    "asymmetric, mse 2.4": {"gptq.symmetric": False, "gptq.mse": 2.4},
}
"""Each beside BASE at every width; "plain" is BASE itself."""
EMBEDDINGS: dict[str, dict[str, Any]] = {
    f"embedding {bits} {method}": {"gptq.embedding.bits": bits, "gptq.embedding.method": method}
    for bits in (8, 4)
    for method in ("nearest", "gptq")
}
PRUNED = {"wanda.enabled": True, "wanda.pattern": "n_m", "wanda.keep": 2, "wanda.of": 4}
UNPRUNED = {"wanda.enabled": False}
UNTRAINED = {"lora.enabled": False}
JOINT = {"gptq.joint": {"keep": 2, "of": 4}}
SOURCES: dict[str, dict[str, Any]] = {"2:4 recovered": PRUNED, "fetched": {**UNPRUNED, **UNTRAINED}}
AT_ONCE: dict[str, dict[str, Any]] = {
    "wanda, then gptq": {**PRUNED, **UNTRAINED},
    "joint": {**UNPRUNED, **UNTRAINED, **JOINT},
    "joint, after dense recovery": {**UNPRUNED, **JOINT},
}
"""Pruning and quantisation of a model that isn't trained in between."""
COLUMNS = ["source", "point", "bytes", "ppl_test", "ppl_ood", "seconds"]


def points() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(source, name, parameters) of every row."""
    for source, params in SOURCES.items():
        for bits in WIDTHS:
            for group in GROUPS:
                yield source, f"{bits} bit g{group}", {**params, "gptq.bits": bits, "gptq.group_size": group}
            for name, factor in FACTORS.items():
                yield source, f"{bits} bit g32, {name}", {**params, "gptq.bits": bits, **factor}
        for name, embedding in EMBEDDINGS.items():
            yield source, f"4 bit g32, {name}", {**params, **embedding}
    for bits in WIDTHS:
        for name, params in AT_ONCE.items():
            yield "2:4 at once", f"{bits} bit g32, {name}", {**params, "gptq.bits": bits}


def rows(base: Chain, subject: Subject) -> Iterator[Row]:
    """One row per point."""
    for source, name, params in points():
        yield {"source": source, "point": name}, partial(measured, base, params)


def measured(base: Chain, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Size and perplexities of a package; seconds of the gptq stage."""
    point = base.variant({**BASE, **params})
    reached = point.perplexity("package")
    return {
        "bytes": point.bytes("package"),
        "ppl_test": reached["test"],
        "ppl_ood": reached["test_ood"],
        "seconds": point.seconds("gptq"),
    }


if __name__ == "__main__":
    main("quantisation", COLUMNS, rows, identity=2)
