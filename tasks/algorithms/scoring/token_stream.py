"""Tokens of a long text, piece by piece: those of the whole, in memory that doesn't grow with it.

A tokenizer makes some 200 bytes of objects of each byte of a text, so a text is encoded in windows of `PIECE`
characters that overlap. Where two windows overlap they must agree: in the middle half of the overlap every token has
the same id and the same place, and there one follows the other. What a window's ends do to its tokens (a prefix space,
a word that is cut, whitespace at the end) lies outside of that half. Where they don't agree (a number that is grouped
from its first digit, longer than the overlap) the window grows until they do, be it to the whole text.

For BPE the result is exactly the whole text's: a sequence of tokens is its encoding if each two neighbours are the
encoding of theirs, and each two neighbours here stand beside each other in a window. Other tokenizers look at a text as
locally; the agreement is what is known of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

PIECE = 2**19
"""Characters of a window, beside the overlap."""
OVERLAP = 2**12
"""Characters that two windows share."""


class Piece(NamedTuple):
    """The tokens of a window.

    Attributes:
        ids: int32 [tokens].
        offsets: int64 [tokens, (start, end)], in characters of the window.
        spans: int64 [tokens], bytes of the text that each stands for; None where nobody asked.
    """

    ids: np.ndarray
    offsets: np.ndarray
    spans: np.ndarray | None = None

    def part(self, begin: int, end: int | None) -> Piece:
        """The tokens [begin, end)."""
        spans = None if self.spans is None else self.spans[begin:end]
        return Piece(self.ids[begin:end], self.offsets[begin:end], spans)


def pieces(
    encode: Callable[[str], Piece],
    documents: Iterable[str],
    join: str,
    piece: int = PIECE,
    overlap: int = OVERLAP,
) -> Iterator[Piece]:
    """The tokens of the documents joined by `join`, in order; their offsets are of no use, as windows have their own.

    Args:
        encode: the tokenizer, of one window.
        piece: characters of a window.
        overlap: characters that two windows share.
    """
    texts = _chunks(documents, join, piece)
    text = next(texts, "")
    left, begin = encode(text), 0  # the tokens before `begin` were given already
    for more in texts:
        after = text[-overlap:] + more
        right = encode(after)
        shared = len(after) - len(more)
        seam = _seam(left, right, len(text) - shared, shared)
        if seam is None:
            text += more
            left = encode(text)
            continue
        yield left.part(begin, seam[0])
        text, left, begin = after, right, seam[1]
    yield left.part(begin, None)


def _chunks(documents: Iterable[str], join: str, size: int) -> Iterator[str]:
    """The joined text in parts of `size` to twice as many characters, the last one of at least one."""
    parts: list[str] = []
    held = 0
    for number, document in enumerate(documents):
        text = join + document if number else document
        for start in range(0, len(text), size):
            parts.append(text[start : start + size])
            held += len(parts[-1])
            if held >= size:
                yield "".join(parts)
                parts, held = [], 0
    if parts:
        yield "".join(parts)


def _seam(left: Piece, right: Piece, shift: int, shared: int) -> tuple[int, int] | None:
    """The token of each window at which the right one goes on; None where they don't agree.

    Args:
        shift: the character of the left window with which the right one begins.
        shared: characters of the overlap.
    """
    low, high = shared // 4, shared - shared // 4
    ours = slice(*np.searchsorted(left.offsets[:, 0], (shift + low, shift + high)))
    theirs = slice(*np.searchsorted(right.offsets[:, 0], (low, high)))
    count = ours.stop - ours.start
    same = count > 1 and np.array_equal(left.ids[ours], right.ids[theirs])
    if not same or not np.array_equal(left.offsets[ours] - shift, right.offsets[theirs]):
        return None
    return ours.start + count // 2, theirs.start + count // 2
