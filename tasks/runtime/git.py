"""Git by its command: one way to call it, and the tree of a folder's present state."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.algorithms.errors import InputError

NO_HOOKS = ("-c", "core.hooksPath=/dev/null")
"""DVC's and the user's hooks are for what the user does."""
PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")
"""Variables by which a hook of git's tells its own repository and index; `run` works in its folder's."""


def run(folder: Path, *arguments: str, env: Mapping[str, str] | None = None, text: str | None = None) -> str:
    """What a git command prints, without the last newline.

    Args:
        env: variables for git, beside those of this process but `PLACES`.
        text: its standard input.

    Raises:
        InputError: it failed, with git's own words.
        OSError: there is no git.
    """
    inherited = {key: value for key, value in os.environ.items() if key not in PLACES}
    command, environment = ["git", *NO_HOOKS, *arguments], inherited | dict(env or {})
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise InputError(f"git {' '.join(arguments[:2])} failed: {' '.join(done.stderr.split())}")
    return done.stdout.removesuffix("\n")


def tree(folder: Path, also: Sequence[str] = ()) -> str:
    """The tree of HEAD with the tracked files as they lie in the folder; branch and index stay as they are.

    Args:
        also: files that belong into it though git doesn't track or even ignores them; those that aren't there don't.

    Raises:
        InputError: git refuses.
    """
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        run(folder, "read-tree", "HEAD", env=index)
        run(folder, "add", "--update", ".", env=index)
        if present := [name for name in also if (folder / name).exists()]:
            run(folder, "add", "--force", "--", *present, env=index)
        return run(folder, "write-tree", env=index)
