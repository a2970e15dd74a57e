"""Judge a candidate model against the promoted one: ACCEPT, REGRESSION, ANOMALOUS, INFEASIBLE or UNDECIDED.

Pure: figures and limits in, a verdict and every check with its value, limit and margin out. It measures nothing, and
knows neither files nor where the figures come from (`tasks.nightly.judgement` gathers them).

A figure with noise is an interval. It fails where the whole interval lies beyond the limit and holds where the whole
interval lies within it, which is a test for non-inferiority at the interval's confidence. Between the two the data
can't tell: UNDECIDED neither promotes nor rejects. What was not measured is shown as such; only perplexity has to be
measured before anything is accepted.

Verdicts in the order in which they win: ANOMALOUS (the figures can't be trusted: too good to be true, altered files,
test text in the training text), INFEASIBLE (does not fit the device or the bytes), REGRESSION (proven worse than the
limits allow), UNDECIDED, ACCEPT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ACCEPT, REGRESSION, ANOMALOUS, INFEASIBLE, UNDECIDED = VERDICTS = (
    "ACCEPT",
    "REGRESSION",
    "ANOMALOUS",
    "INFEASIBLE",
    "UNDECIDED",
)
PRECEDENCE = (ANOMALOUS, INFEASIBLE, REGRESSION)
"""The verdict is the first of these that a failed check leads to."""
HOLDS, FAILS, OPEN, NOT_MEASURED = "holds", "fails", "undecided", "not measured"
FITS, FITS_STREAMING, DOES_NOT_FIT = "FITS", "FITS_STREAMING", "DOES_NOT_FIT"
ROUNDING = 1e-6
"""By this relative difference the order of summation can move the perplexity of the same weights."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence bounds; a figure without noise has all three equal."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Interval:
        """Make the interval of a figure without noise."""
        return cls(value, value, value)


@dataclass(frozen=True)
class Figures:
    """The figures of one model; None and missing keys stand for what was not measured.

    Attributes:
        perplexity: split -> perplexity per token.
        tokens: what the perplexities are of (protocol, vocabulary, text): figures of other tokens don't compare.
        bytes: size of the folder to ship.
        least_bytes: what its content must take at least.
        fit: the device's verdict.
        fit_term: the device and what limits it there, such as "siracusa, mram: weights".
        fit_margin: bytes free on the device, negative where they are missing.
        tasks: name -> accuracy, 0 to 1.
        seconds_per_token: the median of generation at batch 1.
        files: name -> sha256 of every file but the manifest.
        altered: files that are not what their manifest says.
        overlap: kind -> share of the test text that stands in the training text, 0 to 1.
    """

    perplexity: Mapping[str, float] = field(default_factory=dict)
    tokens: str | None = None
    bytes: int | None = None
    least_bytes: float | None = None
    fit: str | None = None
    fit_term: str | None = None
    fit_margin: int | None = None
    tasks: Mapping[str, float] = field(default_factory=dict)
    seconds_per_token: float | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    altered: tuple[str, ...] = ()
    overlap: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The candidate against another model, on the same documents.

    Attributes:
        perplexity: split -> candidate's perplexity by the other's; a split without common predictions is left out.
        task_drop: name -> the other's accuracy less the candidate's.
        latency: candidate's seconds per token by the other's, on the same host.
    """

    perplexity: Mapping[str, Interval] = field(default_factory=dict)
    task_drop: Mapping[str, Interval] = field(default_factory=dict)
    latency: Interval | None = None


@dataclass(frozen=True)
class Limits:
    """Section `gate` of params.yaml (`tasks.parameters.operation_sections.Gate` has the units).

    Attributes:
        perplexity_ratio: split -> most that the candidate's perplexity may be of the promoted model's.
        fetched_ratio: split -> most that it may be of the fetched model's.
        dense_ratio: split -> least that it may be of the dense model with the same recovery.
        overlap: kind -> largest share.
    """

    perplexity_ratio: Mapping[str, float]
    fetched_ratio: Mapping[str, float]
    dense_ratio: Mapping[str, float]
    task_drop: float
    bytes_ratio: float
    max_bytes: int | None
    latency_ratio: float
    streaming: bool
    overlap: Mapping[str, float]


@dataclass(frozen=True)
class Check:
    """One limit, and how the candidate stands to it.

    Attributes:
        name: what is limited.
        leads_to: the verdict where it fails.
        outcome: HOLDS, FAILS, OPEN or NOT_MEASURED.
        value, limit: a number, or words where the check is of a fact.
        margin: room left to the limit in the value's unit, negative beyond it; None where there is no number.
        low, high: confidence bounds of the value.
        required: without it nothing is accepted.
    """

    name: str
    leads_to: str
    outcome: str
    value: float | str | None
    limit: float | str
    margin: float | None = None
    low: float | None = None
    high: float | None = None
    required: bool = False

    def row(self) -> dict[str, Any]:
        """Return plain data: check, leads_to, outcome, value, low, high, limit, margin."""
        shown = {"check": self.name, "leads_to": self.leads_to, "outcome": self.outcome, "value": self.value}
        return shown | {"low": self.low, "high": self.high, "limit": self.limit, "margin": self.margin}


@dataclass(frozen=True)
class Verdict:
    """The outcome for a candidate, a sentence that says why, and every check."""

    verdict: str
    reason: str
    checks: tuple[Check, ...]


def judge(
    candidate: Figures,
    promoted: Figures | None,
    limits: Limits,
    against_promoted: Comparison,
    against_base: Comparison,
    against_dense: Comparison,
) -> Verdict:
    """Hold a candidate to every limit.

    Args:
        promoted: None where no model is promoted yet; then only the limits without one apply.
        against_base: the fetched model; it bounds what a chain of small regressions can add up to.
        against_dense: the best dense reference, which a compressed model can hardly beat.
    """
    checks = [
        *_trust(candidate, limits, against_dense),
        *_feasible(candidate, limits),
        *_quality("fetched", limits.fetched_ratio, against_base, required=promoted is None),
    ]
    if promoted:
        checks += _identity(candidate, promoted)
        checks += _quality("promoted", limits.perplexity_ratio, against_promoted, required=True)
        checks += _cost(candidate, promoted, limits, against_promoted)
    return _verdict(tuple(checks))


def at_most(name: str, leads_to: str, measured: Interval | None, limit: float, required: bool = False) -> Check:
    """Check that the figure is not above the limit."""
    if measured is None:
        return Check(name, leads_to, NOT_MEASURED, None, limit, required=required)
    # non-inferiority: the whole interval decides, not its middle
    outcome = HOLDS if measured.high <= limit else FAILS if measured.low > limit else OPEN
    return _numbers(name, leads_to, outcome, measured, limit, limit - measured.value, required)


def at_least(name: str, leads_to: str, measured: Interval | None, limit: float, required: bool = False) -> Check:
    """Check that the figure is not below the limit."""
    if measured is None:
        return Check(name, leads_to, NOT_MEASURED, None, limit, required=required)
    outcome = HOLDS if measured.low >= limit else FAILS if measured.high < limit else OPEN
    return _numbers(name, leads_to, outcome, measured, limit, measured.value - limit, required)


def fact(name: str, leads_to: str, holds: bool | None, value: str, limit: str, margin: int | None = None) -> Check:
    """Check what is either so or not; None: not measured. A margin is in bytes."""
    outcome = NOT_MEASURED if holds is None else HOLDS if holds else FAILS
    return Check(name, leads_to, outcome, value, limit, margin)


def _numbers(
    name: str, leads_to: str, outcome: str, measured: Interval, limit: float, margin: float, required: bool
) -> Check:
    if not math.isfinite(measured.value):
        outcome = FAILS  # a NaN compares as neither, which would say "undecided"
    return Check(name, leads_to, outcome, measured.value, limit, margin, measured.low, measured.high, required)


def _trust(candidate: Figures, limits: Limits, against_dense: Comparison) -> Iterator[Check]:
    files = candidate.files
    altered = ", ".join(candidate.altered)
    yield fact("files", ANOMALOUS, not altered if files else None, altered or "intact", "as the manifest says")
    for split in limits.dense_ratio:
        value = candidate.perplexity.get(split)
        possible = None if value is None else math.isfinite(value) and value >= 1
        yield fact(f"perplexity possible, {split}", ANOMALOUS, possible, _short(value), "at least 1, finite")
    for split, limit in limits.dense_ratio.items():
        ratio = against_dense.perplexity.get(split)
        yield at_least(f"perplexity by dense model's, {split}", ANOMALOUS, ratio, limit)
    for kind, limit in limits.overlap.items():
        yield at_most(f"test text in training text, {kind}", ANOMALOUS, _exact(candidate.overlap.get(kind)), limit)
    if candidate.least_bytes is not None:
        yield at_least("bytes by their content's", ANOMALOUS, _ratio(candidate.bytes, candidate.least_bytes), 1.0)


def _feasible(candidate: Figures, limits: Limits) -> Iterator[Check]:
    allowed = (FITS, FITS_STREAMING) if limits.streaming else (FITS,)
    fits = candidate.fit in allowed if candidate.fit in (FITS, FITS_STREAMING, DOES_NOT_FIT) else None
    value = f"{candidate.fit} ({candidate.fit_term})" if candidate.fit_term else f"{candidate.fit}"
    yield fact("fits the device", INFEASIBLE, fits, value, " or ".join(allowed), candidate.fit_margin)
    if limits.max_bytes is not None:
        yield at_most("bytes", INFEASIBLE, _exact(candidate.bytes), limits.max_bytes)


def _identity(candidate: Figures, promoted: Figures) -> Iterator[Check]:
    """Check that other weights have other figures, and the same weights the same ones."""
    shared = candidate.perplexity.keys() & promoted.perplexity.keys()
    if not shared or not candidate.files or not promoted.files or candidate.tokens != promoted.tokens:
        yield fact("figures belong to the weights", ANOMALOUS, None, "not comparable", "same weights, same figures")
        return
    pairs = [(candidate.perplexity[split], promoted.perplexity[split]) for split in sorted(shared)]
    if candidate.files == promoted.files:
        close = all(math.isclose(*pair, rel_tol=ROUNDING) for pair in pairs)
        said = "same files, same figures" if close else "same files, other figures"
        yield fact("figures belong to the weights", ANOMALOUS, close, said, "same files, same figures")
    elif _weights(candidate) and _weights(candidate) == _weights(promoted):  # another chat template, say
        yield fact("figures belong to the weights", ANOMALOUS, True, "same weights", "other weights, other figures")
    else:
        differ = any(ours != theirs for ours, theirs in pairs)
        said = "other files, other figures" if differ else "other files, identical figures"
        yield fact("figures belong to the weights", ANOMALOUS, differ, said, "other files, other figures")


def _weights(figures: Figures) -> dict[str, str]:
    return {name: digest for name, digest in figures.files.items() if name.endswith(".safetensors")}


def _quality(other: str, limits: Mapping[str, float], comparison: Comparison, required: bool) -> Iterator[Check]:
    for split, limit in limits.items():
        name = f"perplexity by {other} model's, {split}"
        yield at_most(name, REGRESSION, comparison.perplexity.get(split), limit, required)


def _cost(candidate: Figures, promoted: Figures, limits: Limits, comparison: Comparison) -> Iterator[Check]:
    for task in sorted(candidate.tasks.keys() | promoted.tasks.keys()):
        yield at_most(f"accuracy lost, {task}", REGRESSION, comparison.task_drop.get(task), limits.task_drop)
    sizes = _ratio(candidate.bytes, promoted.bytes)
    yield at_most("bytes by promoted model's", REGRESSION, sizes, limits.bytes_ratio)
    yield at_most("seconds per token by promoted model's", REGRESSION, comparison.latency, limits.latency_ratio)


def _verdict(checks: tuple[Check, ...]) -> Verdict:
    for verdict in PRECEDENCE:
        if failed := [check for check in checks if check.outcome == FAILS and check.leads_to == verdict]:
            return Verdict(verdict, "; ".join(map(sentence, failed)), checks)
    missing = [check for check in checks if check.required and check.outcome == NOT_MEASURED]
    if missing:
        return Verdict(UNDECIDED, f"not measured: {'; '.join(check.name for check in missing)}", checks)
    if undecided := [check for check in checks if check.outcome == OPEN]:
        return Verdict(UNDECIDED, "; ".join(map(sentence, undecided)), checks)
    return Verdict(ACCEPT, f"all of {sum(check.outcome == HOLDS for check in checks)} measured limits hold", checks)


def sentence(check: Check) -> str:
    """Write a check as text: "perplexity by promoted model's, test: 1.234 (1.1 to 1.3), limit 1.02"."""
    bounds = "" if check.low == check.high else f" ({_short(check.low)} to {_short(check.high)})"
    if isinstance(check.value, str) and check.margin is not None and check.margin < 0:
        bounds = f" by {-check.margin:,} bytes"
    return f"{check.name}: {_short(check.value)}{bounds}, limit {_short(check.limit)}"


def _short(value: float | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _exact(value: float | None) -> Interval | None:
    return None if value is None else Interval.exact(value)


def _ratio(value: float | None, by: float | None) -> Interval | None:
    return Interval.exact(value / by) if value is not None and by else None
