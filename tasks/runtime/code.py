"""Which code computes a stage's result, as file -> MD5: what the stage `code` writes, and whether it is still so.

A stage needs its module and every project module that is imported from there, those for type checkers alone excepted. A
room of `WHOLE` counts with all its files: one stage uses it, templates included. Every stage but `code` depends on the
list of its own, data/code/NAME.json, so that DVC runs it again where one of these files changed, and no other. The
lists follow from the imports and are computed here; no model and no parameter is known here.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.algorithms.errors import InputError

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.stage import Stage as DvcStage

STAGE = "code"
"""The stage that writes the lists."""
FOLDER = Path("data/code")
WHOLE = (Path("tasks/reporting"),)
"""Rooms that only one stage uses, and needs as a whole."""
WAY_OUT = "`dvc repro` lists it anew and runs again what it concerns"
SHOWN = 3
"""Files that a sentence names."""


def listing(name: str, root: Path) -> dict[str, str]:
    """The code that a stage needs: path from the root -> MD5 of its content, sorted by path."""
    return {path: _md5(root / path) for path in closure(root / f"tasks/{name}.py", root)}


def closure(path: Path, root: Path) -> list[str]:
    """The module and all project files that it needs, relative to the root, sorted; none where it isn't there."""
    found, open_ = set(), [path] if path.exists() else []
    while open_:
        current = open_.pop()
        if current in found:
            continue
        found.add(current)
        room = next((root / room for room in WHOLE if root / room in current.parents), None)
        open_.extend(_files(room) if room else [])
        open_.extend(imported(current, root) if current.suffix == ".py" else [])
    return sorted(file.relative_to(root).as_posix() for file in found)


def imported(path: Path, root: Path) -> list[Path]:
    """Project files that a module imports when it runs; imports for type checkers alone don't count.

    Raises:
        InputError: it is no Python.
    """
    try:
        names = _imports(path.read_bytes())
    except SyntaxError as error:
        where = path.relative_to(root)
        raise InputError(f"{where}, line {error.lineno} is no Python ({error.msg}); correct it") from error
    files = [root / f"{name.replace('.', '/')}.py" for name in names if name.startswith("tasks")]
    return [file for file in files if file.exists()]


def listed(stage: DvcStage) -> Output | None:
    """The list that a stage depends on; None where it depends on none."""
    folder = Path(stage.repo.root_dir) / FOLDER
    return next((dep for dep in stage.deps if Path(dep.fs_path).parent == folder), None)


def changed_code(stage: DvcStage, made: bool = False) -> list[str]:
    """The files of a stage's code that are not what its list says now, or are new in it or no longer there.

    Where there is no list any more, these are all of its files; where the stage depends on none, there are none.

    Args:
        made: compare with the list that its result was made with, as far as DVC's cache has it.

    Raises:
        InputError: one of them is no Python.
    """
    dep = listed(stage)
    if dep is None:
        return []
    now = listing(stage.name.partition("@")[0], Path(stage.repo.root_dir))
    before = None
    if made and dep.hash_info:
        before = _read(Path(stage.repo.cache.local.oid_to_path(dep.hash_info.value)))
    before = before or _read(Path(dep.fs_path)) or {}
    return sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))


def named(paths: list[str]) -> str:
    """Files in a sentence, the first ones by name."""
    more = [f"{len(paths) - SHOWN} more files"] if len(paths) > SHOWN else []
    return " and ".join(filter(None, [", ".join(paths[:SHOWN]), *more]))


def _read(path: Path) -> dict[str, str] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@functools.cache  # by content: a process that lives on sees edits
def _imports(source: bytes) -> frozenset[str]:
    """Full names of what a module imports: of modules, and of what is taken from them."""
    names: set[str] = set()
    for node in _statements(ast.parse(source).body):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements, however deep; an expression holds no import."""
    for node in body:
        yield node
        if not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"):
            yield from _statements(getattr(node, "body", []))
        yield from _statements(getattr(node, "orelse", []))
        yield from _statements(getattr(node, "finalbody", []))
        for part in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
            yield from _statements(part.body)


def _files(room: Path) -> list[Path]:
    """What DVC sees of a room: .dvcignore leaves out what is said of the code and what Python makes of it."""
    files = (path for path in room.rglob("*") if path.is_file())
    return [path for path in files if path.name != "README.md" and "__pycache__" not in path.parts]


def _md5(path: Path) -> str:
    """As DVC has it."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
