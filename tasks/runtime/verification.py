"""Whether what lies on disk is what a commit's dvc.lock names: every byte hashed again, stage by stage.

It says which stages this machine computed and which came from a cache, and what differs: outputs and by how much,
parameters, code and sources. It runs nothing and restores nothing. `tasks.runtime.provenance` asks another question: of
one artifact, whether it is still what dvc.lock in the workspace says.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from dvc_data.hashfile import load
from dvc_data.hashfile.hash import file_md5
from dvc_data.hashfile.hash_info import HashInfo

from tasks.algorithms.errors import InputError
from tasks.parameters import parameter_file
from tasks.runtime import code, differences, files, git, lineage

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc.stage import Stage

SAME, DIFFERS, NOT_RUN, UNKNOWN, NEVER = "same", "differs", "not run", "not committed", "never run"
GOOD = (SAME, NEVER)
"""States of a stage. `NOT_RUN`: an output isn't on disk. `UNKNOWN`: the commit's dvc.lock has no entry for it; `NEVER`:
and nothing of it is on disk either."""
HERE, CACHE, GIT, NOWHERE = "computed here", "from a cache", "from git", "-"
SHOWN = 10
"""Characters of a hash that are shown."""


class Row(NamedTuple):
    """A stage against the commit.

    Attributes:
        state: one of the words above.
        source: where what is on disk came from; with the time where this machine computed it.
        why: sentences.
        hashed: outputs that were hashed.
    """

    stage: str
    state: str
    source: str
    why: list[str]
    hashed: int


def commit(root: Path, rev: str) -> str:
    """The full hash of a revision.

    Raises:
        InputError: there is none of this name.
    """
    try:
        return git.run(root, "rev-parse", "--verify", "--quiet", f"{rev}^{{commit}}")
    except InputError as error:
        raise InputError(f"{rev} names no commit; name a commit, a tag or a branch of this repository") from error


def verify(repo: Repo, revision: str) -> list[Row]:
    """A row per stage of dvc.yaml, then one for each that only the commit has.

    Args:
        revision: of `commit`.

    Raises:
        InputError: the commit has no dvc.lock.
    """
    root = Path(repo.root_dir)
    entries = _lock(root, revision)
    made = {out.def_path for stage in repo.index.stages for out in stage.outs}
    rows = [_row(stage, entries.get(stage.addressing), made, revision) for stage in repo.index.stages]
    known = {stage.addressing for stage in repo.index.stages}
    gone = [
        Row(name, DIFFERS, NOWHERE, ["dvc.yaml no longer has this stage"], 0) for name in entries if name not in known
    ]
    return rows + gone


def _lock(root: Path, revision: str) -> dict[str, Any]:
    try:
        return yaml.load(git.run(root, "show", f"{revision}:./dvc.lock"), yaml.CSafeLoader)["stages"]
    except InputError as error:
        raise InputError(
            f"{revision[:SHOWN]} has no dvc.lock, so nothing was computed there; name a commit that has one"
        ) from error
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"dvc.lock of {revision[:SHOWN]} can't be read; name another commit") from error


def _row(stage: Stage, entry: dict[str, Any] | None, made: set[str], revision: str) -> Row:
    if entry is None:
        there = any(out.exists for out in stage.outs)
        why = ["the commit's dvc.lock has no entry for it"] if there else []
        return Row(stage.addressing, UNKNOWN if there else NEVER, NOWHERE, why, 0)
    locked = {out["path"]: out["md5"] for out in entry.get("outs", [])}
    outs = {out.def_path: out for out in stage.outs}
    found = {path: lineage.md5(out, trust_state=False) for path, out in outs.items()}
    why = [f"output {path} is no output of it in dvc.yaml" for path in sorted(locked.keys() - outs.keys())]
    why += [f"output {path} is no output of it in the commit" for path in sorted(outs.keys() - locked.keys())]
    absent = [path for path in outs.keys() & locked.keys() if found[path] is None]
    for path in sorted(outs.keys() & locked.keys() - set(absent)):
        if found[path] != locked[path]:
            why += _by_how_much(outs[path], locked[path], found[path], revision)
    if not stage.frozen:  # its result is kept on purpose when its inputs go on
        why += [*_parameters(stage, entry), *_code(stage, entry), *_sources(stage, entry, made)]
    why += [f"output {path} is not there" for path in sorted(absent)]
    state = NOT_RUN if absent else DIFFERS if why else SAME
    return Row(stage.addressing, state, _source(stage, found, absent), why, len(found) - len(absent))


def _source(stage: Stage, found: dict[str, str | None], absent: list[str]) -> str:
    """Where the outputs on disk came from."""
    if absent:
        return NOWHERE
    root = Path(stage.repo.root_dir)
    for path, entry in lineage.computed_here(root):
        if path.parent.name == stage.addressing and entry.get("outputs") == found:
            return f"{HERE}, {str(entry.get('started'))[:16].replace('T', ' ')}"
    return CACHE if any(out.use_cache for out in stage.outs) else GIT


def _parameters(stage: Stage, entry: dict[str, Any]) -> Iterator[str]:
    then: dict[str, Any] = {}
    for values in entry.get("params", {}).values():
        then |= values
    then, now = json.loads(json.dumps(then)), lineage.parameters(stage)
    for key in sorted(then.keys() | now.keys()):
        old, new = (dict(parameter_file.flat(values.get(key), key)) for values in (then, now))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                yield f"parameter {name} is {json.dumps(new.get(name))}, committed {json.dumps(old.get(name))}"


def _code(stage: Stage, entry: dict[str, Any]) -> Iterator[str]:
    """Files of a stage's code that are not what its list in the commit says; without that list only that it differs."""
    dep = code.listed(stage)
    then = next((one.get("md5") for one in entry.get("deps", []) if dep and one["path"] == dep.def_path), None)
    if then is None:
        return
    now = code.listing(stage.name.partition("@")[0], Path(stage.repo.root_dir))
    if hashlib.md5(files.json_text(now).encode(), usedforsecurity=False).hexdigest() == then:
        return
    try:
        before = json.loads(Path(stage.repo.cache.local.oid_to_path(then)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        yield "its code differs"
        return
    for path in sorted(now.keys() | before.keys()):
        if now.get(path) != before.get(path):
            yield f"code {path} differs"


def _sources(stage: Stage, entry: dict[str, Any], made: set[str]) -> Iterator[str]:
    """Sources that differ: what another stage makes is told there."""
    then = {dep["path"]: dep.get("md5") for dep in entry.get("deps", [])}
    deps = {dep.def_path: dep for dep in lineage.inputs(stage)}
    for path in sorted(then.keys() | deps.keys()):
        if any(Path(path) == Path(out) or Path(out) in Path(path).parents for out in made):
            continue
        if path not in deps:
            yield f"source {path} is no longer read"
        elif path not in then:
            yield f"source {path} was not read then"
        elif (now := lineage.md5(deps[path], trust_state=False)) != then[path]:
            yield f"source {path} {'is not there' if now is None else 'differs'}"


def _by_how_much(out: Output, locked: str, found: str, revision: str) -> Iterator[str]:
    """A sentence per file of an output that differs."""
    hashes = f"{_short(found)} on disk, {_short(locked)} committed"
    if locked.endswith(".dir") != found.endswith(".dir"):
        yield f"output {out.def_path} is a folder in one and a file in the other: {hashes}"
        return
    with tempfile.TemporaryDirectory() as scratch:
        committed = _committed(out, locked, revision, Path(scratch))
        if committed is None:
            yield f"output {out.def_path}: {hashes}, whose files no cache has here"
            return
        present = _present(out)
        for name in sorted(committed.keys() | present.keys()):
            path = f"{out.def_path}/{name}" if name else out.def_path
            if name not in present:
                yield f"output {path} is not there"
            elif name not in committed:
                yield f"output {path} is not in the commit"
            elif present[name] != committed[name][0]:
                old, own = committed[name][1], Path(out.fs_path, name) if name else Path(out.fs_path)
                known = old is not None and old.exists()
                words = differences.between(old, own, path) if known else f"{hashes}, whose bytes no cache has here"
                yield f"output {path}: {words}"


def _present(out: Output) -> dict[str, str]:
    """Name below the output ("" for a file) -> MD5."""
    top = Path(out.fs_path)
    paths = [path for path in top.rglob("*") if path.is_file()] if top.is_dir() else [top]
    return {path.relative_to(top).as_posix() if path != top else "": file_md5(path) for path in paths}


def _committed(out: Output, locked: str, revision: str, scratch: Path) -> dict[str, tuple[str, Path | None]] | None:
    """Name below the output -> (MD5, where its bytes are); None where nobody here knows the names."""
    if not out.use_cache:
        return _of_git(out, revision, scratch)
    path = Path(out.cache.oid_to_path(locked))
    if not locked.endswith(".dir"):
        return {"": (locked, path)}
    if not path.exists():
        return None
    tree = load(out.cache, HashInfo("md5", locked))
    return {"/".join(key): (value.value, Path(out.cache.oid_to_path(value.value))) for key, _, value in tree}


def _of_git(out: Output, revision: str, scratch: Path) -> dict[str, tuple[str, Path | None]]:
    root, found = Path(out.repo.root_dir), {}
    listed = git.names(root, "ls-tree", "-r", "--name-only", revision, "--", out.def_path)
    for number, name in enumerate(listed):
        path = scratch / str(number)
        with path.open("wb") as file:
            subprocess.run(["git", "cat-file", "blob", f"{revision}:./{name}"], cwd=root, stdout=file, check=True)
        found[name.removeprefix(out.def_path).lstrip("/")] = (file_md5(path), path)
    return found


def _short(value: str) -> str:
    return value[:SHOWN] + (".dir" if value.endswith(".dir") else "")
