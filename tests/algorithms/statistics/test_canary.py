"""Intervals against published figures and naive sums; the error over all looks; what share of ids is routed."""

from __future__ import annotations

import math
import random

import pytest
from scipy import stats

from tasks.algorithms.statistics import canary
from tasks.algorithms.statistics.canary import PROMOTE, ROLLBACK, WATCH, Samples

SLA = {"p95_latency_ms": 100.0, "accuracy_drop": 0.05, "confidence": 0.95}


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (3, 10), (81, 263), (10, 10)])
def test_wilson_is_scipy_s(hits: int, count: int) -> None:
    expected = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert canary.wilson_interval(hits, count, 0.95) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_difference_is_newcombe_s_own_example() -> None:
    """56/70 - 48/80, method 10 of table II."""
    assert canary.difference_interval(56, 70, 48, 80, 0.95) == pytest.approx((0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(("count", "quantile", "confidence"), [(100, 0.5, 0.95), (200, 0.95, 0.975), (30, 0.95, 0.9)])
def test_the_quantile_s_interval_covers_by_the_binomial_sum(count: int, quantile: float, confidence: float) -> None:
    values = [float(i) for i in range(1, count + 1)]  # the value is its rank
    low, high = canary.quantile_interval(values, quantile, confidence)

    def chance(ranks: range) -> float:
        return sum(math.comb(count, k) * quantile**k * (1 - quantile) ** (count - k) for k in ranks)

    below = 0 if low == -math.inf else int(low)
    above = count + 1 if high == math.inf else int(high)
    assert chance(range(below, above)) >= confidence
    assert chance(range(below)) <= (1 - confidence) / 2 < chance(range(below + 1))
    assert chance(range(above, count + 1)) <= (1 - confidence) / 2 + 1e-12


def test_the_median_of_a_hundred_lies_between_the_tabled_ranks() -> None:
    assert canary.quantile_interval([float(i) for i in range(1, 101)], 0.5, 0.95) == (40.0, 61.0)


def test_too_few_samples_leave_the_quantile_open() -> None:
    assert canary.quantile_interval([1.0] * 20, 0.95, 0.95)[1] == math.inf


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_the_share_of_ids_is_the_share_and_grows_without_a_change(share: float) -> None:
    count = 40_000
    chosen = {i for i in range(count) if canary.routed(str(i), "v0.0.2", share)}
    assert abs(len(chosen) - share * count) < 4 * math.sqrt(count * share * (1 - share))
    assert chosen <= {i for i in range(count) if canary.routed(str(i), "v0.0.2", 2 * share)}
    other = {i for i in range(count) if canary.routed(str(i), "v0.0.3", share)}
    assert (
        abs(len(chosen & other) - share**2 * count) < 4 * math.sqrt(share**2 * count) + 1
    )  # independent of each other


def test_the_least_and_the_largest_share() -> None:
    assert not any(canary.routed(str(i), "v", 0.0) for i in range(1000))
    assert all(canary.routed(str(i), "v", 1.0) for i in range(1000))


@pytest.mark.parametrize(
    ("samples", "number"), [(199, None), (200, 0), (399, 0), (400, 1), (799, 1), (800, 2), (200 * 2**20, 20)]
)
def test_looks_are_at_doubled_numbers(samples: int, number: int | None) -> None:
    assert canary.look(samples, 200) == number


def test_the_error_of_all_looks_and_both_figures_is_what_was_asked_for() -> None:
    spent = sum(2 * (1 - canary.confidence_at(number, 0.95)) for number in range(10_000))
    assert 0.0499 < spent < 0.05


def samples(count: int, accuracy: float, latency: float, seed: int = 0) -> Samples:
    generator = random.Random(seed)
    return Samples(
        [generator.expovariate(1) * latency / 3 for _ in range(count)],  # 95th percentile: about `latency`
        [generator.random() < accuracy for _ in range(count)],
    )


@pytest.mark.parametrize(
    ("accuracy", "latency", "verdict", "reason"),
    [
        (0.9, 50.0, PROMOTE, "both within"),
        (0.7, 50.0, ROLLBACK, "accuracy difference beyond"),
        (0.9, 200.0, ROLLBACK, "p95 latency (ms) beyond"),
        (0.85, 50.0, WATCH, "accuracy difference not yet"),
        (0.9, 100.0, WATCH, "p95 latency (ms) not yet"),
    ],
)
def test_verdicts(accuracy: float, latency: float, verdict: str, reason: str) -> None:
    found = canary.judge(samples(2000, accuracy, latency, 1), samples(4000, 0.9, 50.0, 2), **SLA, number=0)
    assert (found.verdict, found.reason[: len(reason)]) == (verdict, reason)


def test_noise_alone_seldom_rolls_back_however_often_it_is_looked_at() -> None:
    """A canary exactly at the limit of both figures; 600 of them are looked at five times each."""
    wrong, runs = 0, 600
    for run in range(runs):
        ours, theirs = samples(1600, 0.85, 99.86, 2 * run), samples(4000, 0.9, 50.0, 2 * run + 1)
        verdicts = [
            canary.judge(
                Samples(ours.latencies[: 100 * 2**k], ours.correct[: 100 * 2**k]), theirs, **SLA, number=k
            ).verdict
            for k in range(5)
        ]
        wrong += ROLLBACK in verdicts
    assert wrong / runs <= 0.05
