"""Confidence intervals of perplexities, and of the difference of two models, by the bootstrap over documents.

Tokens of one document aren't independent, documents are nearly so: a resample draws whole documents with replacement
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993), and a figure of it is a ratio of sums, as the figure
itself is. Two models are resampled together, document by document (the paired bootstrap; Koehn, EMNLP 2004), since what
makes a document hard is the same for both; the interval of their ratio is far narrower than either's own.

Intervals are BCa (Efron 1987; DiCiccio and Efron 1996, section 2), corrected for bias and skew, with the acceleration
from the jackknife, whose leave-one-out figures are one subtraction each. It covers the noise of the choice of
documents, and not that of training, of seeds or of the choice of prompts. Where windows span documents, neighbours
share context; that dependence is neglected. It doesn't correct for many comparisons at once.

Shapes: n = documents, r = resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

from tasks.algorithms.errors import InputError

PERPLEXITY, BITS_PER_BYTE = "perplexity", "bits_per_byte"
BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference"
CONFIDENCE = 0.95
"""On this share of test sets such an interval would hold the true figure."""
RESAMPLES = 4000
"""With so many an interval's ends move from seed to seed by some hundredths of its width."""
GROUPS = 2000
"""More documents than this are resampled in so many groups of neighbours: an interval as good, at bounded cost."""

Statistic = Callable[[np.ndarray], np.ndarray]


class Sums(NamedTuple):
    """One model's scores on one split, a row per document (`tasks.algorithms.scoring.likelihood.Score.by_document`).

    Attributes:
        document: numbers of the documents, int [n], rising.
        predictions, bytes: predicted tokens and the UTF-8 bytes that they stand for, int [n].
        nll: negative log-likelihood in nats, float64 [n].
    """

    document: np.ndarray
    predictions: np.ndarray
    bytes: np.ndarray
    nll: np.ndarray


class Interval(NamedTuple):
    """A figure and its confidence interval.

    low = high = value where documents don't differ; both are NaN where there is one document, or a figure isn't finite.
    """

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """Model a beside model b on the same documents; lower is better.

    Attributes:
        measure: "perplexity", or "bits_per_byte" where the two predict different tokens.
        a, b: each one's figure on the documents that both were scored on.
        ratio, low, high: a / b and its interval.
        change, change_low, change_high: a - b and its interval.
        verdict: on a: "better", "worse", or "no difference" where the interval of the ratio holds 1.
        documents: number of those that were compared.
    """

    measure: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    change: float
    change_low: float
    change_high: float
    verdict: str
    documents: int


def interval(
    sums: Sums, generator: np.random.Generator, measure: str = PERPLEXITY, resamples: int = RESAMPLES
) -> Interval:
    """Return a model's perplexity or bits per byte, with its interval.

    Raises:
        InputError: no document, or a measure that is none.
    """
    columns = np.stack([sums.nll, _units(sums, measure)])  # [2, n]
    (result,) = _intervals(columns, [lambda s: _figure(s[0], s[1], measure)], generator, resamples)
    return result


def compare(a: Sums, b: Sums, generator: np.random.Generator, resamples: int = RESAMPLES) -> Difference:
    """Compare model a with model b, on the documents that both were scored on.

    By perplexity where they agree in every such document's predictions, else (another vocabulary) by bits per byte:
    then a document that the last window cuts may count with different bytes for each, which are each model's own.

    Raises:
        InputError: no document in common.
    """
    _, of_a, of_b = np.intersect1d(a.document, b.document, assume_unique=True, return_indices=True)
    a, b = (Sums(*(column[at] for column in sums)) for sums, at in ((a, of_a), (b, of_b)))
    same = np.array_equal(a.predictions, b.predictions) and np.array_equal(a.bytes, b.bytes)
    measure = PERPLEXITY if same else BITS_PER_BYTE
    # one matrix, so that a resample takes a document's rows of both models (Koehn 2004, the paired bootstrap)
    columns = np.stack([a.nll, _units(a, measure), b.nll, _units(b, measure)])  # [4, n]

    def figures(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _figure(s[0], s[1], measure), _figure(s[2], s[3], measure)

    def ratio(s: np.ndarray) -> np.ndarray:
        return np.divide(*figures(s))

    def change(s: np.ndarray) -> np.ndarray:
        return np.subtract(*figures(s))

    ratios, changes = _intervals(columns, [ratio, change], generator, resamples)
    values = map(float, figures(columns.sum(axis=1)))
    return Difference(measure, *values, *ratios, *changes, _verdict(ratios), columns.shape[1])


def _verdict(ratio: Interval) -> str:
    # NaN bounds compare as false: no interval, no difference
    if not ratio.low <= 1 <= ratio.high and not math.isnan(ratio.low):
        return BETTER if ratio.value < 1 else WORSE
    return NO_DIFFERENCE


def _units(sums: Sums, measure: str) -> np.ndarray:
    """Return the units that nats are divided by, tokens or bytes, float64 [n]."""
    known = {PERPLEXITY: sums.predictions, BITS_PER_BYTE: sums.bytes}
    if measure not in known:
        raise InputError(f"measure {measure!r} is unknown; known are {', '.join(known)}")
    return known[measure].astype(np.float64)


def _figure(nll: np.ndarray, units: np.ndarray, measure: str) -> np.ndarray:
    # perplexity exp(sum nats / sum tokens), or sum nats / ln 2 / sum bytes, of sums […]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return np.exp(nll / units) if measure == PERPLEXITY else nll / math.log(2) / units


def _intervals(
    columns: np.ndarray, statistics: list[Statistic], generator: np.random.Generator, resamples: int
) -> list[Interval]:
    """Return the interval of each statistic of the columns' sums, from the same resamples.

    Args:
        columns: float64 [columns, n].
        statistics: sums [columns, …] -> figures […].
    """
    documents = columns.shape[1]
    if not documents:
        raise InputError("no document was scored by both models, so there is nothing to compare; evaluate them again")
    whole = columns.sum(axis=1)  # [columns]
    values = [float(statistic(whole)) for statistic in statistics]
    if documents == 1:
        return [Interval(value, math.nan, math.nan) for value in values]
    if documents > GROUPS:
        columns = np.add.reduceat(columns, np.arange(GROUPS) * documents // GROUPS, axis=1)
    drawn = _resample(columns, generator, resamples)  # [columns, r]
    left_out = whole[:, None] - columns  # [columns, n]: the jackknife's sums without each document
    return [
        Interval(value, *_bca(value, statistic(drawn), statistic(left_out)))
        for value, statistic in zip(values, statistics, strict=True)
    ]


def _resample(columns: np.ndarray, generator: np.random.Generator, resamples: int) -> np.ndarray:
    """Sum each column over n documents drawn with replacement, float64 [columns, r]."""
    documents = columns.shape[1]
    # how often each document was drawn, [r, n], is multinomial; its product with the columns is the resamples' sums
    return columns @ generator.multinomial(documents, np.full(documents, 1 / documents), size=resamples).T


def _bca(value: float, drawn: np.ndarray, left_out: np.ndarray) -> tuple[float, float]:
    """Return (low, high) at CONFIDENCE: quantiles of the drawn figures [r], moved by bias and acceleration.

    left_out [n] are the leave-one-out figures. Formulas: Efron and Tibshirani 1993, section 14.3.
    """
    if not (np.isfinite(drawn).all() and np.isfinite(left_out).all()):
        return math.nan, math.nan
    if np.ptp(drawn) <= 1e-12 * abs(value):  # documents don't differ beyond rounding
        return value, value
    # z0 = Phi^-1(share of drawn figures below the value), a tie counts half
    bias = ndtri(((drawn < value).mean() + (drawn <= value).mean()) / 2)
    # a = sum d^3 / (6 (sum d^2)^(3/2)), d = mean of the leave-one-out figures less each
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    # the levels are Phi(z0 + (z0 + z) / (1 - a (z0 + z))), z = -1.96 and 1.96 at 95 %
    normal = bias + ndtri(np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    levels = ndtr(bias + normal / (1 - acceleration * normal))
    low, high = np.quantile(drawn, np.clip(levels, 0, 1))
    return float(low), float(high)
