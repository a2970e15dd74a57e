"""Interpolated Kneser-Ney smoothing (Kneser and Ney 1995; Chen and Goodman 1999, section 4.1.6), on arrays.

The independent baseline of the built-in model: an n-gram model of the same training tokens, measured on the same
predictions. One discount per order, n1 / (n1 + 2 n2). N-grams are packed into 64-bit keys, so order x bits <= 63.
"""

from __future__ import annotations

import numpy as np


class KneserNey:
    """An n-gram model of a row of token ids."""

    def __init__(self, tokens: np.ndarray, vocabulary: int, order: int = 5) -> None:
        self.vocabulary, self.order = vocabulary, order
        self.bits = int(vocabulary - 1).bit_length()
        assert self.bits * order <= 63
        keys, counts = np.unique(self._keys(tokens, order), return_counts=True)
        self.tables = {}
        for n in range(order, 0, -1):
            self.tables[n] = self._table(keys, counts)
            # continuation counts of the next lower order: by how many different tokens it is preceded
            keys, counts = np.unique(keys & ((1 << self.bits * (n - 1)) - 1), return_counts=True)

    def _keys(self, tokens: np.ndarray, n: int) -> np.ndarray:
        tokens = tokens.astype(np.int64)
        keys = np.zeros(len(tokens) - n + 1, np.int64)
        for i in range(n):
            keys = (keys << self.bits) | tokens[i : len(tokens) - n + 1 + i]
        return keys

    def _table(self, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray | float]:
        ones, twos = (counts == 1).sum(), (counts == 2).sum()
        contexts, starts = np.unique(keys >> self.bits, return_index=True)
        return {
            "keys": keys,
            "counts": counts,
            "discount": ones / (ones + 2 * twos) if ones and twos else 0.5,
            "contexts": contexts,
            "totals": np.add.reduceat(counts, starts),
            "kinds": np.diff(np.append(starts, len(keys))),
        }

    def probability(self, grams: np.ndarray) -> np.ndarray:
        """P(last token | the ones before) of n-grams [grams, n], n <= order."""
        result = np.full(len(grams), 1 / self.vocabulary)
        for n in range(1, grams.shape[1] + 1):
            keys = np.zeros(len(grams), np.int64)
            for column in range(grams.shape[1] - n, grams.shape[1]):
                keys = (keys << self.bits) | grams[:, column].astype(np.int64)
            table = self.tables[n]
            count = _look_up(table["keys"], table["counts"], keys)
            total = _look_up(table["contexts"], table["totals"], keys >> self.bits)
            kinds = _look_up(table["contexts"], table["kinds"], keys >> self.bits)
            seen = total > 0
            own = np.maximum(count - table["discount"], 0) / np.maximum(total, 1)
            left = table["discount"] * kinds / np.maximum(total, 1)
            result = np.where(seen, own + left * result, result)
        return result

    def perplexity(self, windows: np.ndarray) -> float:
        """Over all predictions of token windows [windows, length]; the history never leaves the window."""
        losses = []
        for position in range(1, windows.shape[1]):
            first = max(0, position - self.order + 1)
            losses.append(-np.log(self.probability(windows[:, first : position + 1])))
        return float(np.exp(np.mean(losses)))


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is not there; `keys` are sorted."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
