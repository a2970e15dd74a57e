"""Placement against a brute-force search over byte counts, and the invariants of memories."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from tasks.algorithms.device_fit.placement import ITEMS, Tier, place

ALL = frozenset(ITEMS)


def tier(name: str, size: int, bandwidth: int = 100, holds: frozenset[str] = ALL, reserved: int = 0) -> Tier:
    return Tier(name, size, reserved, bandwidth, holds)


def sizes(**given: int) -> dict[str, int]:
    return dict.fromkeys(ITEMS, 0) | given


def best(tiers: list[Tier], wanted: dict[str, int]) -> int:
    """Most bytes that find room, by the maximum flow that a search over augmenting paths finds, one byte at a time."""
    room = [one.bytes for one in tiers]
    flow = {(item, index): 0 for item in wanted for index in range(len(tiers))}
    left = dict(wanted)

    def augment(item: str, seen: set[int]) -> bool:
        for index, one in enumerate(tiers):
            if item not in one.holds or index in seen:
                continue
            seen.add(index)
            if room[index]:
                room[index] -= 1
                flow[item, index] += 1
                return True
            for other in wanted:
                if flow[other, index] and augment(other, seen):
                    flow[other, index] -= 1
                    flow[item, index] += 1
                    return True
        return False

    placed = 0
    for item in wanted:
        while left[item] and augment(item, set()):
            left[item] -= 1
            placed += 1
    return placed


def cases(count: int):
    generator = random.Random(0)
    for _ in range(count):
        tiers = [
            tier(str(i), generator.randint(0, 9), 100 - i, frozenset(generator.sample(ITEMS, generator.randint(1, 5))))
            for i in range(generator.randint(1, 4))
        ]
        tiers.append(tier("any", generator.randint(0, 6), 1))
        yield tiers, {item: generator.randint(0, 7) for item in ITEMS} | {"scratch": 1}


def test_the_bytes_over_are_those_of_the_maximum_flow() -> None:
    overs = []
    for tiers, wanted in cases(300):
        found = place(tiers, wanted, 0.0)
        assert found.over == sum(wanted.values()) - best(tiers, wanted)
        overs.append(found.over)
    assert overs.count(0) > 50 and sum(map(bool, overs)) > 50


def test_every_byte_is_placed_once_where_it_may_lie_and_within_the_room() -> None:
    for tiers, wanted in cases(300):
        found = place(tiers, wanted, 0.0)
        for item in ITEMS:
            assert sum(held.get(item, 0) for held in found.held) == wanted[item]
        beyond = 0
        for one, held in zip(tiers, found.held, strict=True):
            assert set(held) <= one.holds
            beyond += max(0, sum(held.values()) - one.bytes)
        assert beyond == found.over


def test_a_placement_that_fits_reads_fastest() -> None:
    checked = 0
    for tiers, wanted in cases(400):
        fast, slow = tiers[0], tiers[-1]
        wanted = wanted | {"scratch": 0, "activations": 0, "lookup": 1}
        found = place([fast, slow], wanted, 0.0)
        if found.over:
            continue
        others = []
        for kv, weights in itertools.product(range(wanted["kv_cache"] + 1), range(wanted["weights"] + 1)):
            first = {"kv_cache": kv, "weights": weights}
            if all(not n or item in fast.holds for item, n in first.items()) and kv + weights <= fast.bytes:
                lookup = fast.bytes - kv - weights if "lookup" in fast.holds else 0
                rest = wanted["kv_cache"] + wanted["weights"] - kv - weights
                if rest + 1 - min(1, lookup) <= slow.bytes:
                    others.append((kv + weights) / fast.bandwidth + rest / slow.bandwidth)
        read = [sum(held.get(item, 0) for item in ("kv_cache", "weights")) for held in found.held]
        assert read[0] / fast.bandwidth + read[1] / slow.bandwidth == pytest.approx(min(others))
        checked += 1
    assert checked > 100


def test_more_memory_never_leaves_more_over() -> None:
    for tiers, wanted in cases(200):
        before = place(tiers, wanted, 0.0).over
        for index in range(len(tiers)):
            larger = [replace(one, bytes=one.bytes + 3) if i == index else one for i, one in enumerate(tiers)]
            assert place(larger, wanted, 0.0).over <= before


def test_headroom_is_exact() -> None:
    for tiers, wanted in cases(200):
        found = place(tiers, wanted, 0.0)
        if found.over:
            continue
        item = found.limiting[0]
        grown = place(tiers, wanted | {item: wanted[item] + found.headroom}, 0.0)
        assert grown.over == 0
        assert place(tiers, wanted | {item: wanted[item] + found.headroom + 1}, 0.0).over == 1


def test_a_full_tier_spills_into_the_next_and_keeps_room_for_what_has_no_other() -> None:
    fast, slow = tier("fast", 100, 10), tier("slow", 1000, 1, frozenset({"weights", "lookup"}))
    found = place([fast, slow], sizes(scratch=5, kv_cache=30, weights=500), 0.0)
    assert found.held == ({"scratch": 5, "kv_cache": 30, "weights": 65}, {"weights": 435})


def test_the_limiting_items_and_what_is_over() -> None:
    rom = tier("rom", 100, 10, frozenset({"weights", "lookup"}))
    ram = tier("ram", 50, 5, frozenset({"kv_cache", "activations", "scratch"}))
    found = place([rom, ram], sizes(weights=120, kv_cache=20, scratch=5), 0.0)
    assert (found.over, found.limiting, found.tiers) == (20, ("weights",), (0,))
    found = place([rom, ram], sizes(weights=50, kv_cache=40, scratch=5), 0.0)
    assert (found.over, found.headroom, found.tiers) == (0, 5, (1,))
    assert found.limiting == ("kv_cache", "scratch")


@pytest.mark.parametrize(("margin", "usable"), [(0.1, 900), (0.0, 1000), (0.3, 700)])
def test_usable_is_exact_where_floats_are_not(margin: float, usable: int) -> None:
    assert tier("m", 1000).usable(margin) == usable
    assert tier("m", 4 * 2**20).usable(0.1) == 4 * 2**20 * 9 // 10
    assert tier("m", 1100, reserved=100).usable(margin) == usable
