"""Which frames and domains train, calibration and test may use: no frame is in two of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tasks.built_in_model.frames import is_demonstration

SPLIT_NAMES = ("train", "calibration", "test")
_SENTENCE_LISTS = ("rationale", "verification", "narrative")


@dataclass(frozen=True)
class Split:
    """The parsed frames and domains that one split may use; shared domains carry only this split's sentences."""

    name: str
    domains: tuple[dict, ...]
    frames: tuple[dict, ...]


def load(path: Path) -> Any:
    """The parsed domains or frames of data/grammar."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)


def _split_frames(frames: Sequence[dict], rng: random.Random) -> dict[str, list[dict]]:
    """Partition frames kind by kind, about 80 / 8 / 12 per cent, with at least one of each kind in each split."""
    result: dict[str, list[dict]] = {name: [] for name in SPLIT_NAMES}
    for kind in sorted({frame["kind"] for frame in frames}):
        members = sorted((frame for frame in frames if frame["kind"] == kind), key=lambda frame: frame["id"])
        free = [frame for frame in members if not is_demonstration(frame)]
        result["train"] += [frame for frame in members if is_demonstration(frame)]
        rng.shuffle(free)
        calibration = max(1, round(0.08 * len(members)))
        test = calibration + max(2 if len(members) >= 10 else 1, round(0.12 * len(members)))
        result["calibration"] += free[:calibration]
        result["test"] += free[calibration:test]
        result["train"] += free[test:]
    return result


def _share(domain: dict, held_out: bool) -> dict:
    """Keep every fourth sentence of a shared domain for its evaluation split and the others for training."""
    part = dict(domain)
    for key in _SENTENCE_LISTS:
        part[key] = [text for index, text in enumerate(domain[key]) if (index % 4 == 3) == held_out]
    return part


def split(domains: list[dict], frames: list[dict], seed: int) -> dict[str, Split]:
    """Partition frames and domains into "train", "calibration" and "test".

    No frame is in two splits. Calibration and test each get two domains that training never sees and two that it
    shares with training, of which the rationale, verification and narrative sentences are divided.
    """
    if len(domains) < 8:
        raise ValueError("at least 8 domains are needed: 4 are held out and 4 more are shared")
    rng = random.Random(seed)
    by_split = _split_frames(frames, rng)
    order = sorted(domains, key=lambda domain: domain["code"])
    rng.shuffle(order)
    held_calibration, held_test, shared_calibration, shared_test = (order[start : start + 2] for start in (0, 2, 4, 6))
    shared = shared_calibration + shared_test
    chosen = {
        "train": [_share(domain, False) for domain in shared] + order[8:],
        "calibration": held_calibration + [_share(domain, True) for domain in shared_calibration],
        "test": held_test + [_share(domain, True) for domain in shared_test],
    }
    return {name: Split(name, tuple(chosen[name]), tuple(by_split[name])) for name in SPLIT_NAMES}
