"""Decide which requests a canary gets, and when its samples suffice to promote it or to roll it back.

A request goes to the canary where a hash of its id and the canary's name falls below the share: the same id always gets
the same model, and grows into no other one while the share grows.

The verdict compares two figures with their limits: the accuracy's difference to the promoted model (Newcombe's interval
from Wilson's scores, Statistics in Medicine 17, 1998, method 10) and the 95th percentile of the latency (an interval
between order statistics, exact for every distribution). Both have to hold to promote; one that surely doesn't rolls
back; else it is watched on.

Looking again and again at the same growing samples would find a difference by chance sooner or later. So only the first
min_samples, 2 min_samples, 4 min_samples … are looked at, with the error 1 - confidence spent over the looks as
1 / ((k + 1)(k + 2)), whose sum is 1, and halved between the two figures: over all looks together the error stays below
1 - confidence, whenever and however often it is asked (Bonferroni's inequality). It says nothing of samples that depend
on each other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

PROMOTE, ROLLBACK, WATCH = "promote", "rollback", "keep watching"
QUANTILE = 0.95
"""This quantile of the latency has a limit."""


@dataclass(frozen=True)
class Samples:
    """The samples of one model, in the order of time.

    Attributes:
        latencies: milliseconds.
        correct: whether each answer was right.
    """

    latencies: Sequence[float]
    correct: Sequence[bool]


@dataclass(frozen=True)
class Check:
    """A figure, its interval and its limit; ok: None where the interval includes the limit."""

    name: str
    value: float
    low: float
    high: float
    limit: float
    ok: bool | None


@dataclass(frozen=True)
class Judgement:
    """The verdict (PROMOTE, ROLLBACK or WATCH), what it was taken from, and at which confidence each check was made."""

    verdict: str
    reason: str
    samples: int
    checks: tuple[Check, ...]
    confidence: float | None


def routed(identifier: str, canary: str, share: float) -> bool:
    """Tell whether the request with this id goes to the canary of this name; of all ids the share does.

    Args:
        share: 0 to 1.
    """
    # the first 8 bytes of the hash are uniform in 0 to 2^64 - 1
    digest = hashlib.sha256(f"{canary}\0{identifier}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < math.floor(share * 2**64)


def look(samples: int, min_samples: int) -> int | None:
    """Return the number of the last look, from 0, at min_samples * 2 ** number samples; None before the first."""
    return None if samples < min_samples else int(math.log2(samples // min_samples))


def confidence_at(number: int, confidence: float) -> float:
    """Return the confidence of each of the two checks at that look, so that all looks together have `confidence`."""
    # alpha / ((k + 1)(k + 2)) = alpha (1 / (k + 1) - 1 / (k + 2)): the sum over k telescopes to alpha; half per check
    return 1 - (1 - confidence) / ((number + 1) * (number + 2)) / 2


def judge(
    canary: Samples,
    promoted: Samples,
    *,
    p95_latency_ms: float,
    accuracy_drop: float,
    confidence: float,
    number: int,
) -> Judgement:
    """Give the verdict of one look.

    Args:
        canary, promoted: what was seen up to this look; neither is empty.
        p95_latency_ms: the canary's 95th percentile may be at most that.
        accuracy_drop: so much less than the promoted one's the canary's accuracy may be, at most (fraction).
        confidence: that of the verdict, over all looks together.
        number: which look this is, from 0.
    """
    level = confidence_at(number, confidence)
    hits = [(sum(seen.correct), len(seen.correct)) for seen in (canary, promoted)]  # (right, all) of each
    low, high = difference_interval(*hits[0], *hits[1], level)
    value = hits[0][0] / hits[0][1] - hits[1][0] / hits[1][1]
    holds = True if low >= -accuracy_drop else False if high < -accuracy_drop else None
    accuracy = Check("accuracy difference", value, low, high, -accuracy_drop, holds)
    low, high = quantile_interval(canary.latencies, QUANTILE, level)
    # nearest rank: the smallest latency that at least QUANTILE of them don't exceed
    value = sorted(canary.latencies)[math.ceil(QUANTILE * len(canary.latencies)) - 1]
    holds = True if high <= p95_latency_ms else False if low > p95_latency_ms else None
    latency = Check("p95 latency (ms)", value, low, high, p95_latency_ms, holds)
    checks = (accuracy, latency)
    broken = [check.name for check in checks if check.ok is False]
    open_ = [check.name for check in checks if check.ok is None]
    if broken:
        verdict, reason = ROLLBACK, f"{' and '.join(broken)} beyond the limit"
    elif open_:
        verdict, reason = WATCH, f"{' and '.join(open_)} not yet known well enough"
    else:
        verdict, reason = PROMOTE, "both within their limits"
    return Judgement(verdict, reason, len(canary.correct), checks, level)


def wilson_interval(hits: int, count: int, confidence: float) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson, JASA 22, 1927)."""
    # (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), all multiplied by n
    z = stats.norm.ppf((1 + confidence) / 2)
    centre, width = hits + z * z / 2, z * math.sqrt(hits * (count - hits) / count + z * z / 4)
    return max(0.0, (centre - width) / (count + z * z)), min(1.0, (centre + width) / (count + z * z))


def difference_interval(hits: int, count: int, other_hits: int, other: int, confidence: float) -> tuple[float, float]:
    """Return the interval of the first proportion minus the other one (Newcombe's method 10)."""
    p, q = hits / count, other_hits / other
    p_low, p_high = wilson_interval(hits, count, confidence)
    q_low, q_high = wilson_interval(other_hits, other, confidence)
    # lower: p - q - sqrt((p - p_low)^2 + (q_high - q)^2); upper: the other two distances
    return p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def quantile_interval(values: Sequence[float], quantile: float, confidence: float) -> tuple[float, float]:
    """Return the order statistics between which a quantile lies, with at least that confidence.

    The number of values below the quantile is binomial, so no distribution is assumed. A bound is infinite where there
    are too few values.
    """
    ordered, tail = sorted(values), (1 - confidence) / 2
    count = len(ordered)
    below = int(stats.binom.ppf(tail, count, quantile))  # P(X <= below) >= tail, P(X <= below - 1) < tail
    above = int(stats.binom.ppf(1 - tail, count, quantile)) + 1  # P(X <= above - 1) >= 1 - tail
    low = ordered[below - 1] if below >= 1 else -math.inf
    return low, ordered[above - 1] if above <= count else math.inf
