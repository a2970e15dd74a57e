"""Which stage starts next: by hand on small graphs, and against a scheduler by events written another way."""

from __future__ import annotations

import random

import pytest

from tasks.runtime.order import Order


def made(upstream, seconds=None, alone=(), workers=2, cores=2):
    return Order(upstream, seconds or {}, alone, workers, cores)


def test_the_longest_path_goes_first_and_a_lane_has_its_share_of_the_cores() -> None:
    graph = {"short": [], "long": [], "a": [], "end": ["short", "long", "a"]}
    order = made(graph, {"short": 1, "long": 9, "a": 2, "end": 1}, cores=4)
    assert [order.next(), order.next(), order.next()] == [("long", 2), ("a", 2), None]
    order.end("a")
    assert order.next() == ("short", 2) and order.next() is None
    order.end("long")
    order.end("short")
    assert order.next() == ("end", 4)  # nothing else runs or is ready: all cores


def test_the_path_counts_and_not_the_stage() -> None:
    graph = {"first": [], "after": ["first"], "longer": []}
    order = made(graph, {"first": 1, "after": 9, "longer": 5}, workers=1)
    assert order.next()[0] == "first"


def test_what_is_done_already_is_not_waited_for() -> None:
    assert made({"b": ["a"]}).next() == ("b", 2)


def test_a_stage_that_measures_time_has_no_neighbour() -> None:
    order = made({"measure": [], "x": [], "y": []}, {"measure": 100, "x": 1, "y": 1}, alone=["measure"])
    assert {order.next()[0], order.next()[0]} == {"x", "y"}
    order.end("x")
    assert order.next() is None  # y still runs
    order.end("y")
    assert order.next() == ("measure", 2)


def test_nothing_joins_a_stage_that_measures_time() -> None:
    order = made({"x": [], "measure": ["x"], "late": ["x"], "after": ["measure"]}, alone=["measure", "late"])
    order.next()
    order.end("x")
    assert order.next() == ("measure", 2)  # the longer path of the two
    assert order.ready() == ["late"] and order.next() is None


def test_one_lane_gets_all_cores() -> None:
    order = made({"a": [], "b": []}, workers=1, cores=3)
    assert order.next()[1] == 3 and order.next() is None


def test_the_end_is_foreseen_as_it_then_comes() -> None:
    seconds = {"a": 4.0, "b": 2.0, "c": 3.0, "m": 5.0, "end": 1.0}
    graph = {"a": [], "b": [], "c": ["b"], "m": ["b"], "end": ["a", "c", "m"]}
    order = made(graph, seconds, alone=["m"])
    # a and b; c from 2 to 5 beside a; m alone from 5 to 10; end until 11
    assert order.left({}) == 11
    assert order.left({}, pace=3) == 33
    order.next(), order.next()
    assert order.left({"a": 0.5, "b": 1.0}) == 3 + 5 + 1  # b is over: c takes 3 beside a's 2
    assert order.running == {"a", "b"} and set(order.waiting) == {"c", "m", "end"}  # looking ahead changes nothing


def test_a_stage_that_never_ran_counts_as_the_others_do_on_average() -> None:
    order = made({"a": [], "b": [], "new": []}, {"a": 2, "b": 4}, workers=1)
    assert order.left({}) == 2 + 4 + 3 and order.known
    assert not made({"new": []}).known


@pytest.mark.parametrize("seed", range(20))
def test_no_stage_starts_before_its_inputs_and_none_is_forgotten(seed) -> None:
    draw = random.Random(seed)
    names = [f"s{i}" for i in range(12)]
    graph = {name: draw.sample(names[:i], draw.randint(0, min(i, 3))) for i, name in enumerate(names)}
    alone = draw.sample(names, 2)
    order = made(graph, {name: draw.random() for name in names}, alone, workers=draw.randint(1, 4), cores=8)
    done: list[str] = []
    while len(done) < len(names):
        while started := order.next():
            assert set(graph[started[0]]) <= set(done)
        assert 1 <= len(order.running) <= order.workers
        assert len(order.running) == 1 or not order.running & set(alone)
        ended = draw.choice(sorted(order.running))
        order.end(ended)
        done.append(ended)
    assert sorted(done) == sorted(names)
