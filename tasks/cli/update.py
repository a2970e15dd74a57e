"""`edgepress update`: what leads from one version's folder to another's, signed, for devices that have the first.

    edgepress update keygen KEY                                an Ed25519 key pair: KEY and KEY.pub
    edgepress update make A B --key KEY --out FILE             from version A's folder to B's
    edgepress update apply FILE --public-key KEY.pub --folder DIR

`keygen` and `apply` work in any folder, as on a device. Each prints sentences, with --json an object.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from tasks.cli import console, project, subcommands


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    commands = parser.add_subparsers(required=True, metavar="keygen | make | apply")
    command = subcommands.add(commands, "keygen", _keygen, "make a key pair")
    command.add_argument("key", type=Path, metavar="KEY")
    command = subcommands.add(commands, "make", _make, "write a signed update")
    command.add_argument("a", metavar="A", help="version")
    command.add_argument("b", metavar="B", help="version")
    command.add_argument("--key", type=Path, required=True, help="private key")
    command.add_argument("--out", type=Path, required=True, metavar="FILE")
    command = subcommands.add(commands, "apply", _apply, "turn a folder that is the old version into the new one")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--public-key", type=Path, required=True)
    command.add_argument("--folder", type=Path, required=True, metavar="DIR")


def main(given: argparse.Namespace) -> None:
    """Do what the subcommand says."""
    given.action(given)


def _keygen(given: argparse.Namespace) -> None:
    from tasks.registry import signing

    public = signing.generate(given.key)
    content = {"private": str(given.key), "public": str(public)}
    console.answer(given, content, f"{given.key} signs, keep it to yourself; {public} verifies")


def _make(given: argparse.Namespace) -> None:
    from tasks.registry import update, versions

    key, out = given.key.absolute(), given.out.absolute()
    project.enter()
    names = given.a, given.b
    old, new = (versions.folder_of(project.ROOT, versions.find(project.ROOT, name)) for name in names)
    made = update.make(old, new, names, key, out)
    lines = [f"{given.out}: {made.bytes:,} bytes, {made.bytes / made.package:.2%} of {given.b}'s {made.package:,}"]
    lines += [f"{name}: {how}, {size:,} bytes" for name, (how, size) in made.files.items()]
    content = asdict(made) | {"adapter_only": made.adapter_only}
    if made.adapter_only:
        from tasks.registry import delta  # here, as it imports torch

        own, model = delta.adapter_parameters(new)
        content |= {"adapter_parameters": own, "model_parameters": model}
        lines += [f"only the adapter changed: {own:,} parameters, {own / model:.2%} of the model's {model:,}"]
    console.answer(given, content, "\n".join(lines))


def _apply(given: argparse.Namespace) -> None:
    from tasks.registry import update

    done = update.apply(given.file, given.public_key, given.folder)
    content = {"folder": str(given.folder), "version": done.new, "files": {n: f.sha256 for n, f in done.files.items()}}
    console.answer(given, content, f"{given.folder} is {done.new} now, {len(done.files)} files verified")
