"""Place the bytes of a model in the memories of a device: an exact answer, by Hall's theorem for flows.

What is placed comes in five items (`ITEMS`); an item may be split over memories, down to rows of a matrix. They all
find room exactly if no set of items is larger than the memories that may hold any of it; and by the same count, the
bytes that find none are those of the set that exceeds its memories by most (the deficiency version of Hall's theorem,
here for at most 32 sets). So more memory can only help. Of all placements with the fewest bytes over, the one that
fills the first memories first is taken, in the order of `ITEMS` within one; memories come in the order of their
bandwidth, so that it is also the one that reads fastest.

What it does not do: no fragmentation, no alignment, no moving of anything while the model runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

ITEMS = ("scratch", "activations", "kv_cache", "weights", "lookup")
"""The items that are placed. lookup: metadata, and tables of which a token reads one row; it lies where weights may."""


@dataclass(frozen=True)
class Tier:
    """One memory: sizes in bytes, bandwidth in bytes per second; `holds` is a subset of ITEMS."""

    name: str
    bytes: int
    reserved: int
    bandwidth: int
    holds: frozenset[str]

    def usable(self, margin: float) -> int:
        """Return the whole bytes left after the reserve and the safety margin (0.1 keeps a tenth of the rest free)."""
        return int((self.bytes - self.reserved) * (1 - Fraction(str(margin))))


@dataclass(frozen=True)
class Placement:
    """The bytes of each item in each memory.

    Attributes:
        held: per tier, item -> bytes; what found no room is counted where it would go last.
        over: bytes that found no room.
        limiting: the items that exceed their tiers by most, or fill them to the largest share; the largest comes first.
        tiers: the indices of the tiers that may hold those.
        headroom: bytes by which the first of `limiting` may still grow.
    """

    held: tuple[dict[str, int], ...]
    over: int
    limiting: tuple[str, ...]
    tiers: tuple[int, ...]
    headroom: int


def place(tiers: Sequence[Tier], sizes: Mapping[str, int], margin: float) -> Placement:
    """Distribute `sizes` (item -> bytes) over the tiers, the preferred ones first.

    Every item needs a tier that may hold it.
    """
    room = [tier.usable(margin) for tier in tiers]
    left = {item: sizes[item] for item in ITEMS if sizes[item]}
    limiting = tuple(sorted(_limiting(tiers, left, room), key=lambda item: -left[item]))
    # Hall: all finds room if no set of items exceeds its tiers; else the largest excess is what finds none
    over = max(0, _excess(tiers, left, room, limiting))
    # the item can grow until the first set with it is full
    headroom = max(0, min(-_excess(tiers, left, room, group) for group in _sets(left) if limiting[0] in group))
    reached = _reach(tiers, limiting)
    held: list[dict[str, int]] = [{} for _ in tiers]
    for index, tier in enumerate(tiers):
        for item in [name for name in left if name in tier.holds]:
            size = min(left[item], room[index], _spare(tiers, left, room, item, index, over))
            if size:
                held[index][item] = size
                left[item] -= size
                room[index] -= size
    for item, size in left.items():
        if size:  # it found no room: it is shown in the last tier that may hold it
            last = max(index for index, tier in enumerate(tiers) if item in tier.holds)
            held[last][item] = held[last].get(item, 0) + size
    return Placement(tuple(held), over, limiting, reached, headroom)


def _limiting(tiers: Sequence[Tier], left: Mapping[str, int], room: Sequence[int]) -> tuple[str, ...]:
    """Find the set of items that is over by most; when none is, the one that fills its tiers to the largest share."""
    sets = list(_sets(left))
    worst = max(sets, key=lambda group: (_excess(tiers, left, room, group), -len(group)))
    if _excess(tiers, left, room, worst) > 0:
        return worst

    def share(group: tuple[str, ...]) -> tuple[Fraction, int]:
        capacity = sum(room[index] for index in _reach(tiers, group))
        return Fraction(sum(left[item] for item in group), max(1, capacity)), -len(group)

    return max(sets, key=share)


def _spare(tiers: Sequence[Tier], left: Mapping[str, int], room: Sequence[int], item: str, tier: int, over: int) -> int:
    """Count the bytes of a tier that `item` may take without leaving more than `over` bytes of the others outside."""
    # a byte of `item` in this tier takes room from the sets without `item` that reach it; those with it lose both alike
    others = (group for group in _sets(left) if item not in group and tier in _reach(tiers, group))
    return min((over - _excess(tiers, left, room, group) for group in others), default=room[tier])


def _excess(tiers: Sequence[Tier], left: Mapping[str, int], room: Sequence[int], group: tuple[str, ...]) -> int:
    # bytes of the set less the room that its items reach, the deficiency of Hall's condition
    return sum(left[item] for item in group) - sum(room[index] for index in _reach(tiers, group))


def _reach(tiers: Sequence[Tier], group: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(index for index, tier in enumerate(tiers) if tier.holds.intersection(group))


def _sets(items: Mapping[str, int]) -> itertools.chain[tuple[str, ...]]:
    """Go through all sets of items but the empty one, small ones first."""
    names = tuple(items)
    return itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, len(names) + 1))
