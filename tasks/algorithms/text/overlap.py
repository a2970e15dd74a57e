"""How much of one text stands in another: runs of words, counted by documents, in bounded memory.

Long runs tell copies: GPT-3 called a test document contaminated that shares 13 consecutive words with the training
text (Brown et al., arXiv 2005.14165, appendix C). Short runs tell the domain: texts of one kind share phrases. As
there, words are what white space parts, in lower case and without punctuation; a script without spaces has clauses.

The texts that are asked about are held as hashes, and the text that is searched passes by once, so it may be of any
size. Two runs of words count as one with a probability of 2^-64. It judges nothing.

Shapes: w = words of a text, g = distinct runs asked about.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

PUNCTUATION = re.compile(r"[^\w\s]")
BASE = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that no bit of a word's hash is lost by the powers."""


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return PUNCTUATION.sub("", text.lower()).split()


def runs(text: str, length: int) -> np.ndarray:
    """Hashes of all runs of `length` consecutive words, uint64 [max(w - length + 1, 0)]."""
    each = np.array([_hash(word) for word in words(text)], dtype=np.uint64)
    count = len(each) - length + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    found = np.zeros(count, dtype=np.uint64)
    for start in range(length):
        found = found * BASE + each[start : start + count]  # modulo 2^64
    return found


@functools.lru_cache(2**18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Search:
    """Counts in how many documents each run of the asked texts stands.

    Args:
        texts: the documents asked about.
        length: words of a run.
    """

    def __init__(self, texts: Iterable[str], length: int) -> None:
        self.length = length
        found = [np.unique(runs(text, length)) for text in texts]
        self.asked = np.unique(np.concatenate([*found, np.zeros(0, dtype=np.uint64)]))  # [g], sorted
        self.documents = np.zeros(len(self.asked), dtype=np.int64)  # [g]

    def add(self, text: str) -> None:
        """One document of the text that is searched."""
        own = np.unique(runs(text, self.length))
        at = np.searchsorted(self.asked, own)
        at[at == len(self.asked)] = 0
        if len(self.asked):
            self.documents[at[self.asked[at] == own]] += 1

    def found(self, text: str, least: int = 1) -> np.ndarray:
        """Which runs of an asked text stand in at least `least` documents, bool [runs]."""
        return self.documents[np.searchsorted(self.asked, runs(text, self.length))] >= least


def share(search: Search, texts: Sequence[str], least: int = 1) -> float | None:
    """Share of the texts' runs that stand in at least `least` documents; None where they have no run."""
    total, hits = 0, 0
    for text in texts:
        own = search.found(text, least)
        total, hits = total + len(own), hits + int(own.sum())
    return hits / total if total else None
