"""Files that are whole or not there, whatever happens meanwhile; the bytes of JSON and CSV; hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tasks.runtime import files
from tests.support.paths import ROOT


def test_json_is_that_of_its_content_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"b": [1, 2.5], "a": "ä"})
    assert path.read_bytes() == b'{\n "a": "\\u00e4",\n "b": [\n  1,\n  2.5\n ]\n}\n'
    files.write_json(path, {"a": "ä", "b": [1, 2.5]})
    assert path.read_bytes() == files.json_text({"b": [1, 2.5], "a": "ä"}).encode()
    assert sorted(tmp_path.iterdir()) == [path]


def test_csv(tmp_path: Path) -> None:
    table = pd.DataFrame({"a": [1, 2], "b": [1 / 3, None], "c": ["x", "ä,"]})
    files.write_csv(tmp_path / "a.csv", table, "%.3g", ("c", "b"))
    assert (tmp_path / "a.csv").read_bytes() == 'c,b\nx,0.333\n"ä,",\n'.encode()
    files.write_csv(tmp_path / "a.csv", table.head(1))
    assert (tmp_path / "a.csv").read_bytes() == b"a,b,c\n1,0.3333333333333333,x\n"
    files.write_csv(tmp_path / "a.csv", pd.DataFrame(columns=["a", "b"]))
    assert (tmp_path / "a.csv").read_bytes() == b"a,b\n"


def test_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 10**6)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 10**6).hexdigest()


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_text(path, "old")
    with pytest.raises(KeyError), files.replacing(path) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a"
    files.write_text(path, "old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "a"
    files.write_text(path, "old")
    script = (
        "import os, pathlib, signal, sys\nfrom tasks.runtime import files\n"
        f"os.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_text(pathlib.Path(sys.argv[1]), 'new')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL and path.read_text() == "old"
    files.write_text(path, "newer")
    assert path.read_text() == "newer" and len(list(tmp_path.iterdir())) == 2
    files.remove_left(path)
    assert list(tmp_path.iterdir()) == [path]


def test_it_may_lie_in_another_folder_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with files.replacing(tmp_path / "a", tmp_path / "scratch") as unfinished:
        assert unfinished.parent == tmp_path / "scratch"
        unfinished.write_text("new")
    assert (tmp_path / "a").read_text() == "new" and not list((tmp_path / "scratch").iterdir())


def test_a_file_that_is_linked_elsewhere_is_left_there(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "old")
    os.link(tmp_path / "a", tmp_path / "b")
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "b").read_text() == "old"
