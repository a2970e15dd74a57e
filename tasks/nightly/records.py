"""The list of nights: each a DVC experiment whose message says what came of it. Knows nothing of Prefect.

Each night is one commit on top of the HEAD that it compressed, under `refs/exps/…/night-DATE-TIME-UPSTREAM`, the form
in which DVC keeps experiments (`dvc exp show`, `apply`, `diff`, `branch`, `push`). The commit holds dvc.lock,
params.yaml and whatever source in git had changed; its message holds the verdict and the figures as JSON. It is written
with git's plumbing: `dvc exp save` takes the refs refs/exps/exec/*, which all worktrees share, and would meet a
`dvc exp run` of the user's there (dvc 3.67.1).
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.experiments.refs import EXPS_NAMESPACE, ExpRefInfo

from tasks.algorithms.errors import InputError
from tasks.nightly import worktree
from tasks.parameters import parameter_file
from tasks.runtime import files, git

PREFIX = "night-"
FAILED = "FAILED"
"""In place of a verdict where a stage failed: there is nothing to judge and nothing to bring back."""


class Night(NamedTuple):
    """A recorded night.

    Attributes:
        name: night-DATE-TIME-UPSTREAM.
        commit: what DVC calls the experiment's revision.
        record: the JSON of its message: verdict, reason, figures, checks, upstream, ….
    """

    name: str
    ref: str
    commit: str
    record: dict[str, Any]


def save(folder: Path, name: str, candidate: str | None, record: dict[str, Any]) -> Night:
    """Record a night under its name.

    Args:
        candidate: of `worktree.snapshot`; None records a failed night on HEAD as it was.
    """
    tree = git.run(folder, "rev-parse", f"{candidate or 'HEAD'}^{{tree}}")
    revision = worktree.commit(folder, tree, f"{name}: {record['verdict']}\n\n{files.json_text(record)}")
    ref = str(ExpRefInfo(git.run(folder, "rev-parse", "HEAD"), name))
    git.run(folder, "update-ref", ref, revision)
    return Night(name, ref, revision, record)


def listing(top: Path) -> list[Night]:
    """Every recorded night, the oldest first."""
    form = "%(refname)%00%(objectname)%00%(contents:body)%01"
    entries = git.run(top, "for-each-ref", f"--format={form}", EXPS_NAMESPACE).split("\1")
    nights = []
    for ref, revision, body in (entry.strip("\n").split("\0") for entry in entries if entry.strip()):
        name = ref.rpartition("/")[2]
        if name.startswith(PREFIX):
            with contextlib.suppress(ValueError):  # not one of ours, or written by hand
                nights.append(Night(name, ref, revision, json.loads(body)))
    return sorted(nights)


def find(top: Path, name: str) -> Night:
    """The night of this name, or the only one that it begins.

    Raises:
        InputError: there is none, or there are several.
    """
    known = listing(top)
    exact = [night for night in known if night.name == name]
    nights = exact or [night for night in known if night.name.startswith(name)]
    if len(nights) != 1:
        names = ", ".join(night.name for night in (nights or known)[-5:]) or "none"
        raise InputError(f"{'several nights are' if nights else 'no night is'} called {name}; there are {names}")
    return nights[0]


def changed_parameters(top: Path, nights: list[Night]) -> dict[str, dict[str, Any]]:
    """Of every night the parameters in which the nights differ: name -> {"section.key": value}."""
    texts = {night.name: git.run(top, "show", f"{night.commit}:./params.yaml") for night in nights}
    flat = {
        name: dict(parameter_file.flat(parameter_file.parse(text.encode(), f"params.yaml of {name}")))
        for name, text in texts.items()
    }
    keys = sorted({key for values in flat.values() for key in values})
    differ = [key for key in keys if len({json.dumps(values.get(key)) for values in flat.values()}) > 1]
    return {name: {key: values.get(key) for key in differ} for name, values in flat.items()}


def apply(top: Path, name: str, force: bool = False) -> Night:
    """Bring a night back into the workspace: params.yaml, dvc.lock, code, and from the cache every output.

    Args:
        force: even where uncommitted changes get lost.

    Raises:
        InputError: no such night, a failed one, uncommitted changes, or outputs that the cache no longer has.
    """
    night = find(top, name)
    if night.record["verdict"] == FAILED:
        raise InputError(f"{night.name} failed ({night.record['reason']}); there is nothing to bring back")
    if not force and (changes := worktree.uncommitted(top)):
        raise InputError(
            f"the workspace has uncommitted changes ({changes}); commit them first, or lose them by --force"
        )
    with Repo(str(top), _wait_for_lock=True) as repo:
        try:
            repo.experiments.apply(night.commit)
        except DvcException as error:
            raise InputError(f"{night.name} can't be brought back: {' '.join(str(error).split())}") from error
    return night
