"""Stage measure: speed, memory, size and energy of every evaluated model on this machine, in PyTorch.

Each model gets processes of its own (`tasks.evaluation.measuring_process`), one after another, and so in every round:
what the machine does meanwhile falls on neighbours alike, which separate cached runs on other days would not give. So
it is one stage and not a matrix. A model whose files equal the one before (a stage that is off) is not measured again:
their difference is 0.

These figures are measurements, and no function of the inputs: they go to the stage's lineage record, and its output
says which models were measured, and how (`tasks.evaluation.measurements` reads both). DVC measures again only when a
model, the parameters or the code change. PyTorch computes in float32 whatever the file holds: a small file is read
faster, but its multiplications are as many. Where one of the models has more than `streaming.WHOLE` bytes of weights in
float32, all compute in bfloat16, half of that, so that they stay comparable; the output says which. What an engine
makes of a model is `tests.benchmarks.engines`'.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.algorithms.model import streaming
from tasks.algorithms.model.shape import shape_of_config
from tasks.evaluation import measurements, measuring_process
from tasks.models import model_files
from tasks.runtime import files

if TYPE_CHECKING:
    from tasks.parameters.schema import Measure
    from tasks.runtime.stage import Stage


def run(stage: Stage) -> None:
    """Write which models there are and what is asked of them, and note how fast each did it."""
    p = stage.params.measure
    folders = {folder.parent.name: folder for folder in stage.inputs_named("model")}
    digests = {name: _digest(folder) for name, folder in folders.items()}
    of = {name: next(other for other in digests if digests[other] == own) for name, own in digests.items()}
    distinct = list(dict.fromkeys(of.values()))
    dtype = precision([folders[name] for name in distinct])
    settings = {} if dtype == "float32" else {"dtype": dtype}
    workload = measuring_process.Workload(p.threads, p.prompt_tokens, p.new_tokens, p.generations, settings=settings)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in distinct}
    with stage.progress("measure", p.rounds * len(distinct)) as progress:
        turns = distinct * p.rounds
        measured = measuring_process.measure_each([folders[name] for name in turns], workload)
        for step, (name, found) in enumerate(zip(turns, measured, strict=True), 1):
            rounds[name].append(found)
            progress.update(step)
    asked = p.model_dump(exclude={"enabled"})
    figures = {name: summary(rounds[of[name]], p) | {"files": digests[name]} for name in folders}
    stage.note(measured=figures, workload=asked, host=measuring_process.machine())
    models = {
        name: {
            "bytes": model_files.stored_bytes(folder),
            "files": digests[name],
            "same_as": None if of[name] == name else of[name],
        }
        for name, folder in folders.items()
    }
    _write(stage, {"measured": True, "engine": f"PyTorch, {dtype}", "workload": asked, "models": models})
    for name, found in figures.items():
        print(_line(name, found))


def skip(stage: Stage) -> None:
    """Say that nothing was measured."""
    models = {folder.parent.name: {} for folder in stage.inputs_named("model")}
    _write(stage, {"measured": False, "models": models})


def summary(rounds: Sequence[dict[str, Any]], p: Measure) -> dict[str, Any]:
    """Medians over the rounds of what each process measured; of the time per token the least and the largest, too.

    `seconds_per_token` is of whole generations at batch 1, prompt included; `tokens_per_second` by batch size, as text.
    """
    alike = ("import_seconds", "load_seconds", "first_token_seconds", "cpu_seconds_per_token")
    found: dict[str, Any] = {key: statistics.median(one[key] for one in rounds) for key in alike}
    for key in ("peak_bytes", "above_libraries_bytes"):
        found[key] = round(statistics.median(one[key] for one in rounds))
    times = [seconds / p.new_tokens for one in rounds for seconds in one["generation_seconds"]]
    found["seconds_per_token"] = {"median": statistics.median(times), "least": min(times), "largest": max(times)}
    together = statistics.median(one["together_seconds"] for one in rounds)
    speeds = {
        1: 1 / statistics.median(times),
        measuring_process.TOGETHER: measuring_process.TOGETHER * p.new_tokens / together,
    }
    found["tokens_per_second"] = {str(batch): speed for batch, speed in speeds.items()}
    energies = [one["joules_per_token"] for one in rounds if one["joules_per_token"] is not None]
    found["joules_per_token"] = statistics.median(energies) if energies else None
    return found


def precision(folders: Sequence[Path]) -> str:
    """The type that all models compute in: "float32", or "bfloat16" where one of them is too large for it.

    Raises:
        InputError: a folder's config is larger than any model's, or lacks a size.
    """
    largest = 0
    for folder in folders:
        model_files.check_sizes(folder)
        path = next(path for path in (folder / model_files.CONFIG, folder / model_files.PACKED[1]) if path.exists())
        described = json.loads(path.read_text(encoding="utf-8"))
        shape = shape_of_config(described.get("config", described))
        largest = max(largest, 4 * (shape.in_blocks + shape.outside))
    return "float32" if largest <= streaming.WHOLE else "bfloat16"


def _digest(folder: Path) -> str:
    """SHA-256 over names and bytes of a folder's files: equal where two folders hold the same."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{files.sha256(folder / name)}  {name}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _line(name: str, found: dict[str, Any]) -> str:
    speeds = found["tokens_per_second"]
    energy, batch = found["joules_per_token"], measuring_process.TOGETHER
    return (
        f"{name}: {speeds['1']:.1f} tokens/s, {speeds[str(batch)]:.1f} at batch {batch}, loaded in"
        f" {found['load_seconds']:.2f} s, {found['above_libraries_bytes'] / 2**20:.0f} MiB above the libraries, energy"
        f" {'not available' if energy is None else f'{1e3 * energy:.1f} mJ per token'}"
    )


def _write(stage: Stage, found: dict[str, Any]) -> None:
    folder = stage.output("measure")
    folder.mkdir(parents=True)
    files.write_json(folder / measurements.MODELS, found)
