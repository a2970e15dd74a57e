"""Entropy coding of unsigned integers to nearly their order-0 entropy, without a table.

Asymmetric numeral systems (Duda 2013, 1311.2540; the library `constriction`). The distribution of each chunk is that
of the digits before it, 1 + s n for a digit that was there n times; chunks grow with what is known. Of a few values of
s the best is taken: 2 is the estimator of Krichevsky and Trofimov (1981), more suits digits of which few occur, and 0
is uniform. So 16 codes learn theirs in about 15 bytes, where a table of as many probabilities would take as much.
Digits above a byte are coded byte by byte, lowest first: of a float16 the upper byte says little, the lower one all.
Uniform digits don't waste what they waste in words of whole bytes (`packing.pack_digits`).

Everything is checked on the way back: bytes that no digits give are refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import constriction
import numpy as np

from tasks.algorithms.errors import InputError

_FIRST, _SHARE, _LARGEST = 16, 4, 2**20
"""Digits of the first chunks; a chunk has a share of those before it; of the largest ones. These are the format."""
_STEPS = (0, 2, 16, 128)
"""What a digit's weight grows by when it occurs. The format, too."""
_WORD = np.dtype("<u4")
_Model = constriction.stream.model.Model


def encode(digits: np.ndarray, base: int) -> np.ndarray:
    """Code unsigned integers below `base`, any shape, in their order; nothing where there is nothing to tell.

    Args:
        base: 1 to 2 ** 32.

    Returns:
        uint8: a byte with the place in `_STEPS` for each byte of a digit, two bits each; then the code without its
        last zeros.

    Raises:
        ValueError: a digit is not below the base.
    """
    digits, bases = digits.reshape(-1), _bases(base)
    if digits.size and int(digits.max()) >= base:
        raise ValueError(f"a digit is {int(digits.max())}, not below its base {base}")
    if not digits.size or not bases:
        return np.zeros(0, np.uint8)
    coder, chosen = constriction.stream.stack.AnsCoder(), 0
    for place in reversed(range(len(bases))):  # a stack: what is decoded first is coded last
        plane = _plane(digits, place)
        chunks = list(_chunks(plane.size))
        counts = np.array([np.bincount(plane[chunk], minlength=bases[place]) for chunk in chunks])
        before = np.cumsum(counts, axis=0) - counts  # [chunks, base]
        step = _best_step(counts, before)
        chosen |= step << 2 * place
        for chunk, seen in zip(reversed(chunks), reversed(before), strict=True):
            coder.encode_reverse(plane[chunk].astype(np.int32), _model(1.0 + _STEPS[step] * seen, _STEPS[step]))
    code = np.trim_zeros(coder.get_compressed().astype(_WORD).view(np.uint8), "b")
    return np.concatenate([np.array([chosen], np.uint8), code])


def decode(data: np.ndarray, count: int, base: int) -> np.ndarray:
    """Decode the digits of `encode`.

    Returns:
        [count], uint8 for bases up to 256, else uint16, uint32.

    Raises:
        InputError: the bytes are no such digits.
    """
    bases, kind = _bases(base), np.uint8 if base <= 2**8 else np.uint16 if base <= 2**16 else np.uint32
    damaged = InputError(f"{count} digits of base {base} can't be decoded: the file is damaged")
    if (data.size == 0) != (not count or not bases) or (data.size and int(data[0]) >> 2 * len(bases)):
        raise damaged
    digits = np.zeros(count, kind)
    if not data.size:
        return digits
    code = np.pad(data[1:], (0, -(data.size - 1) % _WORD.itemsize)).view(_WORD).astype(np.uint32)
    try:
        coder = constriction.stream.stack.AnsCoder(code)
    except ValueError as error:  # the last word is zero, as the library never leaves it
        raise damaged from error
    for place, own in enumerate(bases):
        weights, step = np.ones(own), _STEPS[data[0] >> 2 * place & 3]
        for chunk in _chunks(count):
            found = coder.decode(_model(weights, step), chunk.stop - chunk.start)
            if place:
                digits[chunk] |= found.astype(kind) << kind(8 * place)
            else:
                digits[chunk] = found
            if step:
                weights += step * np.bincount(found, minlength=own)
    if not coder.is_empty() or (len(bases) > 1 and int(digits.max()) >= base):
        raise damaged
    return digits


def information(digits: np.ndarray, base: int) -> float:
    """Return the bits of order-0 entropy of digits below `base`; above a byte the sum over their bytes."""
    digits, bits = digits.reshape(-1), 0.0
    for place, own in enumerate(_bases(base)):
        pieces = (digits[start : start + _LARGEST] for start in range(0, digits.size, _LARGEST))
        counts = np.sum([np.bincount(_plane(piece, place), minlength=own) for piece in pieces], axis=0)
        counts = counts[counts > 0]
        bits -= float((counts * np.log2(counts / digits.size)).sum())  # n H = -sum n_i log2(n_i / n)
    return bits


def _bases(base: int) -> list[int]:
    """Of the bytes of a digit below `base`, lowest first; none of a base of 1."""
    found = []
    while base > 1:
        found.append(min(base, 256))
        base = -(-base // 256)
    return found


def _model(weights: np.ndarray, step: int) -> _Model:
    """The distribution of a chunk."""
    if not step:
        return constriction.stream.model.Uniform(weights.size)
    return constriction.stream.model.Categorical(weights, perfect=False)


def _plane(digits: np.ndarray, place: int) -> np.ndarray:
    """Byte `place` of each digit."""
    return digits if digits.itemsize == 1 else (digits >> digits.dtype.type(8 * place)).astype(np.uint8)


def _chunks(count: int) -> Iterator[slice]:
    start = 0
    while start < count:
        stop = min(count, start + min(max(_FIRST, start // _SHARE), _LARGEST))
        yield slice(start, stop)
        start = stop


def _bits(counts: np.ndarray, weights: np.ndarray) -> float:
    """What the code takes of chunks with these counts, coded by these weights: [chunks, base] both."""
    return -float((counts * np.log2(weights / weights.sum(axis=1, keepdims=True))).sum())


def _best_step(counts: np.ndarray, before: np.ndarray) -> int:
    """The place in `_STEPS` of what takes least; uniform, which is decoded in half of the time, for 0.1 % more."""
    bits = [_bits(counts, 1.0 + step * before) for step in _STEPS]
    return int(np.argmin([0.999 * bits[0], *bits[1:]]))
