"""What commands ask of the project's folder, in which they run: that it is one, what is in use, a revision's name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.algorithms.errors import InputError
from tasks.parameters import schema

if TYPE_CHECKING:
    from tasks.registry.standing import Manifest

ROOT = Path(".")


def require() -> None:
    """Refuse to work elsewhere.

    Raises:
        InputError: the working folder holds no dvc.yaml.
    """
    if not (ROOT / "dvc.yaml").is_file():
        raise InputError(f"{ROOT.resolve()} has no dvc.yaml; run from the project's folder")


def revision(what: str) -> str:
    """A version or revision as it is; of a folder, the commit of its present state."""
    from tasks.registry import contents

    folder = Path(what)
    return contents.snapshot(folder) if folder.is_dir() else what


def registry() -> schema.Registry:
    """The registry's section of params.yaml."""
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
