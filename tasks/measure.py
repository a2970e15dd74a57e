"""Stage measure: speed, memory, size and energy of every evaluated model on this machine, in PyTorch at float32.

Each model gets processes of its own (`tasks.evaluation.measuring_process`), one after another, and so in every round:
what the machine does meanwhile falls on neighbours alike, which separate cached runs on other days would not give. So
it is one stage and not a matrix. A model whose files equal the one before (a stage that is off) is not measured again:
their difference is 0.

These figures are measurements, and no function of the inputs: the one stage whose outputs two runs don't share. DVC
measures again only when a model, the parameters or the code change, and only the report depends on it. PyTorch computes
in float32 whatever the file holds: a small file is read faster, but its multiplications are as many. What an engine
makes of it is `tests.benchmarks.engines`'.
"""

from __future__ import annotations

import filecmp
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.evaluation import measuring_process
from tasks.models import model_files
from tasks.runtime import files

if TYPE_CHECKING:
    from tasks.parameters.schema import Measure
    from tasks.runtime.stage import Stage

ENGINE = "PyTorch, float32"


def run(stage: Stage) -> None:
    """Write measure/MODEL/host.json for every model."""
    p = stage.params.measure
    folders = {folder.parent.name: folder for folder in stage.inputs_named("model")}
    of = _originals(folders)
    distinct = list(dict.fromkeys(of.values()))
    workload = measuring_process.Workload(p.threads, p.prompt_tokens, p.new_tokens, p.generations)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in distinct}
    with stage.progress("measure", p.rounds * len(distinct)) as progress:
        for step in range(p.rounds * len(distinct)):
            name = distinct[step % len(distinct)]
            rounds[name].append(measuring_process.measure(folders[name], workload))
            progress.update(step + 1)
    machine = measuring_process.machine()
    for name, folder in folders.items():
        found = {"model": name, "measured": True, "engine": ENGINE, "bytes": model_files.stored_bytes(folder)}
        found |= {"host": machine, "workload": p.model_dump(exclude={"enabled"})}
        _write(stage, name, found | summary(rounds[of[name]], p))
        print(_line(name, found | summary(rounds[of[name]], p)))


def skip(stage: Stage) -> None:
    """Say that nothing was measured."""
    for folder in stage.inputs_named("model"):
        _write(stage, folder.parent.name, {"model": folder.parent.name, "measured": False})


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


def _originals(folders: dict[str, Path]) -> dict[str, str]:
    """Of every model the first one with the same files."""
    found: dict[str, str] = {}
    for name, folder in folders.items():
        found[name] = next((other for other in found if _same(folders[other], folder)), name)
    return found


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    names, others = (
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in (one, other)
    )
    return names == others and all(
        os.path.samefile(one / name, other / name) or filecmp.cmp(one / name, other / name, shallow=False)
        for name in names
    )


def _line(name: str, found: dict[str, Any]) -> str:
    speeds = found["tokens_per_second"]
    energy, batch = found["joules_per_token"], measuring_process.TOGETHER
    return (
        f"{name}: {speeds['1']:.1f} tokens/s, {speeds[str(batch)]:.1f} at batch {batch}, loaded in"
        f" {found['load_seconds']:.2f} s, {found['above_libraries_bytes'] / 2**20:.0f} MiB above the libraries, energy"
        f" {'not available' if energy is None else f'{1e3 * energy:.1f} mJ per token'}"
    )


def _write(stage: Stage, name: str, found: dict[str, Any]) -> None:
    folder = stage.output("measure") / name
    folder.mkdir(parents=True)
    files.write_json(folder / "host.json", found)
