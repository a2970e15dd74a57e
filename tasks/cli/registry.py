"""`edgepress registry COMMAND`: versions, promotion, rollback, canary and updates; no server, no Prefect.

    list                                   every version: stage, date, figures, verdict, bytes
    promote VERSION|FOLDER|REV [--again]   make it the model in use
    rollback [VERSION] [--reason …]        back to the one before, verified first
    diff A B                               figures, parameters, files by hash, bytes
    verify [VERSION]                       hash its files (default: what is in use)
    canary start VERSION|FOLDER|REV [--share 0.05] | stop [--failed] | route ID | judge TELEMETRY [--apply]
    keygen KEY                             an Ed25519 key pair: KEY and KEY.pub
    update make A B --key KEY --out FILE   what leads from version A's folder to B's, signed
    update apply FILE --public-key KEY.pub --folder DIR

Each prints a sentence or a table, with --json an object. Exit code: 0; 1 where it is refused, with a sentence; 2 for a
wrong call; `canary judge` and `verify` 0 whatever the verdict is, 1 where a file is not what it should be.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException

from tasks.algorithms.errors import InputError
from tasks.algorithms.statistics import canary
from tasks.parameters import schema
from tasks.registry import canary_samples, contents, overview, signing, update, versions
from tasks.registry.standing import Manifest
from tasks.registry.tags import Version

ROOT = Path(".")
SHOWN = ("perplexity_test", "perplexity_test_ood")
"""Figures of `list`; `--json` and `diff` have all."""


def current(root: Path = ROOT) -> Manifest | None:
    """What is promoted, for the nightly: `tasks.registry.versions.current`."""
    return versions.current(root)


def promote(
    root: Path, rev: str, figures: dict | None = None, verdict: dict | None = None, *, again: bool = False
) -> Version:
    """Promote and keep the folders of the last versions alone, for the nightly: `tasks.registry.versions.promote`."""
    keep = _params(root).keep
    version = versions.promote(root, rev, figures, verdict, again=again)
    versions.prune(root, keep)
    return version


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        if given.run not in ELSEWHERE and not (ROOT / "dvc.yaml").is_file():
            raise InputError(f"{ROOT.resolve()} has no dvc.yaml; run from the project's folder")
        content, text = given.run(given)
    except InputError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    except (DvcException, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(json.dumps(content, indent=1, sort_keys=True) if given.json else text)
    return 0


def _list(given: argparse.Namespace) -> tuple[Any, str]:
    rows = overview.versions(ROOT)
    if not rows:
        return rows, "There are no versions yet: `promote .` makes the first."
    header = ["version", "stage", "date", "bytes", "ppl test", "ppl ood", "verdict", "revision", "data"]
    return rows, _table([header, *(_cells(row) for row in rows)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    figures = [row["figures"].get(name) for name in SHOWN]
    return [
        row["version"],
        row["stage"] or "-",
        row["date"][:16],
        "-" if row["bytes"] is None else f"{row['bytes']:,}",
        *("-" if value is None else f"{value:,.3f}" for value in figures),
        row["verdict"].get("verdict") or "by hand",
        row["revision"][:10],
        row["data"],
    ]


def _promote(given: argparse.Namespace) -> tuple[Any, str]:
    before = versions.current(ROOT, strict=False)
    version = promote(ROOT, _revision(given.what), again=given.again)
    now = current()
    change = "is in use already" if before and before.tag == now.tag else f"is in use ({now.tag})"
    return asdict(
        now
    ), f"{version.name} {change}: {version.revision[:10]}, {now.package['bytes']:,} bytes in {now.folder}"


def _rollback(given: argparse.Namespace) -> tuple[Any, str]:
    before = versions.current(ROOT, strict=False)
    version = versions.rollback(ROOT, given.version, given.reason)
    now = current()
    files = len(now.package["files"])
    return asdict(
        now
    ), f"{version.name} is in use again ({now.tag}), {files} files verified; {before.version} is withdrawn"


def _diff(given: argparse.Namespace) -> tuple[Any, str]:
    found = overview.diff(ROOT, given.a, given.b)
    lines = []
    for title in ("figures", "parameters", "files"):
        rows = [[name, _value(old), _value(new), _change(old, new)] for name, (old, new) in found[title].items()]
        lines.append(_table([[title, given.a, given.b, "change"], *rows]) if rows else f"{title}: none differs")
    old, new = found["bytes"]
    return found, "\n\n".join([*lines, f"bytes: {_value(old)} -> {_value(new)} {_change(old, new)}".rstrip()])


def _verify(given: argparse.Namespace) -> tuple[Any, str]:
    name = given.version or _in_use().version
    folder, version = versions.verify(ROOT, name), versions.find(ROOT, name)
    files = version.record["package"]["files"]
    return {"version": name, "files": files}, f"{folder}: {len(files)} files are those of {name}"


def _canary_start(given: argparse.Namespace) -> tuple[Any, str]:
    share = _params(ROOT).canary.share if given.share is None else given.share
    begun = versions.start_canary(ROOT, _revision(given.what), share)
    return asdict(begun), f"{begun.version} is the canary with {begun.share:.3%} of the requests, in {begun.folder}"


def _canary_stop(given: argparse.Namespace) -> tuple[Any, str]:
    name = versions.stop_canary(ROOT, given.reason, withdraw=given.failed)
    return {"version": name, "failed": given.failed}, f"{name} is no canary any more"


def _canary_route(given: argparse.Namespace) -> tuple[Any, str]:
    manifest = _in_use()
    candidate = manifest.canary
    chosen = candidate if candidate and canary.routed(given.id, candidate.version, candidate.share) else manifest
    return {"version": chosen.version, "folder": chosen.folder}, f"{chosen.version} {chosen.folder}"


def _canary_judge(given: argparse.Namespace) -> tuple[Any, str]:
    manifest = _in_use()
    if manifest.canary is None:
        raise InputError("there is no canary to judge; `canary start VERSION` begins one")
    name, sla = manifest.canary.version, _params(ROOT).canary
    found = canary_samples.judge(given.telemetry, name, manifest.version, sla)
    rows = [
        [check.name, *(f"{value:.4g}" for value in (check.value, check.low, check.high, check.limit)), _mark(check.ok)]
        for check in found.checks
    ]
    lines = [f"{name} against {manifest.version}: {found.verdict} ({found.samples} samples; {found.reason})"]
    lines += [_table([[f"at {found.confidence:.2%}", "value", "low", "high", "limit", ""], *rows])] if rows else []
    if given.apply:
        lines += _apply(name, found)
    return {"canary": name, "promoted": manifest.version, **asdict(found)}, "\n".join(lines)


def _apply(name: str, found: canary.Judgement) -> list[str]:
    if found.verdict == canary.PROMOTE:
        promote(ROOT, name)
        return [f"{name} is in use"]
    if found.verdict == canary.ROLLBACK:
        versions.stop_canary(ROOT, found.reason, withdraw=True)
        return [f"{name} is withdrawn"]
    return []


def _keygen(given: argparse.Namespace) -> tuple[Any, str]:
    public = signing.generate(given.key)
    return {
        "private": str(given.key),
        "public": str(public),
    }, f"{given.key} signs, keep it to yourself; {public} verifies"


def _update_make(given: argparse.Namespace) -> tuple[Any, str]:
    names = given.a, given.b
    old, new = (versions.folder_of(ROOT, versions.find(ROOT, name)) for name in names)
    made = update.make(old, new, names, given.key, given.out)
    lines = [f"{given.out}: {made.bytes:,} bytes, {made.bytes / made.package:.2%} of {given.b}'s {made.package:,}"]
    lines += [f"{name}: {how}, {size:,} bytes" for name, (how, size) in made.files.items()]
    content = asdict(made) | {"adapter_only": made.adapter_only}
    if made.adapter_only:
        from tasks.registry import delta  # here, as it imports torch

        own, model = delta.adapter_parameters(new)
        content |= {"adapter_parameters": own, "model_parameters": model}
        lines += [f"only the adapter changed: {own:,} parameters, {own / model:.2%} of the model's {model:,}"]
    return content, "\n".join(lines)


def _update_apply(given: argparse.Namespace) -> tuple[Any, str]:
    done = update.apply(given.file, given.public_key, given.folder)
    content = {"folder": str(given.folder), "version": done.new, "files": {n: f.sha256 for n, f in done.files.items()}}
    return content, f"{given.folder} is {done.new} now, {len(done.files)} files verified"


def _revision(what: str) -> str:
    """A version or revision as it is; of a folder, the commit of its present state."""
    folder = Path(what)
    return contents.snapshot(folder) if folder.is_dir() else what


def _in_use() -> Manifest:
    manifest = current()
    if manifest is None:
        raise InputError("nothing is promoted yet; `promote VERSION|FOLDER|REV` does it")
    return manifest


def _params(root: Path) -> schema.Registry:
    return schema.load(root / "params.yaml").registry


def _mark(ok: bool | None) -> str:
    return "open" if ok is None else "ok" if ok else "broken"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _change(old: Any, new: Any) -> str:
    numbers = all(type(value) in (int, float) for value in (old, new))
    return f"{(new - old) / abs(old):+.2%}" if numbers and old else ""


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print an object instead of text")
    parser = argparse.ArgumentParser(prog="edgepress registry", description="the registry of models")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(place: Any, name: str, run: Callable, what: str) -> argparse.ArgumentParser:
        command = place.add_parser(name, parents=[shared], help=what, description=what)
        command.set_defaults(run=run)
        return command

    add(commands, "list", _list, "every version")
    command = add(commands, "promote", _promote, "make a version the one in use")
    command.add_argument("what", metavar="VERSION|FOLDER|REV")
    command.add_argument("--again", action="store_true", help="although it was rolled back")
    command = add(commands, "rollback", _rollback, "back to the version before")
    command.add_argument("version", nargs="?")
    command.add_argument("--reason", default="by hand")
    command = add(commands, "diff", _diff, "what differs between two versions or revisions")
    command.add_argument("a", metavar="A")
    command.add_argument("b", metavar="B")
    add(commands, "verify", _verify, "hash a version's files").add_argument("version", nargs="?")
    _add_canary(add, commands.add_parser("canary", help="a candidate with a share of the requests"))
    add(commands, "keygen", _keygen, "make a key pair").add_argument("key", type=Path, metavar="KEY")
    _add_update(add, commands.add_parser("update", help="what leads from one version's folder to another's"))
    return parser


def _add_canary(add: Callable, parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = add(commands, "start", _canary_start, "give a candidate a share of the requests")
    command.add_argument("what", metavar="VERSION|FOLDER|REV")
    command.add_argument("--share", type=float, help="0 to 1 (default: params.yaml)")
    command = add(commands, "stop", _canary_stop, "end the canary")
    command.add_argument("--failed", action="store_true", help="it is not to be promoted")
    command.add_argument("--reason", default="by hand")
    add(commands, "route", _canary_route, "which version serves a request").add_argument("id", metavar="ID")
    command = add(commands, "judge", _canary_judge, "promote, rollback or keep watching, from a telemetry file")
    command.add_argument("telemetry", type=Path)
    command.add_argument("--apply", action="store_true", help="promote or withdraw it accordingly")


def _add_update(add: Callable, parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = add(commands, "make", _update_make, "write a signed update")
    command.add_argument("a", metavar="A", help="version")
    command.add_argument("b", metavar="B", help="version")
    command.add_argument("--key", type=Path, required=True, help="private key")
    command.add_argument("--out", type=Path, required=True, metavar="FILE")
    command = add(commands, "apply", _update_apply, "turn a folder that is the old version into the new one")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--public-key", type=Path, required=True)
    command.add_argument("--folder", type=Path, required=True, metavar="DIR")


ELSEWHERE = (_keygen, _update_apply)
"""Commands that work in any folder, as on a device."""


if __name__ == "__main__":
    sys.exit(main())
