"""How fast, how large and how hungry a model is in each engine, measured on this machine.

    .venv/bin/python -m tests.benchmarks.engines                     data/fetch/model and data/package/model
    .venv/bin/python -m tests.benchmarks.engines --only onnx         rows whose name it is found in

Every figure is of a process of its own, so that none warms another; the engines take turns, round by round. The prompt
has 32 tokens, 128 follow, none of them sampled. Load is from the start of the imports; of `first token` the first call
counts. Tokens per second are those of a whole generation with its prompt, after one that warmed up; CPU time is that of
all threads. The peak of memory is the process's, at batch 1, and what it is above the imports. Energy is RAPL's, of the
whole processor, "not available" where the host shows none. Medians, and the least and the largest of the speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.processes import peak
from tests.project import ROOT

if TYPE_CHECKING:  # the measuring processes import nothing that isn't their engine's
    from tests.benchmarks.table import Table

FETCHED, PACKAGE = ROOT / "data/fetch/model", ROOT / "data/package/model"
POWER = Path("/sys/class/powercap")
PROMPT, NEW, GENERATIONS = 32, 128, 5
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
    from tasks import export
    from tasks.algorithms.errors import InputError

    try:
        export.export(folder, settings, out)
    except InputError as error:
        return str(error)
    return out, {}


def _bfloat16(folder: Path) -> Path:
    import torch

    from tasks import checkpoint

    model = checkpoint.load_dense(FETCHED, torch.bfloat16)
    checkpoint.save_dense(model, checkpoint.load_tokenizer(FETCHED), folder)
    return folder


def measure(folder: Path, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """What one process measures, in this one; `energy` in joules, or None."""
    for path in folder.iterdir():
        path.read_bytes()  # into the page cache, for all alike
    started = time.perf_counter()
    engine_modules(folder)
    before = peak()
    from tasks import engines

    engine = engines.load(folder, threads, **settings)
    found: dict[str, Any] = {"load": time.perf_counter() - started}
    ids = _prompt()
    found["first"] = _time_to_first(engine, ids)
    engine.generate(ids, NEW)
    times, cpu, energy = [], time.process_time(), _energy()
    for _ in range(GENERATIONS):
        started = time.perf_counter()
        engine.generate(ids, NEW)
        times.append(time.perf_counter() - started)
    found["cpu"] = (time.process_time() - cpu) / GENERATIONS / NEW
    after = _energy()
    found["energy"] = None if energy is None else (after - energy) / GENERATIONS / NEW
    found["seconds"] = statistics.median(times)
    found["peak"], found["above"] = peak(), peak() - before
    together = ids.repeat(4, axis=0)
    engine.generate(together, NEW)
    started = time.perf_counter()
    engine.generate(together, NEW)
    found["together"] = 4 * NEW / (time.perf_counter() - started)
    return found


def engine_modules(folder: Path) -> None:
    """Import what the engine of a folder needs, so that the memory of its code can be told from that of the model."""
    from tasks import engines

    if (folder / engines.GENAI).exists():
        import onnxruntime_genai  # noqa: F401
    elif (folder / engines.GGUF).exists():
        import llama_cpp  # noqa: F401
    else:
        from tasks import models  # noqa: F401


def _prompt() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(1, 512, (1, PROMPT))


def _time_to_first(engine: Any, ids: Any) -> float:
    class Enough(Exception):
        pass

    def stop() -> None:
        raise Enough

    started = time.perf_counter()
    with contextlib.suppress(Enough):
        engine.generate(ids, NEW, stop)
    return time.perf_counter() - started


def _energy() -> float | None:
    """Joules that the processor has taken so far; None where the host doesn't tell."""
    meters = [
        path for path in POWER.glob("intel-rapl:*/energy_uj") if re.fullmatch(r"intel-rapl:\d+", path.parent.name)
    ]
    try:
        return sum(int(path.read_text(encoding="utf-8")) for path in meters) / 1e6 if meters else None
    except OSError:
        return None


def rounds(rows: dict[str, Any], threads: int, repetitions: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(row, what its processes measured), after all rounds."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    for _ in range(repetitions):
        for name, row in rows.items():
            if isinstance(row, str):
                continue
            call = [sys.executable, "-m", "tests.benchmarks.engines", "--measure", str(row[0]), json.dumps(row[1])]
            call += ["--threads", str(threads)]
            output = subprocess.run(
                call,
                check=True,
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            ).stdout
            found[name].append(json.loads(output.splitlines()[-1]))
    yield from found.items()


def show(table: Table, name: str, folder: Path, found: list[dict[str, Any]], first: float) -> None:
    """A row of medians."""
    middle = {key: statistics.median(one[key] for one in found) for key in found[0] if key != "energy"}
    speeds = [NEW / one["seconds"] for one in found]
    energies = [one["energy"] for one in found if one["energy"] is not None]
    figures = (
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "export.json"),
        middle["load"],
        1e3 * middle["first"],
        statistics.median(speeds),
        min(speeds),
        max(speeds),
        middle["together"],
        middle["seconds"],
        first / middle["seconds"],
        1e3 * middle["cpu"],
        middle["peak"],
        middle["above"],
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
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "SETTINGS"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure:
        folder, settings = given.measure
        print(json.dumps(measure(Path(folder), json.loads(settings), given.threads)))
        return
    from tests.benchmarks.table import NOTE, RESULTS, Table

    scratch = Path(tempfile.mkdtemp())
    try:
        rows = prepare(scratch, given.only)
        table = Table((given.results or RESULTS) / "engines.csv", COLUMNS, fresh=not given.only)
        first = None
        for name, found in rounds(rows, given.threads, given.repetitions):
            if isinstance(rows[name], str):
                table.add(**{COLUMNS[0]: name, NOTE: rows[name]})
                continue
            first = first or statistics.median(one["seconds"] for one in found)
            show(table, name, rows[name][0], found, first)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
