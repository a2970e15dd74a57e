"""What git checks out has the bytes that were committed, whatever core.autocrlf says: DVC hashes them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.support.paths import ROOT


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, text=True, capture_output=True).stdout


def test_a_clone_on_a_machine_that_converts_line_ends_has_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (".gitattributes", "dvc.yaml", "dvc.lock", "params.yaml", "tasks/fetch.py"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    (source / "mixed.txt").write_bytes(b"one\r\ntwo\n")
    git(tmp_path, "init", "-q", "source")
    git(source, "-c", "core.autocrlf=true", "add", "-A")
    git(source, "commit", "-qm", "start")
    git(tmp_path, "-c", "core.autocrlf=true", "clone", "-q", "source", "clone")
    names = git(source, "ls-files").splitlines()
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "clone" / name).read_bytes() == (source / name).read_bytes(), name
