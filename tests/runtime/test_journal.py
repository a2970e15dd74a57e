"""The journal: what is written is what is read; damage, other fingerprints, full disks; what can be interrupted."""

from __future__ import annotations

import errno
import re

import pytest
import torch

from tasks.algorithms.model import checkpoints
from tasks.runtime.journal import Journal


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "journal"


def files(folder, key=""):
    return sorted(path for path in folder.iterdir() if path.name.startswith(key))


def test_another_run_reads_what_was_saved_in_type_value_and_layout(folder):
    generator = torch.Generator().manual_seed(0)
    given = {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(4, 6, generator=generator).half().T,
        "c": torch.tensor(7.0),
        "state": generator.get_state(),
        "empty": torch.empty(0, 4),
        "expanded": torch.ones(3, 1).expand(3, 4),
    }
    values = {"step": 3, "rows": [[1, 0.1 + 0.2, float("nan")]], "name": 'ä"'}
    Journal(folder, 0).save("model.layers.0.q_proj", given, values)
    found = Journal(folder, 0).load("model.layers.0.q_proj")
    assert repr(found.values) == repr(values)
    assert found.tensors.keys() == given.keys()
    for name, tensor in given.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor)
    assert found.tensors["b"].stride() == given["b"].stride()


def test_the_last_entry_of_a_key_counts_and_one_older_is_kept(folder):
    journal = Journal(folder, 0)
    for step in range(5):
        journal.save("state", {"x": torch.tensor(step)}, step)
    assert Journal(folder, 0).load("state") == checkpoints.Entry({"x": torch.tensor(4)}, 4)
    assert len(files(folder)) == 2
    assert Journal(folder, 0).load("other") is None


def test_nothing_is_written_before_the_interval_has_passed_and_then_everything_at_once(folder):
    now = [0.0]
    journal = Journal(folder, 30, lambda: now[0])
    journal.save("a", {}, 1)
    now[0] = 29
    assert not journal.due()
    journal.save("b", {}, 1)
    assert not folder.exists() and journal.load("a").values == 1
    now[0] = 30
    assert journal.due()
    journal.save("b", {}, 2)
    assert {key: Journal(folder).load(key).values for key in "ab"} == {"a": 1, "b": 2}
    assert not journal.due()


def test_slow_writes_come_seldom(folder, monkeypatch):
    now = [0.0]
    journal = Journal(folder, 30, lambda: now[0])
    now[0] = 30
    monkeypatch.setattr(Journal, "_write", lambda *_: now.__setitem__(0, now[0] + 10))
    journal.save("a", {})
    assert now[0] == 40
    now[0] = 40 + 499
    assert not journal.due()  # 10 of 500 seconds are 2 %
    now[0] = 40 + 500
    assert journal.due()


DAMAGE = {
    "a flipped bit of a tensor": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "a flipped bit of the header": lambda data: data[:40] + bytes([data[40] ^ 4]) + data[41:],
    "cut off": lambda data: data[:-1],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_entry_is_named_and_dropped_and_the_one_before_it_is_used(folder, capsys, what):
    journal = Journal(folder, 0)
    journal.save("state", {"x": torch.arange(9.0)}, 1)
    journal.save("state", {"x": torch.arange(9.0)}, 2)
    first, last = files(folder)
    last.write_bytes(DAMAGE[what](last.read_bytes()))
    journal = Journal(folder, 0)
    assert journal.load("state").values == 1
    assert re.search(rf"{re.escape(str(last))}: this entry of the journal is damaged", capsys.readouterr().err)
    assert files(folder) == [first]
    first.write_bytes(DAMAGE[what](first.read_bytes()))
    assert journal.load("state") is None and files(folder) == []
    journal.save("state", {}, 3)
    assert Journal(folder, 0).load("state").values == 3


def test_an_unfinished_write_is_never_read(folder, monkeypatch):
    journal = Journal(folder, 0)
    journal.save("state", {}, 1)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tasks.runtime.journal.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            journal.save("state", {}, 2)
    assert len(files(folder)) == 2  # the unfinished one is there
    assert Journal(folder, 0).load("state").values == 1
    assert len(files(folder)) == 1


def test_a_disk_that_is_full_costs_the_journal_and_not_the_stage(folder, monkeypatch, capsys):
    journal = Journal(folder, 0)
    journal.save("a", {}, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tasks.runtime.journal.save_file", full)
    journal.save("b", {}, 1)
    assert "No space left on device" in capsys.readouterr().err
    assert not folder.exists() and not journal.due()
    journal.save("b", {}, 2)
    assert journal.load("b") is None and journal.load("a") is None


def test_parts_are_apart_and_are_forgotten_alone(folder):
    journal = Journal(folder, 0)
    one, other = journal.part("one"), journal.part("other").part("inner")
    for saved, value in ((journal, 0), (one, 1), (other, 2)):
        saved.save("key", {}, value)
    again = Journal(folder, 0)
    assert [saved.load("key").values for saved in (again, again.part("one"))] == [0, 1]
    again.part("one").forget()
    assert again.part("one").load("key") is None
    assert Journal(folder, 0).part("one").load("key").values == 1  # until what replaces it is on the disk
    again.save("instead", {})
    again = Journal(folder, 0)
    assert again.part("one").load("key") is None
    assert again.part("other").part("inner").load("key").values == 2
    with pytest.raises(ValueError):
        journal.part("a/b")


def test_a_key_that_is_no_file_name_is_refused(folder):
    with pytest.raises(ValueError, match="a/b"):
        Journal(folder, 0).save("a/b", {})


def test_nothing_keeps_nothing():
    checkpoints.NOTHING.part("x").save("key", {}, 1)
    assert checkpoints.NOTHING.load("key") is None and not checkpoints.NOTHING.due()


def test_it_knows_whether_it_goes_on(tmp_path):
    first = Journal(tmp_path / "kept", interval=0)
    first.save("key", {}, 1)
    assert not first.goes_on and Journal(tmp_path / "kept").goes_on
