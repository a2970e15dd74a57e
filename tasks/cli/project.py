"""What commands ask of the project's folder, in which they run: which one it is, what is in use, a revision's name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.algorithms.errors import InputError

if TYPE_CHECKING:
    from tasks.parameters import schema
    from tasks.registry.standing import Manifest

ROOT = Path(".")


def enter() -> None:
    """Make the project's folder the working folder, also from one below it.

    Raises:
        InputError: neither the working folder nor one above it holds a dvc.yaml.
    """
    found = _folder()
    if found is None:
        raise InputError(f"{Path.cwd()} has no dvc.yaml; run from the project's folder")
    if found != Path.cwd():
        os.chdir(found)


def path(given: str) -> str:
    """A path as given, as seen from the project's folder: for arguments of commands that `enter` it."""
    found = _folder()
    return given if found in (None, Path.cwd()) else os.path.relpath(given, found)


def folder_or_revision(given: str) -> str:
    """`path` of what is a folder; a version or a revision as it is."""
    return path(given) if Path(given).is_dir() else given


def _folder() -> Path | None:
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()), None)


def revision(what: str) -> str:
    """A version or revision as it is; of a folder, the commit of its present state."""
    from tasks.registry import contents

    folder = Path(what)
    return contents.snapshot(folder) if folder.is_dir() else what


def registry() -> schema.Registry:
    """The registry's section of params.yaml."""
    from tasks.parameters import schema  # here, as every command asks this module for its folder

    return schema.load(ROOT / "params.yaml").registry


def in_use() -> Manifest:
    """What is promoted.

    Raises:
        InputError: nothing is.
    """
    from tasks.registry import versions

    manifest = versions.current(ROOT)
    if manifest is None:
        raise InputError("nothing is promoted yet; `edgepress registry promote VERSION|FOLDER|REV` does it")
    return manifest
