"""Who made an artifact, from what, with which code, when: one record per stage, and the way back to the first inputs.

    edgepress lineage show PATH      the tree from an artifact to the base weights and the corpus
    edgepress lineage verify PATH    hash everything on that way again; name what was altered or is missing

A record is an output of its stage that no stage depends on, so that times and machines never change what is downstream.
Edges and hashes are DVC's own (dvc.yaml, dvc.lock): this module computes no hash of another kind and knows no path of a
stage. It restores nothing: `dvc checkout` or `dvc repro` do that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dvc.exceptions import DvcException, OutputNotFoundError
from dvc.repo import Repo
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
SHORT = 10
"""Characters of a hash that `show` prints."""


def record(stage: Stage, *, started: float, run_ids: dict[str, str]) -> None:
    """Write the record of a stage whose outputs are in place. A stage that declares no record gets none.

    Args:
        started: seconds since the epoch.
        run_ids: ids of the runs it belongs to, by kind.
    """
    path = _record_path(stage.dvc)
    if path is None:
        return
    inputs = {_name(dep): md5(dep) for dep in _files(stage.dvc)}
    entry = {
        "stage": stage.address,
        "inputs": inputs,
        "outputs": {_name(out): md5(out) for out in _results(stage.dvc)},
        "parameters": _parameters(stage.dvc),
        "code": _code_hash(inputs),
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
    inputs = {_name(dep): md5(dep) for dep in _files(stage)}
    return {"inputs": inputs, "parameters": _parameters(stage), "packages": _versions()}


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


class Node(NamedTuple):
    """A stage on the way back from an artifact, and the stages whose outputs it read."""

    stage: DvcStage
    parents: list[Node]


def trace(repo: Repo, path: str) -> list[Node]:
    """The stages that made the file or folder, as trees towards the first inputs.

    Raises:
        InputError: no stage makes it.
    """
    try:
        outs = repo.find_outs_by_path(os.path.abspath(path), recursive=True, strict=False)
    except OutputNotFoundError as error:
        raise InputError(f"no stage of dvc.yaml makes {path}; name a file or folder of data/ that one does") from error
    graph, known = repo.index.graph, {}

    def node(stage: DvcStage) -> Node:
        if stage.addressing not in known:
            parents = sorted(graph.successors(stage), key=lambda parent: parent.addressing)
            known[stage.addressing] = Node(stage, [node(parent) for parent in parents])
        return known[stage.addressing]

    stages = {out.stage.addressing: out.stage for out in outs}
    return [node(stages[name]) for name in sorted(stages)]


def show(repo: Repo, path: str) -> list[str]:
    """The lines of `show`; a stage that was printed before is only named.

    Raises:
        InputError: no stage makes it.
    """
    lines, seen = [path], set()

    def add(node: Node, first: str, rest: str) -> None:
        name = node.stage.addressing
        if name in seen:
            lines.append(f"{first}{name} (above)")
            return
        seen.add(name)
        lines.append(f"{first}{name}{_headline(node.stage)}")
        below = rest + ("│    " if node.parents else "     ")
        lines.extend(below + detail for detail in _details(node.stage))
        for index, parent in enumerate(node.parents):
            last = index == len(node.parents) - 1
            add(parent, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))

    roots = trace(repo, path)
    for index, node in enumerate(roots):
        last = index == len(roots) - 1
        add(node, "└─ " if last else "├─ ", "   " if last else "│  ")
    return lines


class Finding(NamedTuple):
    """One thing that `verify` says; a note is no fault."""

    stage: str
    sentence: str
    fault: bool = True


def verify(repo: Repo, path: str) -> tuple[list[Finding], int]:
    """Hash everything on the way back from an artifact, and compare with dvc.lock and the records.

    Returns:
        What was found, and how many files and folders were hashed.

    Raises:
        InputError: no stage makes it.
    """
    findings: dict[Finding, None] = {}
    hashes: dict[str, str | None] = {}

    def actual(item: Output) -> str | None:
        if item.fs_path not in hashes:
            hashes[item.fs_path] = md5(item, trust_state=False)
        return hashes[item.fs_path]

    for stage in _stages(trace(repo, path)):
        for finding in (*_against_lock(stage, actual), *_against_record(stage)):
            findings[finding] = None
    return list(findings), len(hashes)


def _against_lock(stage: DvcStage, actual: Any) -> Iterator[Finding]:
    name = stage.addressing
    if not all(out.hash_info for out in stage.outs):
        yield Finding(name, "never run here: dvc.lock has no entry for it (`dvc repro` makes it)")
        return
    for out in stage.outs:
        yield from _compare(name, f"output {_name(out)}", out.hash_info.value, actual(out))
    for dep in _files(stage):
        for finding in _compare(name, f"input {_name(dep)}", dep.hash_info.value, actual(dep)):
            # a frozen stage's result is kept on purpose when its inputs go on
            yield finding._replace(fault=False) if stage.frozen else finding
    for key, now in _parameters(stage).items():
        then = _locked_parameters(stage).get(key)
        if then != now:
            yield Finding(name, f"parameter {key} is {now!r} now, it was made with {then!r}", not stage.frozen)


def _against_record(stage: DvcStage) -> Iterator[Finding]:
    name, path = stage.addressing, _record_path(stage)
    entry = _read_record(stage)
    if path is None or not all(out.hash_info for out in stage.outs):
        return
    if entry is None:
        yield Finding(name, f"lineage record {_relative(path)} is missing or unreadable")
        return
    sides = (("outputs", "output", _results(stage)), ("inputs", "input", _files(stage)))
    for side, word, items in sides:
        written = entry.get(side) if isinstance(entry.get(side), dict) else {}
        for item in items:
            then, locked = written.get(_name(item)), item.hash_info.value
            if then != locked:
                sentence = f"{word} {_name(item)} is {_short(then)} in the lineage record, {_short(locked)} in dvc.lock"
                yield Finding(name, sentence)
    if entry.get("parameters") != _locked_parameters(stage):
        yield Finding(name, "the lineage record has other parameters than dvc.lock")
    if entry.get("code") != _code_hash({_name(dep): dep.hash_info.value for dep in _files(stage)}):
        yield Finding(name, "the lineage record has another code hash than dvc.lock gives")


def _compare(stage: str, what: str, locked: str | None, found: str | None) -> Iterator[Finding]:
    if found is None:
        yield Finding(stage, f"{what} is missing")
    elif found != locked:
        yield Finding(stage, f"{what} was altered: {_short(found)} on disk, {_short(locked)} in dvc.lock")


def _headline(stage: DvcStage) -> str:
    entry = _read_record(stage)
    if entry is None:
        return "  (no lineage record)"
    git = entry["git"] if isinstance(entry.get("git"), dict) else {}
    revision = f"git {_short(git.get('revision'))}{' + changes' if git.get('dirty') else ''}"
    when = f"{entry.get('started')}  {entry.get('seconds')} s"
    return f"  {when}  code {_short(entry.get('code'))}  {revision}{'  frozen' if stage.frozen else ''}"


def _details(stage: DvcStage) -> Iterator[str]:
    """Parameters that are set, outputs, and the inputs that no stage makes."""
    flat = _flat(_locked_parameters(stage))
    own = f"{stage.addressing.partition('@')[0]}."
    parameters = [f"{key.removeprefix(own)}={json.dumps(value)}" for key, value in flat if value is not None]
    if parameters:
        yield f"parameters {' '.join(parameters)}"
    for out in _results(stage):
        yield f"output {_name(out)} {_short(out.hash_info.value)}"
    made = [out for made_by in stage.repo.index.stages for out in made_by.outs]
    for dep in _files(stage):
        if not _is_code(_name(dep)) and not any(_overlap(dep.fs_path, out.fs_path) for out in made):
            yield f"source {_name(dep)} {_short(dep.hash_info.value)}"


def _stages(nodes: list[Node]) -> Iterator[DvcStage]:
    """Every stage of the trees once, first inputs first."""
    seen: set[str] = set()

    def visit(node: Node) -> Iterator[DvcStage]:
        if node.stage.addressing not in seen:
            seen.add(node.stage.addressing)
            for parent in node.parents:
                yield from visit(parent)
            yield node.stage

    for node in nodes:
        yield from visit(node)


def _files(stage: DvcStage) -> list[Output]:
    """The dependencies that are files or folders, code included."""
    return [dep for dep in stage.deps if not getattr(dep, "params", ())]


def _results(stage: DvcStage) -> list[Output]:
    """The outputs without the record."""
    return [out for out in stage.outs if not _is_record(out)]


def _is_record(out: Output) -> bool:
    return (Path(out.repo.root_dir) / RECORDS) in Path(out.fs_path).parents


def _record_path(stage: DvcStage) -> Path | None:
    return next((Path(out.fs_path) for out in stage.outs if _is_record(out)), None)


def _read_record(stage: DvcStage) -> dict[str, Any] | None:
    path = _record_path(stage)
    try:
        entry = json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) else None


def _parameters(stage: DvcStage) -> dict[str, Any]:
    """The declared parameters and their values as they are in the parameter file."""
    values: dict[str, Any] = {}
    for dep in stage.deps:
        if getattr(dep, "params", ()):
            values |= dep.read_params()
    return json.loads(json.dumps(values))  # plain lists and numbers, as they come back from a record


def _locked_parameters(stage: DvcStage) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for dep in stage.deps:
        if getattr(dep, "params", ()) and dep.hash_info:
            values |= dep.hash_info.value
    return json.loads(json.dumps(values))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _code_hash(files: dict[str, str | None]) -> str | None:
    """SHA-256 over names and hashes of the declared Python files; None where a stage declares none."""
    lines = [f"{value}  {name}\n" for name, value in sorted(files.items()) if _is_code(name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def _is_code(name: str) -> bool:
    return name.endswith(".py")


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
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _name(item: Output) -> str:
    """The path as seen from the repository's root, with forward slashes."""
    return Path(os.path.relpath(item.fs_path, item.repo.root_dir)).as_posix()


def _relative(path: Path) -> str:
    return os.path.relpath(path)


def _overlap(one: str, other: str) -> bool:
    first, second = Path(one), Path(other)
    return first == second or first in second.parents or second in first.parents


def _short(value: Any) -> str:
    """The start of a hash, its ".dir" kept."""
    if not isinstance(value, str):
        return "none"
    start, dot, kind = value.partition(".")
    return start[:SHORT] + dot + kind


def main(arguments: list[str] | None = None) -> int:
    """The command line. Exit status: 0 fine, 1 something was altered or is missing, 2 a wrong call."""
    parser = argparse.ArgumentParser(prog="edgepress lineage", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("show", "verify"))
    parser.add_argument("path", help="a file or folder that a stage makes")
    given = parser.parse_args(arguments)
    try:
        with Repo() as repo:
            if given.command == "show":
                print("\n".join(show(repo, given.path)))
                return 0
            findings, hashed = verify(repo, given.path)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (DvcException, OSError) as error:
        print(f"cannot read the lineage: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for finding in findings:
        print(f"{finding.stage}: {'' if finding.fault else 'note: '}{finding.sentence}")
    faults = sum(finding.fault for finding in findings)
    print(f"{given.path}: {hashed} files and folders hashed, {f'{faults} altered or missing' if faults else 'ok'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
