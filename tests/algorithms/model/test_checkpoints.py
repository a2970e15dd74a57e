"""An interrupted stage that goes on gives the bytes of an uninterrupted one, wherever it was interrupted."""

from __future__ import annotations

import functools
import importlib
import itertools
import random

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from tasks.algorithms.model import checkpoints
from tasks.runtime.journal import Journal
from tests.benchmarks.chain import CachedStage, Chain
from tests.benchmarks.kills import Killed as KilledProject
from tests.benchmarks.kills import end
from tests.support import fake_card
from tests.support.project import QUICK, Project, short_corpora

TRAINED = {"qad.enabled": True, "qad.steps": 4, "qad.batch": 2, "qad.length": 32}
VARIANTS = {
    "importance": {"importance.method": "compound"},
    "lora": {},
    "lora with dropout, EoRA start and hidden loss": {
        "lora.dropout": 0.1,
        "lora.start": "eora",
        "lora.distillation.hidden": 0.5,
    },
    "lora by block": {"lora.method": "block_reconstruction"},
    "gptq": {},
    "gptq within a budget": {"gptq.budget_bytes": 60_000},
    "gptq with joint masks": {"gptq.joint": {"keep": 2, "of": 4}, "wanda.enabled": False},
    "gptq in descending order": {"gptq.act_order": "descending", "gptq.symmetric": False},
    "eora": {},
    "eora within a budget": {"eora.rank": None, "eora.budget_bytes": 6000},
    "baseline_lora": {},
    "sensitivity": {},
    "baseline": {},
    "baseline with trained codes": TRAINED,
    "qad": TRAINED,
    "evaluate@package": {},
}
"""What is interrupted -> its parameters; the stage is the first word."""
FAST = ("importance", "lora", "lora by block", "evaluate@package")
SLOW = pytest.mark.slow


class Killed(Exception):
    """In the place of a signal. An Exception: gptqmodel's threads end the process at any other."""


class Short(Journal):
    """A journal whose run ends after some writes. With `every` > 1 only each so many-th call of the clock is due.

    Attributes:
        left: writes until then.
        written: entries that were written.
    """

    def __init__(self, folder, left=10**9, every=0) -> None:
        self.left, self.written = left, 0
        super().__init__(folder, every, itertools.count().__next__)

    def flush(self) -> None:
        super().flush()
        self.next = self.clock() + self.interval

    def _write(self, *entry) -> None:
        if self.left == 0:
            raise Killed
        super()._write(*entry)
        self.left -= 1
        self.written += 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("resume")
    return Chain(tiny_llama(folder / "model"), short_corpora(folder), folder / "cache", QUICK)


class Work:
    """One stage with these parameters, to be run again and again.

    Attributes:
        undisturbed: what it writes without a journal, once for all tests.
    """

    known = {}

    def __init__(self, chain, what, folder) -> None:
        self.chain = chain.variant(VARIANTS[what])
        self.stage = self.chain.stages[what.split()[0]]
        self.places = {dep: self.chain._place(self.stage, dep) for dep in self.stage.deps}
        self.folder = folder
        if what not in self.known:
            self.known[what] = self("undisturbed")
        self.undisturbed = self.known[what]

    def __call__(self, name, journal=checkpoints.NOTHING):
        """The files that it wrote."""
        out = self.folder / name
        stage = CachedStage(self.stage, self.chain.everything, self.places, out)
        stage.journal = journal
        importlib.import_module(f"tasks.{self.stage.name}").run(stage)
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", [what if what in FAST else pytest.param(what, marks=SLOW) for what in VARIANTS])
def test_interrupted_anywhere_gives_the_same_bytes(tiny, what, tmp_path):
    work = Work(tiny, what, tmp_path)
    journal = Short(tmp_path / "journal")
    assert work("journaled", journal) == work.undisturbed
    writes = journal.written
    assert writes >= 3
    for left in sorted({1, writes // 2, writes}):
        folder = tmp_path / "journal"  # of the whole run
        if left < writes:
            folder = tmp_path / f"journal{left}"
            with pytest.raises(Killed):
                work(f"killed{left}", Short(folder, left))
        again = Short(folder)
        assert work(f"resumed{left}", again) == work.undisturbed
        if not what.startswith("baseline"):  # which quantises its last round again for its files
            assert again.written <= writes - left  # what was written is not done again


@pytest.mark.parametrize("what", ["importance", "lora", "lora by block", "eora within a budget"])
def test_what_was_saved_of_a_card_goes_back_to_it(tiny, what, tmp_path):
    with sdpa_kernel(SDPBackend.MATH):  # as it is on a card
        work = Work(tiny, what, tmp_path)
        expected = work("on the CPU")
        work.chain = work.chain.variant({"device": "cuda"})
        with fake_card.installed():
            with pytest.raises(Killed):
                work("killed", Short(tmp_path / "journal", left=2))
            assert work("resumed", Short(tmp_path / "journal")) == expected


@SLOW
@pytest.mark.parametrize("what", ["lora by block", "gptq", "eora", "baseline"])
def test_entries_that_wait_for_the_next_write_are_those_of_their_time(tiny, what, tmp_path):
    """Nothing that was handed over changes until it is written."""
    work = Work(tiny, what, tmp_path)
    with pytest.raises(Killed):
        work("killed", Short(tmp_path / "journal", left=2, every=3))
    assert work("resumed", Short(tmp_path / "journal", every=3)) == work.undisturbed


@SLOW
@pytest.mark.parametrize("what", ["lora", "gptq", "eora"])
def test_killed_again_and_again_it_still_ends(tiny, what, tmp_path):
    work = Work(tiny, what, tmp_path)
    for attempt in range(100):
        try:
            assert work(f"run{attempt}", Short(tmp_path / "journal", left=1)) == work.undisturbed
            break
        except Killed:
            pass
    assert attempt >= 2


@pytest.mark.parametrize("what", ["lora", *(pytest.param(what, marks=SLOW) for what in ("gptq", "eora", "baseline"))])
def test_a_damaged_entry_is_named_and_its_work_done_again(tiny, what, tmp_path, capsys):
    work = Work(tiny, what, tmp_path)
    with pytest.raises(Killed):
        work("killed", Short(tmp_path / "journal", left=2))
    for path in (tmp_path / "journal").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
    assert work("resumed", Journal(tmp_path / "journal", 0)) == work.undisturbed
    assert "this entry of the journal is damaged" in capsys.readouterr().err


@SLOW
def test_sigkill_at_random_moments_costs_neither_bytes_nor_the_journal(tmp_path, tiny_llama):
    project = Project(tmp_path / "project", tiny_llama(tmp_path / "model"))
    project.change({"lora.steps": 120, "baseline_lora.enabled": False})
    killed = KilledProject(project, interval=0, target="baseline")
    generator = random.Random(0)
    for victim, stage in (("group", "lora"), ("dvc", "baseline"), ("stage", "lora")):
        killed.make_stale(stage)
        kill = functools.partial(end, victim, stage=stage)
        assert killed.run(stage, kill=kill, after=generator.uniform(0, 0.5), journaled=True).killed
        assert list((project.path / "data/.scratch/journal" / stage).glob("*/*.safetensors"))
        assert list(killed.faults_after_kill(stage)) == []
        following = killed.run(stage)
        assert following.status == 0 and "goes on with what an interrupted run has left" in following.output
        assert list(killed.faults()) == []
    assert not list((project.path / "data/.scratch/journal").iterdir())
