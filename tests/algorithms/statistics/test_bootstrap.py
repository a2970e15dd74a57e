"""The bootstrap against scipy's, a naive loop, the normal approximation, and its coverage on simulated documents."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from tasks.algorithms.errors import InputError
from tasks.algorithms.statistics import bootstrap
from tasks.algorithms.statistics.bootstrap import Sums


def documents(n: int, seed: int = 0, effect: float = 0.0, noise: float = 0.05) -> tuple[Sums, Sums]:
    """Two models on documents whose difficulty varies far more than the models differ; a is `effect` nats worse."""
    draw = np.random.default_rng(seed)
    predictions = draw.integers(20, 400, n)
    hard = draw.gamma(16, 0.25, n)  # nats per token, mean 4, deviation 1
    nll = [predictions * (hard + mean + noise * draw.standard_normal(n)) for mean in (effect, 0.0)]
    return tuple(Sums(np.arange(n), predictions, 4 * predictions, each) for each in nll)


def log_perplexity(sums: Sums) -> float:
    return sums.nll.sum() / sums.predictions.sum()


@pytest.mark.parametrize("measure", ["perplexity", "bits_per_byte"])
def test_an_interval_is_scipy_s(measure: str) -> None:
    sums, _ = documents(40)
    units = sums.predictions if measure == "perplexity" else sums.bytes * math.log(2)

    def figure(nll, units, axis):
        mean = nll.sum(axis) / units.sum(axis)
        return np.exp(mean) if measure == "perplexity" else mean

    expected = scipy.stats.bootstrap(
        (sums.nll, units), figure, paired=True, vectorized=True, n_resamples=40_000, method="BCa", rng=1
    ).confidence_interval
    found = bootstrap.interval(sums, np.random.default_rng(2), measure, 40_000)
    width = expected.high - expected.low
    assert found.value == pytest.approx(figure(sums.nll, units, 0))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03 * width)


def test_the_resamples_of_a_pair_are_those_of_a_naive_loop() -> None:
    a, b = documents(7)
    columns = np.stack([a.nll, a.predictions, b.nll, b.predictions])
    drawn = bootstrap._resample(columns, np.random.default_rng(3), 50)
    counts = np.random.default_rng(3).multinomial(7, np.full(7, 1 / 7), size=50)
    for resample, count in zip(drawn.T, counts, strict=True):
        chosen = [document for document in range(7) for _ in range(count[document])]
        assert len(chosen) == 7
        assert resample == pytest.approx([sum(column[i] for i in chosen) for column in columns])


def test_groups_of_neighbours_give_nearly_the_interval_of_single_documents(monkeypatch) -> None:
    a, b = documents(1000, effect=0.02)
    single = bootstrap.compare(a, b, np.random.default_rng(0))
    monkeypatch.setattr(bootstrap, "GROUPS", 300)
    grouped = bootstrap.compare(a, b, np.random.default_rng(0))
    assert (grouped.ratio, grouped.documents) == (single.ratio, 1000)
    assert grouped.high - grouped.low == pytest.approx(single.high - single.low, rel=0.15)


def test_many_documents_agree_with_the_normal_approximation() -> None:
    """The delta method: the variance of a ratio of sums is that of its residuals over the squared sum."""
    a, b = documents(5_000, effect=0.01)
    found = bootstrap.compare(a, b, np.random.default_rng(0))
    total, value = a.predictions.sum(), log_perplexity(a) - log_perplexity(b)
    error = math.sqrt(((a.nll - b.nll - value * a.predictions) ** 2).sum()) / total
    ends = [math.exp(value + z * error) for z in (-1.959964, 1.959964)]
    assert found.ratio == pytest.approx(math.exp(value))
    assert (found.low, found.high) == pytest.approx(ends, abs=0.05 * (ends[1] - ends[0]))
    assert found.verdict == "worse" and found.documents == 5_000


def test_pairing_is_what_makes_a_small_difference_visible() -> None:
    a, b = documents(60, effect=0.03, noise=0.02)
    paired = bootstrap.compare(a, b, np.random.default_rng(0))
    alone = [bootstrap.interval(each, np.random.default_rng(0)) for each in (a, b)]
    assert paired.verdict == "worse"
    assert alone[0].low < alone[1].high  # their own intervals overlap widely
    assert paired.change_high - paired.change_low < 0.1 * (alone[0].high - alone[0].low)


def test_the_other_way_round_is_the_reciprocal_and_the_opposite_verdict() -> None:
    a, b = documents(50, effect=0.1)
    one, other = (bootstrap.compare(*pair, np.random.default_rng(0)) for pair in ((a, b), (b, a)))
    assert (one.verdict, other.verdict) == ("worse", "better")
    assert (one.ratio, one.change) == pytest.approx((1 / other.ratio, -other.change))
    assert (one.low, one.high) == pytest.approx((1 / other.high, 1 / other.low), rel=1e-3)


@pytest.mark.parametrize("effect", [0.0, 0.03])
def test_coverage_on_simulated_documents(effect: float) -> None:
    """Of 400 test sets of 40 documents, 95 % of the intervals hold the truth (binomial 99.9 %: 91 to 98.5 %)."""
    held = 0
    for seed in range(400):
        a, b = documents(40, seed + 1, effect)
        found = bootstrap.compare(a, b, np.random.default_rng(seed), 1000)
        held += found.low <= math.exp(effect) <= found.high
    assert 0.91 <= held / 400 <= 0.985


def test_equal_models_and_those_equal_up_to_a_constant() -> None:
    a, _ = documents(20)
    same = bootstrap.compare(a, a, np.random.default_rng(0))
    assert (same.ratio, same.low, same.high, same.change, same.verdict) == (1, 1, 1, 0, "no difference")
    worse = bootstrap.compare(a._replace(nll=a.nll + 0.1 * a.predictions), a, np.random.default_rng(0))
    assert (worse.low, worse.high) == pytest.approx((math.exp(0.1), math.exp(0.1)))
    assert worse.verdict == "worse"


def test_other_vocabularies_are_compared_by_bits_per_byte_on_the_documents_of_both() -> None:
    a, b = documents(30, effect=0.2)
    other = Sums(b.document[:25], b.predictions[:25] // 2, b.bytes[:25], b.nll[:25])
    found = bootstrap.compare(a, other, np.random.default_rng(0))
    expected = [each.nll[:25].sum() / math.log(2) / each.bytes[:25].sum() for each in (a, other)]
    assert (found.measure, found.documents) == ("bits_per_byte", 25)
    assert (found.a, found.b) == pytest.approx(expected)
    assert (found.ratio, found.change) == pytest.approx((expected[0] / expected[1], expected[0] - expected[1]))


def test_one_document_says_nothing_and_none_is_refused() -> None:
    a, b = documents(1, effect=1.0)
    found = bootstrap.compare(a, b, np.random.default_rng(0))
    assert math.isnan(found.low) and found.verdict == "no difference"
    with pytest.raises(InputError, match="no document was scored by both"):
        bootstrap.compare(a, Sums(np.array([5]), *b[1:]), np.random.default_rng(0))


def test_the_same_seed_gives_the_same_interval() -> None:
    a, b = documents(30)
    assert len({bootstrap.compare(a, b, np.random.default_rng(4)) for _ in range(2)}) == 1
