"""`edgepress deps`: write the code that each stage of dvc.yaml needs into its `deps`; with --check only compare.

DVC doesn't notice a missing dependency, so the lists follow from the imports: a stage needs its module and every
project module that is imported from there, those for type checkers alone excepted. A room of `WHOLE` is one entry, its
folder: one stage uses it, templates included. The tests call `stale`, too.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
from pathlib import Path

import yaml

WHOLE = ("tasks/reporting",)
"""Rooms that only one stage uses, and needs as a whole."""
ENTRY = re.compile(r"      - (tasks/\S+)")


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where dvc.yaml is out of date")


def main(given: argparse.Namespace) -> int:
    """Rewrite dvc.yaml in place, or tell what is out of date in it."""
    path = Path("dvc.yaml")
    text = path.read_text(encoding="utf-8")
    new = rewritten(text, Path())
    if given.check:
        for name in (changed := stale(text, Path())):
            print(f"{name}: its code dependencies in dvc.yaml are not its imports; run `edgepress deps`")
        return 1 if changed else 0
    if new != text:
        path.write_text(new, encoding="utf-8")
    print("dvc.yaml is as it was" if new == text else "dvc.yaml: code dependencies written")
    return 0


@functools.cache
def imported(path: Path, root: Path) -> frozenset[Path]:
    """Project files that a module imports when it runs; imports for type checkers alone don't count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = {root / f"{name.replace('.', '/')}.py" for name in names if name.startswith("tasks")}
    return frozenset(file for file in files if file.exists())


def closure(path: Path, root: Path) -> list[str]:
    """The module and all project modules that it needs, relative to the root, sorted; rooms of `WHOLE` as folders."""
    found, open_ = set(), [path]
    while open_:
        current = open_.pop()
        if current not in found:
            found.add(current)
            open_.extend(imported(current, root))
    names = {file.relative_to(root).as_posix() for file in found}
    return sorted({next((room for room in WHOLE if name.startswith(f"{room}/")), name) for name in names})


def stale(text: str, root: Path) -> list[str]:
    """Stages of a dvc.yaml whose code dependencies are not what they import."""
    stages = yaml.safe_load(text)["stages"]
    return [
        name
        for name, stage in stages.items()
        if [dep for dep in stage["deps"] if dep.startswith("tasks/")] != closure(root / f"tasks/{name}.py", root)
    ]


def rewritten(text: str, root: Path) -> str:
    """The same dvc.yaml with every stage's entries below tasks/ replaced by its closure; all else stays to the byte."""
    lines: list[str] = []
    stage, written = "", False
    for line in text.splitlines():
        if found := re.fullmatch(r"  (\w+):.*", line):
            stage, written = found[1], False
        if ENTRY.match(line):
            if not written:
                lines += [f"      - {name}" for name in closure(root / f"tasks/{stage}.py", root)]
            written = True
            continue
        lines.append(line)
    return "\n".join(lines) + "\n"
