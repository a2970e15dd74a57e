"""Who made an artifact, from what, with which code, when: one record per stage.

A record is no output: it holds times and machines, which repeat nowhere. git tracks it beside dvc.lock, and it stays
byte for byte where a run reproduces what it describes, so that such a run leaves git clean. What this machine's own run
was like always goes to `HERE`. Hashes are DVC's own (dvc.yaml, dvc.lock): this module computes none of another kind and
knows no path of a stage. The way back from an artifact along the records is `tasks.runtime.provenance`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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
    from dvc.repo import Repo
    from dvc.stage import Stage as DvcStage
    from dvc_data.hashfile.obj import HashFile

    from tasks.runtime.stage import Stage

RECORDS = Path("data/lineage")
"""Of every stage STAGE.json: who made the result that dvc.lock names."""
HERE = RECORDS / "here"
"""Of every stage a folder with a record of each result that was computed on this machine; git and DVC ignore it."""
RESULT = ("inputs", "outputs", "parameters")
"""What a record describes, in dvc.lock's hashes; the rest says who made that, when, how fast."""
KEY = 16
"""Hexadecimal digits of a file's name below `HERE`."""
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


def stage_of(repo: Repo, address: str) -> DvcStage:
    """The stage of this address, by DVC's index: `load_one` would read dvc.yaml and dvc.lock again (3.67.1).

    Raises:
        DvcException: no such stage, or dvc.yaml is broken.
    """
    found = next((stage for stage in repo.index.stages if stage.addressing == address), None)
    return found or repo.stage.load_one(name=address)  # which says what is wrong


def took(stage: DvcStage) -> dict[str, float]:
    """The known `FIGURES` of the run that made what dvc.lock names: of this machine's where it ran here, too."""
    found = local(stage) or find(stage) or {}
    return {name: found[name] for name in FIGURES if isinstance(found.get(name), int | float)}


def seconds(entry: Mapping[str, Any]) -> float | None:
    """What a run took, its process's start included; None where the record doesn't tell."""
    whole = entry.get("seconds")
    if not isinstance(whole, int | float):
        return None
    parts = [entry.get(name) for name in ("start_up_seconds", "computing_seconds")]
    return max(whole, sum(parts)) if all(isinstance(part, int | float) for part in parts) else whole


def link(stage: DvcStage) -> dict[str, str]:
    """A stage's record for a list of many: when and with which code it was made, and where all of it is."""
    path = record_path(stage)
    if not (found := read(path)):
        return {}
    return {"made": found.get("started") or "", "code": (found.get("code") or "")[:12], "record": path.as_uri()}


def record(stage: Stage, *, started: float, run_ids: dict[str, str], spent: dict[str, float] | None = None) -> None:
    """Write the record of a stage whose outputs are in place; the tracked one stays where it describes the same.

    Args:
        started: seconds since the epoch.
        run_ids: ids of the runs it belongs to, by kind.
        spent: more of `FIGURES`.
    """
    begun = stage.start.identity  # not what is there now: that may be an edit
    entry = stage.facts | {
        "stage": stage.address,
        "inputs": begun["inputs"],
        "outputs": {name(out): md5(out) for out in stage.dvc.outs},
        "parameters": begun["parameters"],
        "code": next((value for path, value in begun["inputs"].items() if is_code(path)), None),
        "git": _git_state(),
        "packages": begun["packages"],
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
    first = _first(_known(stage.dvc), lambda known: all(known.get(key) == entry[key] for key in RESULT))
    key = hashlib.sha256(files.json_text({key: entry[key] for key in RESULT}).encode()).hexdigest()[:KEY]
    _write(_here(stage.dvc) / f"{key}.json", entry)
    _put(stage.dvc, first or entry)


def keep(stage: DvcStage) -> dict[str, Any] | None:
    """Put the record of what dvc.lock names in its tracked place, where `find` knows it; returns it.

    DVC restores an older result without its record, as that is no output.
    """
    if found := find(stage):
        _put(stage, found)
    return found


def keep_inputs(stage: DvcStage) -> None:
    """`keep` for every record that the stage reads: plain `dvc repro` asks for none."""
    for dep in inputs(stage):
        path = Path(dep.fs_path)
        if path.parent == Path(stage.repo.root_dir) / RECORDS:
            keep(stage_of(stage.repo, path.stem))


def find(stage: DvcStage) -> dict[str, Any] | None:
    """The record that describes what dvc.lock names: the tracked one, HEAD's, or that of a run on this machine.

    None: it was made elsewhere, and DVC's cache brought it without its record.
    """
    return _first(_known(stage), lambda entry: describes(entry, stage))


def local(stage: DvcStage) -> dict[str, Any] | None:
    """The record of the run on this machine that computed what dvc.lock names; None where none did."""
    return _first(runs_here(stage), lambda entry: describes(entry, stage))


def adopt(stage: DvcStage) -> dict[str, Any]:
    """Make the record of this machine's run the tracked one; returns it.

    Raises:
        InputError: this machine has not computed what dvc.lock names.
    """
    if (found := local(stage)) is None:
        raise InputError(
            f"this machine has not computed the outputs of {stage.addressing} that dvc.lock names;"
            f" `dvc repro -s -f {stage.addressing}` does"
        )
    _put(stage, found)
    return found


def describes(entry: Mapping[str, Any], stage: DvcStage) -> bool:
    """Whether a record is of what dvc.lock names; a frozen stage's inputs may have gone on since."""
    now = locked(stage)
    return all(now["outputs"].values()) and all(
        entry.get(key) == now[key] for key in (("outputs",) if stage.frozen else RESULT)
    )


def locked(stage: DvcStage) -> dict[str, dict[str, Any]]:
    """`RESULT` as dvc.lock has it; hashes are None where it has no entry."""
    return {
        "inputs": {name(dep): dep.hash_info.value for dep in inputs(stage)},
        "outputs": {name(out): out.hash_info.value for out in stage.outs},
        "parameters": locked_parameters(stage),
    }


def tracked(root: Path) -> list[str]:
    """The records that belong beside dvc.lock in a commit, as paths below the root."""
    return [path.relative_to(root).as_posix() for path in sorted((root / RECORDS).glob("*.json"))]


def computed_here(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every record of a run on this machine, of whatever stage."""
    for path in sorted((root / HERE).glob("*/*.json")):
        if entry := read(path):
            yield path, entry


def read(path: Path) -> dict[str, Any] | None:
    """A record; None where there is none or it can't be read."""
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def machine(entry: Mapping[str, Any]) -> str:
    """In words: "Linux-6.1-x86_64, 2 cores"."""
    found = entry.get("machine") or {}
    return f"{found.get('platform', 'an unnamed machine')}, {found.get('cpus', '?')} cores"


def record_path(stage: DvcStage) -> Path:
    """Where a stage's tracked record is."""
    return Path(stage.repo.root_dir) / RECORDS / f"{stage.addressing}.json"


def _here(stage: DvcStage) -> Path:
    return Path(stage.repo.root_dir) / HERE / stage.addressing


def _known(stage: DvcStage) -> Iterator[dict[str, Any]]:
    """The records of a stage, of this or other results: who made it first before who made it again."""
    path = record_path(stage)
    if entry := read(path):
        yield entry
    committed = _git(Path(stage.repo.root_dir), "show", f"HEAD:./{RECORDS.as_posix()}/{path.name}")
    if committed and (entry := _parsed(committed)):
        yield entry
    yield from runs_here(stage)


def runs_here(stage: DvcStage) -> Iterator[dict[str, Any]]:
    """The records of a stage's runs on this machine, of whatever result."""
    yield from filter(None, map(read, sorted(_here(stage).glob("*.json"))))


def _first(entries: Iterator[dict[str, Any]], fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    return next(filter(fits, entries), None)


def _put(stage: DvcStage, entry: dict[str, Any]) -> None:
    if read(path := record_path(stage)) != entry:
        _write(path, entry)


def _write(path: Path, entry: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, entry)


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


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


def parameters(stage: DvcStage) -> dict[str, Any]:
    """The declared parameters and their values as they are in the parameter file."""
    values: dict[str, Any] = {}
    for dep in stage.deps:
        if getattr(dep, "params", ()):
            values |= dep.read_params()
    return json.loads(json.dumps(values))  # plain lists and numbers, as they come back from a record


def locked_parameters(stage: DvcStage) -> dict[str, Any]:
    """The declared parameters and their values in dvc.lock."""
    values: dict[str, Any] = {}
    for dep in stage.deps:
        if getattr(dep, "params", ()) and dep.hash_info:
            values |= dep.hash_info.value
    return json.loads(json.dumps(values))


def is_code(path: str) -> bool:
    """Whether a dependency is the list of a stage's code."""
    return Path(path).parent == code.FOLDER


def _git_state() -> dict[str, Any]:
    """HEAD, and whether a tracked file other than dvc.lock and records differs from it; nulls where there is no git."""
    revision = _git(Path(), "rev-parse", "HEAD")
    results = (":(exclude)dvc.lock", f":(exclude){RECORDS.as_posix()}")
    changes = _git(Path(), "status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        return git.run(folder, *arguments)
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
