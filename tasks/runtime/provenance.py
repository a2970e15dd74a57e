"""The way back from an artifact to the first inputs: the tree of the stages that made it, and whether it still holds.

    edgepress lineage show PATH      the tree from an artifact to the base weights and the corpus
    edgepress lineage verify PATH    hash everything on that way again; name what was altered or is missing

Edges and hashes are DVC's own, who made what is in the records (`tasks.runtime.lineage`). It restores nothing: `dvc
checkout` or `dvc repro` do that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dvc.exceptions import OutputNotFoundError
from dvc.repo import Repo
from dvc_data.hashfile.tree import Tree

from tasks.algorithms.errors import InputError
from tasks.parameters import parameter_file
from tasks.runtime import code, lineage

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.stage import Stage as DvcStage

SHORT = 10
"""Characters of a hash that `show` prints."""


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
            parents = [parent for parent in parents if parent.name != code.STAGE]  # it makes lists: see _against_code
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


def described(repo: Repo, path: str) -> list[dict[str, Any]]:
    """What `show` says, as plain data: every stage on the way back, first inputs first.

    Raises:
        InputError: no stage makes it.
    """
    nodes: dict[str, Node] = {}

    def add(node: Node) -> None:
        if node.stage.addressing not in nodes:
            for parent in node.parents:
                add(parent)
            nodes[node.stage.addressing] = node

    for root in trace(repo, path):
        add(root)
    return [
        {
            "stage": name,
            "frozen": node.stage.frozen,
            "parents": [parent.stage.addressing for parent in node.parents],
            "outputs": {lineage.name(out): out.hash_info.value for out in node.stage.outs},
            "record": lineage.find(node.stage),
            "here": lineage.local(node.stage),
        }
        for name, node in nodes.items()
    ]


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
            hashes[item.fs_path] = lineage.md5(item, trust_state=False)
        return hashes[item.fs_path]

    for stage in _stages(trace(repo, path)):
        for finding in (*_against_lock(stage, actual), *_against_code(stage), *_against_record(stage)):
            findings[finding] = None
    return list(findings), len(hashes)


def _against_lock(stage: DvcStage, actual: Callable[[Output], str | None]) -> Iterator[Finding]:
    name = stage.addressing
    if not all(out.hash_info for out in stage.outs):
        yield Finding(name, "never run here: dvc.lock has no entry for it (`dvc repro` makes it)")
        return
    for out in stage.outs:
        if (found := actual(out)) != (locked := out.hash_info.value):
            yield from _altered_files(out) or _compare(name, f"output {lineage.name(out)}", locked, found)
    for dep in lineage.inputs(stage):
        for finding in _compare(name, f"input {lineage.name(dep)}", dep.hash_info.value, actual(dep)):
            # a frozen stage's result is kept on purpose when its inputs go on
            yield finding._replace(fault=False) if stage.frozen else finding
    for key, now in lineage.parameters(stage).items():
        then = lineage.locked_parameters(stage).get(key)
        if then != now:
            yield Finding(name, f"parameter {key} is {now!r} now, it was made with {then!r}", not stage.frozen)


def _altered_files(out: Output) -> list[Finding]:
    """Which files of an output folder are not as they were written; none where DVC knows only the hash of the whole."""
    wanted, found = out.get_obj(), lineage.on_disk(out, trust_state=False)
    if not isinstance(wanted, Tree) or not isinstance(found, Tree):
        return []
    then, now = ({key: info.value for key, _, info in tree} for tree in (wanted, found))
    return [
        finding
        for key in sorted(then.keys() | now.keys())
        for finding in _compare(
            out.stage.addressing, f"output {lineage.name(out)}/{'/'.join(key)}", then.get(key), now.get(key)
        )
    ]


def _against_code(stage: DvcStage) -> Iterator[Finding]:
    """The files that the list of a stage's code names, against those on disk."""
    for path in code.changed_code(stage, made=True):
        yield Finding(stage.addressing, f"code {path} is not what it was made with", not stage.frozen)


def _against_record(stage: DvcStage) -> Iterator[Finding]:
    name, path = stage.addressing, lineage.record_path(stage)
    if not all(out.hash_info for out in stage.outs):
        return
    entry = lineage.find(stage) or lineage.read(path)  # that of another result says what differs
    if entry is None:
        yield Finding(name, f"lineage record {_relative(path)} is missing or unreadable, and no run here made this")
        return
    if entry != lineage.read(path):
        yield Finding(
            name, f"{_relative(path)} is of another result; a run of the flow puts the right one there", False
        )
    sides = (("outputs", "output", stage.outs), ("inputs", "input", lineage.inputs(stage)))
    for side, word, items in sides:
        written = entry.get(side) if isinstance(entry.get(side), dict) else {}
        for item in items:
            what, locked = lineage.name(item), item.hash_info.value
            if (then := written.get(what)) != locked:
                places = f"{_short(then)} in the lineage record, {_short(locked)} in dvc.lock"
                # DVC notes a frozen stage's code as it is now; the record keeps what made the result
                fault = not (stage.frozen and side == "inputs" and lineage.is_code(what))
                yield Finding(name, f"{word} {what} is {places}", fault)
    if entry.get("parameters") != lineage.locked_parameters(stage):
        yield Finding(name, "the lineage record has other parameters than dvc.lock")


def _compare(stage: str, what: str, locked: str | None, found: str | None) -> Iterator[Finding]:
    if found is None:
        yield Finding(stage, f"{what} is missing")
    elif found != locked:
        yield Finding(stage, f"{what} was altered: {_short(found)} on disk, {_short(locked)} in dvc.lock")


def _headline(stage: DvcStage) -> str:
    entry = lineage.find(stage)
    if entry is None:
        return "  (made elsewhere: no lineage record is of these outputs)"
    git = entry["git"] if isinstance(entry.get("git"), dict) else {}
    revision = f"git {_short(git.get('revision'))}{' + changes' if git.get('dirty') else ''}"
    when = f"{entry.get('started')}  {entry.get('seconds')} s"
    return f"  {when}  code {_short(entry.get('code'))}  {revision}{'  frozen' if stage.frozen else ''}"


def _details(stage: DvcStage) -> Iterator[str]:
    """Who made it here, too; parameters that are set, outputs, and the inputs that no stage makes."""
    first, own = lineage.find(stage), lineage.local(stage)
    if first and own and first != own:
        yield f"made on {lineage.machine(first)}"
        yield f"and again here {own.get('started')}  {own.get('seconds')} s  on {lineage.machine(own)}"
    flat = parameter_file.flat(lineage.locked_parameters(stage))
    section = f"{stage.addressing.partition('@')[0]}."
    parameters = [f"{key.removeprefix(section)}={json.dumps(value)}" for key, value in flat if value not in (None, {})]
    if parameters:
        yield f"parameters {' '.join(parameters)}"
    for out in stage.outs:
        yield f"output {lineage.name(out)} {_short(out.hash_info.value)}"
    made = [out for made_by in stage.repo.index.stages for out in made_by.outs]
    for dep in lineage.inputs(stage):
        if not lineage.is_code(lineage.name(dep)) and not any(lineage.overlap(dep, out) for out in made):
            yield f"source {lineage.name(dep)} {_short(dep.hash_info.value)}"


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


def _relative(path: Path) -> str:
    return os.path.relpath(path)


def _short(value: Any) -> str:
    """The start of a hash, its ".dir" kept."""
    if not isinstance(value, str):
        return "none"
    start, dot, kind = value.partition(".")
    return start[:SHORT] + dot + kind
