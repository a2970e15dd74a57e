"""Lossless packing of small integers and of the positions of kept weights, near the information that they hold.

- Digits of any base (quantised codes, zero points, indices): several per word of 1 to 8 bytes, the word that wastes
  least. A base 2 ** b, b up to 8, gives a dense little-endian stream of b bits.
- N:M positions: each group of `of` weights that keeps exactly `keep` is one of C(of, keep) cases; its rank in the
  combinatorial number system (Knuth, TAOCP 4A, 7.2.1.3; as a code: Cover, Enumerative source coding, 1973) is a digit
  of that base. 2:4 takes 8/12 bit per weight, where log2(6)/4 = 0.646 are the least and a bit mask takes 1.
- Unstructured positions: a range coder (Martin 1979; the library `constriction`) with one probability per matrix.

Everything is checked on the way back: bytes that no packing gives are refused. No tensors of a model, no files:
`tasks.packed.layout` lays out those.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import constriction
import numpy as np

from tasks.algorithms.errors import InputError

LARGEST_GROUP = 32
"""N:M patterns have at most so many weights in a group; C(32, 16) still fits 32 bits."""

_TABLE = 2**16
"""Patterns with at most so many cases are unranked through a table."""
_PRECISION = 24
"""The fixed-point probability has so many bits, those that `constriction` computes with."""
_CHUNK = 2**22
"""So many weights are entropy coded at once: the coder takes 32-bit symbols."""


class Word(NamedTuple):
    """The storage of digits of a base: `digits` in each word of `size` bytes, little-endian, the first lowest."""

    digits: int
    size: int


@functools.cache
def word(base: int) -> Word:
    """Choose the word of 1 to 8 bytes with the fewest bits per digit; of equals the shortest.

    Args:
        base: 2 to 2 ** 32.
    """
    if not 2 <= base <= 2**32:
        raise ValueError(f"digits of base {base} can't be packed")
    words = []
    for size in range(1, 9):
        digits = 0  # the most with base^digits <= 256^size
        while base ** (digits + 1) <= 256**size:
            digits += 1
        if digits:
            words.append(Word(digits, size))
    return min(words, key=lambda w: (w.size / w.digits, w.size))


def digits_bytes(count: int, base: int) -> int:
    """Count the bytes of `count` digits; the last word is cut to what its digits can fill. A base of 1 takes none."""
    if base == 1:
        return 0
    digits, size = word(base)
    rest = count % digits  # the last word's largest value is base^rest - 1
    return count // digits * size + ((base**rest - 1).bit_length() + 7) // 8


def pack_digits(digits: np.ndarray, base: int) -> np.ndarray:
    """Pack unsigned integers below `base`, any shape, in their order, to uint8 [digits_bytes(size, base)].

    Raises:
        ValueError: a digit is not below the base.
    """
    digits = digits.reshape(-1)
    if digits.size and int(digits.max()) >= base:
        raise ValueError(f"a digit is {int(digits.max())}, not below its base {base}")
    if base == 1:
        return np.zeros(0, np.uint8)
    per, size = word(base)
    kind = _unsigned(size)
    if (per, size) == (1, kind(0).itemsize):
        return _bytes(digits.astype(kind, copy=False), size)
    whole = digits.size // per * per
    rest = np.zeros((1, per), digits.dtype)  # the last word's digits, its highest ones 0
    rest[0, : digits.size - whole] = digits[whole:]
    parts = [  # digits [words, per] -> words [words] -> uint8 [words * size]
        _bytes(_horner(part, base, kind), size)
        for part in (digits[:whole].reshape(-1, per), rest[: digits.size > whole])
    ]
    return np.concatenate(parts)[: digits_bytes(digits.size, base)]


def unpack_digits(data: np.ndarray, count: int, base: int) -> np.ndarray:
    """Unpack the digits of `pack_digits`.

    Returns:
        [count], uint8 for bases up to 256, else uint16, uint32.

    Raises:
        InputError: the bytes don't belong to so many digits, or are no digits of that base.
    """
    expected = digits_bytes(count, base)
    if data.size != expected:
        raise InputError(f"{count} digits of base {base} have {expected} bytes, found {data.size}: the file is damaged")
    kind = np.uint8 if base <= 2**8 else np.uint16 if base <= 2**16 else np.uint32
    if base == 1 or not count:
        return np.zeros(count, kind)
    per, size = word(base)
    # [ceil(count / per)]
    words = data.copy() if (per, size) == (1, 1) else _words(data, -(-count // per), size)
    # a word of `per` digits is below base^per, the last one, of fewer, below `last`
    last = base ** (count - (len(words) - 1) * per)
    if (base**per < 256**size and int(words.max()) >= base**per) or int(words[-1]) >= last:
        raise InputError(f"a packed word holds no digits of base {base}: the file is damaged")
    return words.astype(kind, copy=False) if per == 1 else _split(words, per, base, kind)[:count]


def cases(keep: int, of: int) -> int:
    """Return C(of, keep), the number of ways to keep `keep` of a group of `of`.

    Raises:
        InputError: no such pattern, or groups above 32.
    """
    if not 0 < keep < of <= LARGEST_GROUP:
        raise InputError(f"the pattern {keep}:{of} can't be packed: keep must be below of, and of at most 32")
    return math.comb(of, keep)


def rank(mask: np.ndarray, keep: int) -> np.ndarray:
    """Number each group's combination: the sum of C(position, i) over its i-th kept position, i = 1, 2, …

    Args:
        mask: bool [groups, of], exactly `keep` True in each row.

    Returns:
        uint32 [groups], 0 to C(of, keep) - 1.

    Raises:
        InputError: a group keeps more or fewer.
    """
    of = mask.shape[1]
    count = mask.sum(axis=1, dtype=np.uint8)
    wrong = int((count != keep).sum())
    if wrong:
        raise InputError(
            f"{wrong} of {len(mask)} groups of {of} don't keep exactly {keep}, so they are no {keep}:{of} pattern: run "
            "stage wanda again"
        )
    if of <= 16:
        bits = np.zeros(len(mask), np.uint16)  # [groups], the masks as integers
        for position in range(of):
            bits |= mask[:, position].astype(np.uint16) << np.uint16(position)
        return _rank_table(keep, of)[bits]
    # Theorem L of Knuth's section: N = C(c_1, 1) + C(c_2, 2) + … of the kept positions c_1 < c_2 < …
    ranks, seen = np.zeros(len(mask), np.uint32), np.zeros(len(mask), np.uint8)  # [groups]
    for position in range(of):
        seen += mask[:, position]  # i, if this position is kept
        binomials = np.array([math.comb(position, i) for i in range(keep + 1)], np.uint32)
        ranks += np.where(mask[:, position], binomials[seen], 0).astype(np.uint32)
    return ranks


def unrank(ranks: np.ndarray, keep: int, of: int) -> np.ndarray:
    """Return the masks bool [groups, of] of the ranks [groups]."""
    if cases(keep, of) <= _TABLE:
        return _mask_table(keep, of)[ranks]
    return _unrank(ranks.astype(np.uint32), keep, of)


def positions_bytes(count: int, keep: int, of: int) -> int:
    """Count the bytes of the positions of an N:M matrix of `count` weights."""
    return digits_bytes(count // of, cases(keep, of))


Pack = Callable[[np.ndarray, int], np.ndarray]
"""As `pack_digits`."""
Unpack = Callable[[np.ndarray, int, int], np.ndarray]
"""As `unpack_digits`."""


def pack_positions(mask: np.ndarray, keep: int, of: int, pack: Pack = pack_digits) -> np.ndarray:
    """Pack bool [rows, cols] with exactly `keep` of every `of` consecutive inputs to uint8.

    Raises:
        InputError: the mask isn't of that pattern, or cols isn't divisible by `of`.
    """
    base = cases(keep, of)
    if mask.shape[1] % of:
        raise InputError(f"{mask.shape[1]} inputs are not divisible by of = {of}: run stage wanda with another pattern")
    return pack(rank(mask.reshape(-1, of), keep), base)


def unpack_positions(
    data: np.ndarray, rows: int, cols: int, keep: int, of: int, unpack: Unpack = unpack_digits
) -> np.ndarray:
    """Unpack bool [rows, cols] of `pack_positions`.

    Raises:
        InputError: the bytes don't fit the shape, or are no code of the pattern.
    """
    if cols % of:
        raise InputError(f"{cols} inputs are not divisible by of = {of}: the file is damaged")
    ranks = unpack(data, rows * cols // of, cases(keep, of))
    return unrank(ranks, keep, of).reshape(rows, cols)


def encode_mask(mask: np.ndarray) -> np.ndarray:
    """Code bool, any shape, to uint8, within 1% of log2 C(size, kept) for matrices from 16384 weights on.

    Nothing is written for masks that keep all or nothing. `decode_mask` needs size and number of kept weights.
    """
    flat = mask.reshape(-1)
    kept = int(flat.sum())
    if kept in (0, flat.size):
        return np.zeros(0, np.uint8)
    # a range coder spends -log2 P(weight) bits on each: n H(kept / n) together, hardly more than log2 C(n, kept)
    model = _bernoulli(flat.size, kept)
    encoder = constriction.stream.queue.RangeEncoder()
    for start in range(0, flat.size, _CHUNK):
        encoder.encode(flat[start : start + _CHUNK].astype(np.int32), model)
    return encoder.get_compressed().astype("<u4").view(np.uint8)


def decode_mask(data: np.ndarray, count: int, kept: int) -> np.ndarray:
    """Decode bool [count] of `encode_mask`.

    Raises:
        InputError: the bytes are no such mask.
    """
    damaged = InputError(f"the positions of {kept} kept of {count} weights can't be decoded: the file is damaged")
    if not 0 <= kept <= count or data.size % 4 or (kept in (0, count)) != (data.size == 0):
        raise damaged
    if kept in (0, count):
        return np.full(count, kept > 0)
    model, mask = _bernoulli(count, kept), np.zeros(count, bool)
    try:
        decoder = constriction.stream.queue.RangeDecoder(data.copy().view("<u4").astype(np.uint32))
        for start in range(0, count, _CHUNK):
            part = mask[start : start + _CHUNK]
            part[:] = decoder.decode(model, part.size)
        rest = not decoder.maybe_exhausted()
    except (AssertionError, ValueError) as error:  # the library's way to say so
        raise damaged from error
    if rest or int(mask.sum()) != kept:
        raise damaged
    return mask


def log2_combinations(count: int, kept: int) -> float:
    """Return log2 C(count, kept): the bits that a code of such positions takes on average, at least."""
    # log2 n! = lgamma(n + 1) / ln 2
    return (math.lgamma(count + 1) - math.lgamma(kept + 1) - math.lgamma(count - kept + 1)) / math.log(2)


def _bernoulli(count: int, kept: int) -> constriction.stream.model.Bernoulli:
    scale = 2**_PRECISION  # P(kept) as share / scale: both sides have to get the very same number
    share = min(max((2 * kept * scale + count) // (2 * count), 1), scale - 1)  # rounded, in integers
    return constriction.stream.model.Bernoulli(share / scale, perfect=False)


def _unsigned(size: int) -> type[np.unsignedinteger]:
    return np.uint8 if size == 1 else np.uint16 if size == 2 else np.uint32 if size <= 4 else np.uint64


def _horner(digits: np.ndarray, base: int, kind: type[np.unsignedinteger]) -> np.ndarray:
    # word = d_0 + base (d_1 + base (d_2 + …)), [words, per] -> [words]
    words = digits[:, -1].astype(kind)
    for place in range(digits.shape[1] - 2, -1, -1):
        words *= kind(base)
        words += digits[:, place].astype(kind, copy=False)
    return words


def _bytes(words: np.ndarray, size: int) -> np.ndarray:
    # the lowest `size` bytes of each
    little = words.astype(words.dtype.newbyteorder("<"), copy=False)
    return little.view(np.uint8).reshape(len(words), words.itemsize)[:, :size].reshape(-1)


def _words(data: np.ndarray, count: int, size: int) -> np.ndarray:
    """Read the little-endian words of `size` bytes; the last may be cut."""
    kind = np.dtype(_unsigned(size)).newbyteorder("<")
    # zeros for the last word's missing bytes, then for what the words lack of a machine integer
    data = np.pad(data, (0, count * size - data.size)) if data.size < count * size else data.copy()
    if size < kind.itemsize:
        data = np.pad(data.reshape(count, size), ((0, 0), (0, kind.itemsize - size))).reshape(-1)
    return data.view(kind).astype(_unsigned(size), copy=False)


def _split(words: np.ndarray, per: int, base: int, kind: type[np.unsignedinteger]) -> np.ndarray:
    if words.itemsize == 1:
        return _byte_table(base)[words].reshape(-1)
    digits = np.empty((len(words), per), kind)
    shift = base.bit_length() - 1 if base & (base - 1) == 0 else 0  # bits of a digit of base 2^shift
    for place in range(per):
        if shift:  # several times faster than a division
            digits[:, place] = words & words.dtype.type(base - 1)
            words = words >> words.dtype.type(shift)
        else:
            higher = words // words.dtype.type(base)
            digits[:, place] = words - higher * words.dtype.type(base)
            words = higher
    return digits.reshape(-1)


@functools.cache
def _byte_table(base: int) -> np.ndarray:
    """Return the digits of each byte, uint8 [256, digits]."""
    # digit i is value // base^i % base
    values = np.arange(256)[:, None] // base ** np.arange(word(base).digits) % base
    return values.astype(np.uint8)


@functools.cache
def _rank_table(keep: int, of: int) -> np.ndarray:
    """Return the rank of a group whose mask is the index's bits, position 0 lowest, uint32 [2 ** of]."""
    table = np.zeros(2**of, np.uint32)
    masks = _unrank(np.arange(math.comb(of, keep), dtype=np.uint32), keep, of)  # [C(of, keep), of]
    table[masks @ (1 << np.arange(of))] = np.arange(len(masks))
    return table


@functools.cache
def _mask_table(keep: int, of: int) -> np.ndarray:
    """Return the mask of every rank, bool [C(of, keep), of]."""
    return _unrank(np.arange(math.comb(of, keep), dtype=np.uint32), keep, of)


def _unrank(ranks: np.ndarray, keep: int, of: int) -> np.ndarray:
    mask = np.zeros((len(ranks), of), bool)
    left, missing = ranks.copy(), np.full(len(ranks), keep, np.int64)  # [groups]: rest of the rank, positions to find
    for position in range(of - 1, -1, -1):  # the last kept position is the largest with C(position, missing) <= rank
        below = np.array([math.comb(position, i) for i in range(keep + 1)], np.uint32)[missing]
        kept = (missing > 0) & (left >= below)
        mask[:, position] = kept
        left -= np.where(kept, below, 0).astype(np.uint32)
        missing -= kept
    return mask
