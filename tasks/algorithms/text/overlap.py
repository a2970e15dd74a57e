"""Measure how much of one text stands in another: runs of words, counted by documents, in bounded memory.

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
"""The base of the runs' hashes is odd, so that no bit of a word's hash is lost by its powers."""


def words(text: str) -> list[str]:
    """Return the words of a text in lower case and without punctuation."""
    return PUNCTUATION.sub("", text.lower()).split()


def runs(text: str, length: int) -> np.ndarray:
    """Hash all runs of `length` consecutive words, uint64 [max(w - length + 1, 0)]."""
    hashes = np.array([_hash(word) for word in words(text)], dtype=np.uint64)  # [w]
    count = len(hashes) - length + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    # the polynomial hash of Karp and Rabin, of all runs at once: sum of h(word j) BASE^(length - 1 - j), modulo 2^64
    sums = np.zeros(count, dtype=np.uint64)
    for start in range(length):
        sums = sums * BASE + hashes[start : start + count]
    return sums


@functools.lru_cache(2**18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Search:
    """A search that counts in how many documents each run of the asked texts stands.

    Args:
        texts: the documents asked about.
        length: words of a run.
    """

    def __init__(self, texts: Iterable[str], length: int) -> None:
        self.length = length
        asked = [np.unique(runs(text, length)) for text in texts]
        self.asked = np.unique(np.concatenate([*asked, np.zeros(0, dtype=np.uint64)]))  # [g], sorted
        self.documents = np.zeros(len(self.asked), dtype=np.int64)  # [g]

    def add(self, text: str) -> None:
        """Look through one document of the text that is searched."""
        hashes = np.unique(runs(text, self.length))  # a document counts once, however often it has the run
        at = np.searchsorted(self.asked, hashes)
        at[at == len(self.asked)] = 0  # beyond the last: any place will do, the next comparison refuses it
        if len(self.asked):
            self.documents[at[self.asked[at] == hashes]] += 1

    def found(self, text: str, least: int = 1) -> np.ndarray:
        """Tell which runs of an asked text stand in at least `least` documents, bool [runs]."""
        return self.documents[np.searchsorted(self.asked, runs(text, self.length))] >= least


def share(search: Search, texts: Sequence[str], least: int = 1) -> float | None:
    """Return the share of the texts' runs that stand in at least `least` documents; None where they have no run."""
    total, hits = 0, 0
    for text in texts:
        stands = search.found(text, least)
        total, hits = total + len(stands), hits + int(stands.sum())
    return hits / total if total else None
