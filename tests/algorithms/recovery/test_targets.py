"""The teacher's states of two trainings: each step's computed once, and always those of its own windows."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.model import head
from tasks.algorithms.model.checkpoints import Entry
from tasks.algorithms.recovery import distillation, targets
from tasks.algorithms.recovery.targets import AHEAD, Targets
from tasks.models import streamed_folder
from tests.support.pruned_llama import llama

STEPS = 20


class Memory(dict):
    """A store that both have."""

    def load(self, key):
        return Entry(self[key], None) if key in self else None

    def save(self, key, tensors):
        self[key] = tensors


@pytest.fixture(scope="module")
def teacher():
    return llama(blocks=2)


@pytest.fixture
def asked(monkeypatch):
    """The windows that the teacher was asked about."""
    found, states = [], head.states

    def count(model, ids):
        found.append(tuple(ids.flatten().tolist()))
        return states(model, ids)

    monkeypatch.setattr(head, "states", count)
    return found


def windows(step):
    return torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))


def expected(teacher, step):
    with torch.no_grad():
        return teacher.model(input_ids=windows(step), use_cache=False).last_hidden_state.flatten(0, 1)


ORDERS = {
    "in step": [turn for step in range(STEPS) for turn in (0, 1)],
    "one is late": [0] * 6 + [turn for step in range(STEPS - 6) for turn in (0, 1)] + [1] * 6,
    "one after the other": [0] * STEPS + [1] * STEPS,
    "now the one, now the other": [0, 0, 0, 1, 1, 1] * 6 + [0, 0, 1, 1],
}


@pytest.mark.parametrize("order", ORDERS)
def test_of_two_trainings_each_target_is_computed_once(teacher, asked, order) -> None:
    shared = Memory()
    both = [Targets(teacher, windows, STEPS, shared, turn) for turn in (0, 1)]
    steps = [0, 0]
    for turn in ORDERS[order]:
        steps[turn] += 1
        assert both[turn].of(steps[turn]).said.states.equal(expected(teacher, steps[turn]))
    assert steps == [STEPS, STEPS]
    assert len(asked) == len(set(asked)) == STEPS
    assert not both[0].made and not both[1].made


def test_alone_it_computes_each_and_no_more_than_some_steps_ahead(teacher, asked) -> None:
    for shared in ({}, {"shared": Memory()}):
        asked.clear()
        targets = Targets(teacher, windows, STEPS, turn=1, **shared)
        for step in range(1, STEPS + 1):
            assert targets.of(step).said.states.equal(expected(teacher, step))
            assert len(asked) <= step + (AHEAD if shared else 0)
        assert len(asked) == STEPS


@pytest.fixture
def streamed(teacher, tmp_path):
    """The teacher with its blocks on the disk, and how often its first one was opened."""
    teacher.save_pretrained(tmp_path)
    model, opened = streamed_folder.open_dense(tmp_path), []
    block = model.model.layers[0]
    stored = block.stored_weights
    block.stored_weights = lambda each: opened.append(1) or stored(each)
    return model, opened


def test_a_teacher_on_the_disk_is_opened_for_many_steps_at_once(teacher, streamed, monkeypatch) -> None:
    model, opened = streamed
    monkeypatch.setattr(targets, "HELD", 7 * 4 * 16 * 32)  # of as many steps
    blocks = list(model.model.layers)
    found = Targets(model, windows, STEPS)
    for step in range(1, STEPS + 1):
        assert found.of(step).said.states.equal(expected(teacher, step))
    assert len(opened) == 3  # of 8, 8 and 4 steps
    found = Targets(model, windows, STEPS, blocks=blocks)
    for step in range(1, STEPS + 1):
        target = found.of(step)
        with torch.no_grad(), distillation.outputs_of(teacher.model.layers) as outputs:
            assert target.said.states.equal(head.states(teacher, windows(step)))
        assert all(ours.equal(theirs) for ours, (theirs,) in zip(target.outputs, outputs, strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_two_trainings_share_the_targets_of_a_teacher_on_the_disk(teacher, streamed, order) -> None:
    model, opened = streamed
    shared = Memory()
    both = [Targets(model, windows, STEPS, shared, turn) for turn in (0, 1)]
    steps = [0, 0]
    for turn in ORDERS[order]:
        steps[turn] += 1
        assert both[turn].of(steps[turn]).said.states.equal(expected(teacher, steps[turn]))
    assert len(shared) == STEPS and not both[0].made and not both[1].made
    assert len(opened) <= 6


def test_from_the_middle_on(teacher, asked) -> None:
    """A training that goes on where it was killed."""
    targets = Targets(teacher, windows, STEPS, Memory())
    for step in range(11, STEPS + 1):
        assert targets.of(step).said.states.equal(expected(teacher, step))
    assert len(asked) == STEPS - 10
