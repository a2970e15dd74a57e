"""Who made an artifact, from what, with which code, when: one record per stage.

A record is an output of its stage that no stage depends on, so that times and machines never change what is downstream.
Hashes are DVC's own (dvc.yaml, dvc.lock): this module computes none of another kind and knows no path of a stage. The
way back from an artifact along the records is `tasks.runtime.provenance`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvc_data.hashfile.build import build
from dvc_data.hashfile.db import HashFileDB

from tasks.algorithms.errors import InputError
from tasks.runtime import files, git

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.stage import Stage as DvcStage

    from tasks.runtime.stage import Stage

RECORDS = Path("data/lineage")
"""An output below it is its stage's record."""
PACKAGES = (
    "datasets",
    "dvc",
    "gptqmodel",
    "lm_eval",
    "numpy",
    "pandas",
    "peft",
    "prefect",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)


FIGURES = ("seconds", "start_up_seconds", "computing_seconds", "cpu_seconds")
"""Of a record: from the stage's first line to its record; from the process's start to `run`; of `run`; of all cores."""


def took(stage: DvcStage) -> dict[str, float]:
    """The `FIGURES` of a stage's last run; those that its record lacks, or all without a record, are left out."""
    found = _read(stage)
    return {name: found[name] for name in FIGURES if isinstance(found.get(name), int | float)}


def _read(stage: DvcStage) -> dict[str, Any]:
    """A stage's record; empty where there is none, or it can't be read."""
    path = record_path(stage)
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}


def link(stage: DvcStage) -> dict[str, str]:
    """A stage's record for a list of many: when and with which code it was made, and where all of it is."""
    found, path = _read(stage), record_path(stage)
    return (
        {}
        if not path
        else {"made": found.get("started") or "", "code": (found.get("code") or "")[:12], "record": path.as_uri()}
    )


def record(stage: Stage, *, started: float, run_ids: dict[str, str], spent: dict[str, float] | None = None) -> None:
    """Write the record of a stage whose outputs are in place. A stage that declares no record gets none.

    Args:
        started: seconds since the epoch.
        run_ids: ids of the runs it belongs to, by kind.
        spent: more of `FIGURES`.
    """
    path = record_path(stage.dvc)
    if path is None:
        return
    hashes = {name(dep): md5(dep) for dep in inputs(stage.dvc)}
    entry = {
        "stage": stage.address,
        "inputs": hashes,
        "outputs": {name(out): md5(out) for out in results(stage.dvc)},
        "parameters": parameters(stage.dvc),
        "code": code_hash(hashes),
        "git": _git_state(),
        "packages": _versions(),
        "seed": getattr(getattr(stage.params, stage.name, None), "seed", None),
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 3),
        **{name: round(value, 3) for name, value in (spent or {}).items()},
        "peak_memory_bytes": _peak_memory(),
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
            "python": platform.python_version(),
        },
        "run_ids": dict(run_ids),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, entry)


def identity(stage: DvcStage) -> dict[str, Any]:
    """What a stage's result depends on, as it is now: hashes of its inputs (code included), parameters, libraries."""
    hashes = {name(dep): md5(dep) for dep in inputs(stage)}
    return {"inputs": hashes, "parameters": parameters(stage), "packages": _versions()}


def md5(item: Output, *, trust_state: bool = True) -> str | None:
    """The hash that DVC gives a dependency or output as it is on disk ("….dir" for a folder); None if it is missing.

    Args:
        trust_state: believe DVC's note of an unchanged file (same inode, size and time); False reads every byte.
    """
    if not item.exists:
        return None
    own = item.cache if item.use_cache else item.local_cache
    store = own if trust_state else HashFileDB(own.fs, own.path)  # one without a state database
    _, _, found = build(store, item.fs_path, item.fs, item.hash_name, ignore=item.dvcignore, dry_run=True)
    return found.hash_info.value


def inputs(stage: DvcStage) -> list[Output]:
    """The dependencies that are files or folders, code included."""
    return [dep for dep in stage.deps if not getattr(dep, "params", ())]


def results(stage: DvcStage) -> list[Output]:
    """The outputs without the record."""
    return [out for out in stage.outs if not _is_record(out)]


def _is_record(out: Output) -> bool:
    return (Path(out.repo.root_dir) / RECORDS) in Path(out.fs_path).parents


def record_path(stage: DvcStage) -> Path | None:
    """Where a stage's record is; None where it declares none."""
    return next((Path(out.fs_path) for out in stage.outs if _is_record(out)), None)


def parameters(stage: DvcStage) -> dict[str, Any]:
    """The declared parameters and their values as they are in the parameter file."""
    values: dict[str, Any] = {}
    for dep in stage.deps:
        if getattr(dep, "params", ()):
            values |= dep.read_params()
    return json.loads(json.dumps(values))  # plain lists and numbers, as they come back from a record


def code_hash(hashes: dict[str, str | None]) -> str | None:
    """SHA-256 over names and hashes of the declared Python files; None where a stage declares none."""
    lines = [f"{value}  {path}\n" for path, value in sorted(hashes.items()) if is_code(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def is_code(path: str) -> bool:
    """Whether a dependency is Python code."""
    return path.endswith(".py")


def _git_state() -> dict[str, Any]:
    """HEAD, and whether a tracked file other than dvc.lock differs from it; nulls where there is no git."""
    revision = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock")
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        return git.run(Path(), *arguments)
    except (OSError, InputError):
        return None


def _versions() -> dict[str, str | None]:
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def name(item: Output) -> str:
    """The path as seen from the repository's root, with forward slashes."""
    return Path(os.path.relpath(item.fs_path, item.repo.root_dir)).as_posix()
