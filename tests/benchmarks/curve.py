"""Perplexity against size, from the fp32 model to a twentieth of it, beside plain quantisation in as many bytes.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.curve --threads 1 [--model built-in] [--only '2:4']

`POINTS` is the whole list. `bytes` are those of the package's model.safetensors and model.json, of the first point
those of the fetched weights; factor_fp32 and factor_bf16 are 4 and 2 bytes per fetched parameter over them. The
baseline is stage baseline: nothing pruned, the same recovery, mixed-bit GPTQ in at most the same bytes; where even 2
bits per weight take more, it is that model, and its bytes say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from tests.benchmarks.chain import Chain
from tests.benchmarks.table import Row, Subject, main


class Point(NamedTuple):
    """One setting. `shallow`: about a sixth of the blocks is removed (`table.Subject.removed`)."""

    name: str
    params: dict[str, Any]
    shallow: bool = False


def _pattern(keep: int, of: int) -> dict[str, Any]:
    return {"wanda.enabled": True, "wanda.pattern": "n_m", "wanda.keep": keep, "wanda.of": of}


def _gptq(bits: int, group: int, embedding: int, **more: Any) -> dict[str, Any]:
    """Bits per weight, inputs per scale, bits per value of the embedding."""
    return {
        "gptq.bits": bits,
        "gptq.group_size": group,
        "gptq.embedding.bits": embedding,
        **{f"gptq.{name}": value for name, value in more.items()},
    }


DENSE = {"wanda.enabled": False}
EORA = {"eora.enabled": True, "eora.rank": None, "eora.budget_bytes": 20_000, "eora.bits": 8}
COMMON = {
    "eora.enabled": False,
    "gptq.scale_steps": 8,
    "gptq.embedding.method": "gptq",
    "gptq.embedding.group_size": 32,
}
"""Of every point that doesn't say otherwise."""
FETCHED = "dense fp32"
POINTS = [
    Point(FETCHED, {}),
    Point("8 bit g128, embedding 16", {**DENSE, **_gptq(8, 128, 16)}),
    Point("8 bit g64, embedding 8", {**DENSE, **_gptq(8, 64, 8)}),
    Point("4 bit g32, embedding 8", {**DENSE, **_gptq(4, 32, 8)}),
    Point("4 bit g64, embedding 4", {**DENSE, **_gptq(4, 64, 4)}),
    Point("7:8 + 4 bit g64, embedding 4", {**_pattern(7, 8), **_gptq(4, 64, 4)}),
    Point("4 bit g64, embedding 4, shallow", {**DENSE, **_gptq(4, 64, 4)}, shallow=True),
    Point("3:4 + 4 bit g64, embedding 4", {**_pattern(3, 4), **_gptq(4, 64, 4)}),
    Point("4:8 + 4 bit g64, embedding 4", {**_pattern(4, 8), **_gptq(4, 64, 4)}),
    Point("3 bit g64, embedding 4", {**DENSE, **_gptq(3, 64, 4)}),
    Point("2:4 + 4 bit g64, embedding 4", {**_pattern(2, 4), **_gptq(4, 64, 4)}),
    Point("2:4 + 4 bit g64, embedding 4, shallow, EoRA", {**_pattern(2, 4), **_gptq(4, 64, 4), **EORA}, shallow=True),
    Point("2:4 + 4 bit g64, embedding 4, shallow", {**_pattern(2, 4), **_gptq(4, 64, 4)}, shallow=True),
    Point("2:4 + 3 bit g64, embedding 4, shallow", {**_pattern(2, 4), **_gptq(3, 64, 4)}, shallow=True),
    Point("1:4 + 4 bit g64, embedding 4, shallow", {**_pattern(1, 4), **_gptq(4, 64, 4)}, shallow=True),
    Point("2:4 + 2 bit g64, embedding 4, shallow", {**_pattern(2, 4), **_gptq(2, 64, 4)}, shallow=True),
    Point("1:4 + 3 bit g64, embedding 4, shallow", {**_pattern(1, 4), **_gptq(3, 64, 4)}, shallow=True),
]
COLUMNS = [
    "point",
    "parameters",
    "bytes",
    "factor_fp32",
    "factor_bf16",
    "ppl_test",
    "ppl_ood",
    "bits_per_byte_test",
    "baseline_bytes",
    "baseline_ppl_test",
    "baseline_ppl_ood",
    "baseline_bits_per_byte_test",
]


def rows(base: Chain, subject: Subject) -> Iterator[Row]:
    """One row per point that the model has blocks enough for."""
    for point in POINTS:
        if not point.shallow or subject.removed is not None:
            removed = subject.removed if point.shallow else {}
            yield {"point": point.name}, partial(measured, base.variant({**COMMON, **removed, **point.params}), point)


def measured(chain: Chain, point: Point) -> Mapping[str, Any]:
    """Size and perplexities of the package, and of the plain model in as many bytes."""
    stage = "fetch" if point.name == FETCHED else "package"
    metrics, size = chain.metrics(stage), chain.bytes(stage)
    parameters = chain.metrics("fetch")["parameters"]
    figures = {
        "parameters": metrics["parameters"],
        "bytes": size,
        "factor_fp32": 4 * parameters / size,
        "factor_bf16": 2 * parameters / size,
        "ppl_test": metrics["perplexity"]["test"],
        "ppl_ood": metrics["perplexity"]["test_ood"],
        "bits_per_byte_test": metrics["bits_per_byte"]["test"],
    }
    return figures if stage == "fetch" else {**figures, **_baseline(chain)}


def _baseline(chain: Chain) -> dict[str, Any]:
    reached = chain.metrics("baseline")
    return {
        "baseline_bytes": chain.bytes("baseline"),
        "baseline_ppl_test": reached["perplexity"]["test"],
        "baseline_ppl_ood": reached["perplexity"]["test_ood"],
        "baseline_bits_per_byte_test": reached["bits_per_byte"]["test"],
    }


if __name__ == "__main__":
    main("curve", COLUMNS, rows)
