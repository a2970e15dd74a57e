"""Git by its command: one way to call it, the names that it lists, who commits, and the tree of a present state.

A project may be a subfolder of a larger repository: every command runs in a folder, and paths are as seen from there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pygit2

from tasks.algorithms.errors import InputError

NO_HOOKS = ("-c", "core.hooksPath=/dev/null")
"""DVC's and the user's hooks are for what the user does."""
PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")
"""Variables by which a hook of git's tells its own repository and index; `run` works in its folder's."""
NOBODY = {"NAME": "edgepress", "EMAIL": "edgepress@localhost"}
"""Who commits and tags where git was not told."""
IDENTITY = re.compile(r"(?P<NAME>.*) <(?P<EMAIL>.*)> \d+ [+-]\d+")


class Distrusted(InputError):
    """The folder is another user's, and git works there only when told to (safe.directory)."""


def run(folder: Path, *arguments: str, env: Mapping[str, str] | None = None, text: str | None = None) -> str:
    """What a git command prints, without the last newline.

    Args:
        env: variables for git, beside those of this process but `PLACES`.
        text: its standard input.

    Raises:
        InputError: it failed, with git's own words.
        Distrusted: the same, as the folder is another user's.
        OSError: there is no git.
    """
    inherited = {key: value for key, value in os.environ.items() if key not in PLACES}
    command, environment = ["git", *NO_HOOKS, *arguments], inherited | dict(env or {})
    names = {"encoding": sys.getfilesystemencoding(), "errors": sys.getfilesystemencodeerrors()}  # a name is bytes
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, env=environment, **names)
    if done.returncode:
        kind = Distrusted if "safe.directory" in done.stderr else InputError
        raise kind(f"git {' '.join(arguments[:2])} failed: {' '.join(done.stderr.split())}")
    return done.stdout.removesuffix("\n")


def trust(folder: Path) -> None:
    """Let DVC read commits in a repository where git works, by pygit2, which knows a safe.directory of files alone.

    Raises:
        InputError: it is in no repository.
        Distrusted: git refuses another user's.
    """
    run(folder, "rev-parse", "--git-dir")
    pygit2.settings.owner_validation = False  # git has looked, and it takes GIT_CONFIG_COUNT, too (pygit2 1.21)


def names(folder: Path, command: str, *arguments: str) -> list[str]:
    """The paths that a git command lists, as they are: without `-z` git quotes most that aren't plain ASCII.

    Raises:
        InputError: it failed, with git's own words.
    """
    return [name for name in run(folder, command, "-z", *arguments).split("\0") if name]


def identity(folder: Path) -> dict[str, str]:
    """NAME and EMAIL of who commits here: whom git was told of, else NOBODY."""
    try:
        found = IDENTITY.fullmatch(run(folder, "var", "GIT_COMMITTER_IDENT"))
    except InputError:
        found = None
    return found.groupdict() if found else NOBODY


def signed(who: Mapping[str, str]) -> dict[str, str]:
    """The variables by which git takes NAME and EMAIL for author and committer."""
    return {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()}


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
