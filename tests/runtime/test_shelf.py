"""What stages share through scratch: whole or not there, bounded, and of the state that its name tells."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dvc.repo import Repo

from tasks.runtime import shelf as shelves
from tasks.runtime.shelf import Shelf
from tasks.runtime.stage import SHELVES, Stage
from tests.support.toy_stages import Toy

STATES = {"states": torch.arange(12, dtype=torch.float32).reshape(3, 4)}


def held(shelf: Shelf) -> list[Path]:
    return sorted(shelf.folder.iterdir()) if shelf.folder.exists() else []


def test_an_entry_is_what_was_left(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    assert shelf.load("step-1") is None
    shelf.save("step-1", STATES)
    shelf.save("step-12", {"ids": torch.tensor([1, 2], dtype=torch.int32)})
    found = Shelf(tmp_path / "shelf").load("step-1").tensors
    assert found.keys() == STATES.keys() and found["states"].equal(STATES["states"])
    assert Shelf(tmp_path / "shelf").load("step-12").tensors["ids"].dtype == torch.int32
    Shelf(tmp_path / "shelf").save("step-1", STATES)  # another stage, at the same time
    assert len(held(shelf)) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_entry_is_none(tmp_path: Path, damage: str) -> None:
    shelf = Shelf(tmp_path)
    shelf.save("step-1", STATES)
    (path,) = held(shelf)
    content = path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes({"cut": content[:-5], "flipped": flipped, "empty": b""}[damage])
    assert shelf.load("step-1") is None
    shelf.save("step-1", STATES)
    assert shelf.load("step-1").tensors["states"].equal(STATES["states"])


def test_it_takes_no_more_than_its_room(tmp_path: Path, monkeypatch) -> None:
    shelf = Shelf(tmp_path)
    shelf.save("first", STATES)
    (path,) = held(shelf)
    for room, free in ((2 * path.stat().st_size - 1, 10**9), (10**9, 20 * path.stat().st_size - 1)):
        monkeypatch.setattr(shelves, "ROOM", room)
        monkeypatch.setattr(shelves.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        shelf.save("other", STATES)
        assert held(shelf) == [path]
    monkeypatch.setattr(shelves.shutil, "disk_usage", lambda _: SimpleNamespace(free=20 * path.stat().st_size))
    shelf.save("other", STATES)
    assert len(held(shelf)) == 2


def test_one_computes_while_the_others_wait(tmp_path: Path) -> None:
    computed: list[int] = []
    begun, end = threading.Event(), threading.Event()

    def slowly() -> dict[str, torch.Tensor]:
        computed.append(1)
        begun.set()
        assert end.wait(60)
        return STATES

    found: list[torch.Tensor] = []
    shelves_ = [Shelf(tmp_path / "shelf") for _ in range(3)]
    threads = [threading.Thread(target=lambda s=s: found.append(s.once("all", slowly)["states"])) for s in shelves_]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()
    assert not found
    end.set()
    for thread in threads:
        thread.join(60)
    assert computed == [1] and len(found) == 3 and all(each.equal(STATES["states"]) for each in found)
    (tmp_path / "file").write_text("")
    assert Shelf(tmp_path / "file/shelf").once("all", lambda: STATES) is STATES  # nothing can be written


def test_what_cannot_be_written_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shelf = Shelf(tmp_path / "file/shelf")
    shelf.save("step-1", STATES)
    assert shelf.load("step-1") is None


def test_after_an_edit_of_an_input_nothing_is_added(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, pure=lambda: False)
    shelf.save("step-1", STATES)
    assert held(shelf) == []


def test_its_name_tells_inputs_code_and_what_is_given(toy: Toy, run_here) -> None:
    other = Path("other/text.txt")

    def opened(**given: int) -> Shelf:
        return Stage("toy", Repo()).shelf("sums", "toy", [other], **given)

    first = opened(seed=1)
    first.save("step-1", STATES)
    assert first.folder.parent == SHELVES / "sums" and opened(seed=1).folder == first.folder
    assert opened(seed=1).load("step-1") is not None
    assert opened(seed=2).folder != first.folder and not first.folder.exists()  # of its purpose there is one
    beside = Stage("toy", Repo()).shelf("means", "toy", [other])
    beside.save("step-1", STATES)
    again = opened(seed=1)
    again.save("step-1", STATES)
    other.write_text("edited")
    again.save("step-2", STATES)  # nobody knows what it was made from
    assert len(held(again)) == 1
    assert opened(seed=1).folder != first.folder and not first.folder.exists() and beside.folder.exists()


def test_what_a_killed_process_was_writing_is_removed_and_what_another_one_writes_is_not(toy: Toy, run_here) -> None:
    def opened() -> Shelf:
        return Stage("toy", Repo()).shelf("sums", "toy", [Path("other/text.txt")])

    shelf = opened()
    shelf.save("step-1", STATES)
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead, alive = (shelf.folder / f".step-2.ab.safetensors.{pid}.tmp" for pid in (gone.pid, os.getppid()))
    for path in (dead, alive):
        path.write_bytes(b"half")
    assert opened().load("step-1") is not None
    assert not dead.exists() and alive.exists()
