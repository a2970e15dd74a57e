"""How fast, how large and how hungry a model is in each engine, measured on this machine.

    python -m tests.benchmarks.engines                     data/fetch/model and data/package/model
    python -m tests.benchmarks.engines --only onnx         rows whose name it is found in

Every figure is of a process of its own (`tasks.evaluation.measuring_process`), so that none warms another; the engines
take turns, round by round. The prompt has 32 tokens, 128 follow, none of them sampled. Load is from the start of the
imports; of `first token` the first call counts. Tokens per second are those of a whole generation with its prompt,
after one that warmed up; CPU time is that of all threads. The peak of memory is the process's, at batch 1, and what it
is above the imports. Energy is RAPL's, of the whole processor, "not available" where the host shows none. Medians, and
the least and the largest of the speed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.evaluation import measuring_process
from tests.benchmarks.table import NOTE, RESULTS, Table
from tests.support.paths import ROOT

FETCHED, PACKAGE = ROOT / "data/fetch/model", ROOT / "data/package/model"
PROMPT, NEW, GENERATIONS, VOCABULARY = 32, 128, 5, 512
APART = ("generation_seconds", "joules_per_token")
"""Figures of a process that are no single number, or that not every host has."""
MIB = 2**20
COLUMNS = (
    "model",
    "bytes",
    "load, s",
    "first token, ms",
    "tokens/s",
    "least",
    "largest",
    "tokens/s at batch 4",
    "s per generation",
    "times the fp32 original",
    "CPU, ms per token",
    "peak, MiB",
    "above imports, MiB",
    "energy, mJ per token",
)
FIRST = "fetched, PyTorch float32"


def prepare(scratch: Path, only: str) -> dict[str, tuple[Path, dict[str, Any]] | str]:
    """Row -> (folder, settings of `engines.load`), or why there is none."""
    rows: dict[str, Any] = {
        FIRST: (FETCHED, {}),
        "fetched, PyTorch bfloat16": (_bfloat16(scratch / "bf16"), {"dtype": "bfloat16"}),
        "fetched, PyTorch int8 (dynamic)": (FETCHED, {"int8": True}),
    }
    for kind, name in (("onnx-int4", "onnx, float32"), ("gguf", "gguf, float32")):  # nothing of it is quantised
        rows[f"fetched, {name}"] = (FETCHED, kind)
    rows["package, PyTorch float32"] = (PACKAGE, {})
    for kind in ("onnx-int4", "onnx-int8", "gguf", "gguf-f32"):
        rows[f"package, {kind}"] = (PACKAGE, kind)
    rows = {name: row for name, row in rows.items() if name == FIRST or re.search(only, name)}
    return {name: _exported(scratch / str(i), *row) for i, (name, row) in enumerate(rows.items())}


def _exported(out: Path, folder: Path, settings: dict[str, Any] | str) -> tuple[Path, dict[str, Any]] | str:
    if not isinstance(settings, str):
        return folder, settings
    from tasks.algorithms.errors import InputError
    from tasks.export import export

    try:
        export.export(folder, settings, out)
    except InputError as error:
        return str(error)
    return out, {}


def _bfloat16(folder: Path) -> Path:
    import torch

    from tasks.models import dense_folder

    model = dense_folder.load_dense(FETCHED, torch.bfloat16)
    dense_folder.save_dense(model, dense_folder.load_tokenizer(FETCHED), folder)
    return folder


def rounds(rows: dict[str, Any], threads: int, repetitions: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(row, what its processes measured), after all rounds."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for _ in range(repetitions):
        for name, row in rows.items():
            if not isinstance(row, str):
                folder, settings = row
                workload = measuring_process.Workload(threads, PROMPT, NEW, GENERATIONS, VOCABULARY, settings)
                found[name].append(measuring_process.measure(folder, workload))
    yield from found.items()


def generation(found: dict[str, Any]) -> float:
    """Seconds of one generation, of what one process measured."""
    return statistics.median(found["generation_seconds"])


def show(table: Table, name: str, folder: Path, found: list[dict[str, Any]], first: float) -> None:
    """A row of medians."""
    middle = {key: statistics.median(one[key] for one in found) for key in found[0] if key not in APART}
    seconds = [generation(one) for one in found]
    speeds = [NEW / each for each in seconds]
    energies = [one["joules_per_token"] for one in found if one["joules_per_token"] is not None]
    figures = (
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "export.json"),
        middle["import_seconds"] + middle["load_seconds"],
        1e3 * middle["first_token_seconds"],
        statistics.median(speeds),
        min(speeds),
        max(speeds),
        measuring_process.TOGETHER * NEW / middle["together_seconds"],
        statistics.median(seconds),
        first / statistics.median(seconds),
        1e3 * middle["cpu_seconds_per_token"],
        middle["peak_bytes"] / MIB,
        middle["above_libraries_bytes"] / MIB,
        1e3 * statistics.median(energies) if energies else "not available",
    )
    table.add(**dict(zip(COLUMNS, (name, *figures), strict=True)))


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.engines")
    parser.add_argument("--only", default="", help="regular expression that a row's name has to contain")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--results", type=Path, help="folder of engines.csv")
    given = parser.parse_args(arguments)
    scratch = Path(tempfile.mkdtemp())
    try:
        rows = prepare(scratch, given.only)
        table = Table((given.results or RESULTS) / "engines.csv", COLUMNS, fresh=not given.only)
        first = None
        for name, found in rounds(rows, given.threads, given.repetitions):
            if isinstance(rows[name], str):
                table.add(**{COLUMNS[0]: name, NOTE: rows[name]})
                continue
            first = first or statistics.median(map(generation, found))
            show(table, name, rows[name][0], found, first)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
