"""What a flow foresees of its end, with a clock that the test sets."""

from __future__ import annotations

import pytest

from flows import foresight
from flows.foresight import Foresight
from tasks.runtime.order import Order


@pytest.fixture
def clock(monkeypatch):
    """A list with the time."""
    now = [100.0]
    monkeypatch.setattr(foresight.time, "monotonic", lambda: now[0])
    return now


def one_after_another(seconds):
    return Foresight(Order({"a": [], "b": ["a"], "c": ["b"]}, seconds, [], 1, 1))


def test_the_rest_is_scaled_by_how_the_run_goes(clock) -> None:
    seen = one_after_another({"a": 10, "b": 20, "c": 30})
    assert seen.left() == 60
    seen.begin(seen.order.next()[0])
    clock[0] += 5
    assert seen.left() == 55  # by the clock, as the log says nothing
    seen.parts["a"] = 0.1  # by the log: it is slower
    assert seen.left() == pytest.approx(59)
    clock[0] += 15
    seen.order.end("a")
    seen.end("a", ran=True)
    assert seen.pace() == 2 and seen.left() == 100
    assert seen.sentence() == "1 of 3 stages are done; about 2 min left"


def test_what_was_restored_says_nothing_of_the_pace(clock) -> None:
    seen = one_after_another({"a": 10, "b": 20, "c": 30})
    seen.begin(seen.order.next()[0])
    seen.order.end("a")
    seen.end("a", ran=False)
    assert seen.pace() == 1 and seen.left() == 50


def test_a_stage_that_takes_longer_than_before_is_never_over(clock) -> None:
    seen = one_after_another({"a": 10})
    seen.begin(seen.order.next()[0])
    clock[0] += 500
    assert seen.left() > 20


def test_without_any_record_it_says_so(clock) -> None:
    seen = one_after_another({})
    seen.begin(seen.order.next()[0])
    assert seen.sentence() == "0 of 3 stages are done, a now; no earlier run tells how long"
    seen.parts["a"] = 0.5
    assert "a 50% now" in seen.sentence()


def test_there_is_one_artifact_and_it_is_not_written_too_often(clock, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(foresight, "create_progress_artifact", lambda percent, **_: calls.append(percent) or "id")
    monkeypatch.setattr(foresight, "update_progress_artifact", lambda _, percent, **__: calls.append(percent))
    seen = one_after_another({"a": 10, "b": 20, "c": 30})
    seen.show()
    seen.begin(seen.order.next()[0])
    clock[0] += 1
    seen.show()
    clock[0] += 5
    seen.show()
    seen.show(last=True)
    assert calls == [0, pytest.approx(10), 100]
