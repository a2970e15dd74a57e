"""Who made an artifact, from what, with which code, when: one record per stage.

A record is an output of its stage that no stage depends on, so that times and machines never change what is downstream.
Hashes are DVC's own (dvc.yaml, dvc.lock): this module computes none of another kind and knows no path of a stage. The
way back from an artifact along the records is `tasks.runtime.provenance`'s.
"""

from __future__ import annotations

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
from tasks.runtime import code, files, git

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.stage import Stage as DvcStage
    from dvc_data.hashfile.obj import HashFile

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


def record(stage: Stage, *, started: float, run_ids: dict[str, str]) -> None:
    """Write the record of a stage whose outputs are in place. A stage that declares no record gets none.

    Args:
        started: seconds since the epoch.
        run_ids: ids of the runs it belongs to, by kind.
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
        "code": next((value for path, value in hashes.items() if is_code(path)), None),
        "git": _git_state(),
        "packages": _versions(),
        "seed": getattr(getattr(stage.params, stage.name, None), "seed", None),
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 3),
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
    found = on_disk(item, trust_state=trust_state)
    return found.hash_info.value if found else None


def on_disk(item: Output, *, trust_state: bool = True) -> HashFile | None:
    """A dependency or output as it is on disk, a folder as the list of its files (a Tree); None if it is missing."""
    if not item.exists:
        return None
    own = item.cache if item.use_cache else item.local_cache
    store = own if trust_state else HashFileDB(own.fs, own.path)  # one without a state database
    _, _, found = build(store, item.fs_path, item.fs, item.hash_name, ignore=item.dvcignore, dry_run=True)
    return found


def made(out: Output, part: Output) -> str | None:
    """The hash that dvc.lock has of an output, or of a file or folder in it; None where DVC knows none of that part."""
    if part.fs_path == out.fs_path:
        return out.hash_info.value
    found = out.get_obj(filter_info=part.fs_path)  # from the list of its files, which DVC's cache holds
    return found.hash_info.value if found else None


def overlap(one: Output, other: Output) -> bool:
    """Whether they are the same, or one lies in the other."""
    first, second = Path(one.fs_path), Path(other.fs_path)
    return first == second or first in second.parents or second in first.parents


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


def is_code(path: str) -> bool:
    """Whether a dependency is the list of a stage's code."""
    return Path(path).parent == code.FOLDER


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
