"""Thousands of damaged entropy codes: each is refused with one sentence, or gives as many digits below the base.

python -m tests.benchmarks.damaged_codes            20,000 of them, and how long the longest took
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np

from tasks.algorithms import entropy_coding
from tasks.algorithms.errors import InputError

BASES = (2, 6, 16, 30, 70, 256, 12870, 2**16, 2**32)
COUNTS = (1, 5, 100, 3000)
SLOW = 1.0
"""Seconds that no code takes."""


def damage(chance: random.Random, code: bytes) -> bytes:
    """Flip bits, cut, lengthen, exchange a piece, or put random bytes in its place."""
    data, how = bytearray(code), chance.randrange(5)
    if how == 0 and data:
        for _ in range(chance.choice([1, 1, 4])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == 1:
        del data[chance.randrange(len(data) + 1) :]
    elif how == 2:
        data += chance.randbytes(chance.choice([1, 4, 50]))
    elif how == 3:
        at = chance.randrange(len(data) + 1)
        data[at : at + 4] = chance.choice([b"", b"\x00" * 4, b"\xff" * 4, chance.randbytes(4)])
    else:
        data = bytearray(chance.randbytes(len(data)))
    return bytes(data)


def fuzz(count: int, seed: int) -> dict[str, int]:
    """Decode `count` damaged codes: what became of them."""
    chance, numbers = random.Random(seed), np.random.default_rng(seed)
    found, slowest = {"refused": 0, "digits": 0}, 0.0
    for _ in range(count):
        base, length = chance.choice(BASES), chance.choice(COUNTS)
        kind = np.uint8 if base <= 2**8 else np.uint16 if base <= 2**16 else np.uint32
        digits = numbers.integers(0, 1 + (base - 1) // chance.choice([1, 3]), length).astype(kind)
        code = damage(chance, entropy_coding.encode(digits, base).tobytes())
        asked = chance.choice([length, length, length, length + 1, 10 * length])
        started = time.perf_counter()
        try:
            back = entropy_coding.decode(np.frombuffer(code, np.uint8), asked, base)
        except InputError as error:
            assert str(error).endswith("the file is damaged")
            found["refused"] += 1
        else:
            assert back.size == asked and back.dtype == kind and int(back.max()) < base
            found["digits"] += 1
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < SLOW
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Damaged entropy codes")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=2)
    given = parser.parse_args()
    started = time.perf_counter()
    found = fuzz(given.count, given.seed)
    print(", ".join(f"{value} {key}" for key, value in found.items()), f"in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
