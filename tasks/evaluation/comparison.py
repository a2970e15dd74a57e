"""What the package is worth: against a plain model of equal size, and how much of the pruning recovery made up for.

Pure: evaluations in (`tasks.evaluation.results.read`), figures and sentences out. Two models are compared by perplexity
where both predict the same tokens by the same protocol, otherwise (another vocabulary) by bits per byte. A difference
counts where its interval over documents says so (`tasks.algorithms.statistics.bootstrap`); evaluations without sums per
document have no interval, and MARGIN stands in for it. It measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tasks.algorithms.statistics import bootstrap
from tasks.algorithms.statistics.bootstrap import (
    BETTER,
    BITS_PER_BYTE,
    NO_DIFFERENCE,
    PERPLEXITY,
    WORSE,
    Difference,
    Interval,
)

SPLITS = ("test", "test_ood")
DOMAINS = {"test": "in domain", "test_ood": "out of domain"}
"""What the splits are meant to be, said where stage overlap measured nothing."""
FETCHED, RECOVERED_DENSE, PACKAGE, PLAINLY_QUANTISED = "fetch", "baseline_lora", "package", "baseline"
"""The evaluated models that the report is about: as fetched, recovered without pruning, shipped, plainly quantised."""
PLAIN_MODELS = (RECOVERED_DENSE, PLAINLY_QUANTISED)
MARGIN = 0.005
"""Ratios no further from 1 are no difference, where there is no interval."""
SEED = 0
"""Of the resamples, so that the same documents give the same interval."""
EQUAL_SIZE = 0.02
"""Sizes whose ratio is no further from 1 are called equal."""

Metrics = Mapping[str, Any]


class Comparison(NamedTuple):
    """One split of the package and of the plain model, by one measure (lower is better).

    `difference` is the paired one over documents, by the same measure; None where it isn't known.
    """

    measure: str
    package: float
    plain: float
    difference: Difference | None = None

    @property
    def outcome(self) -> str:
        """ "better", "worse" (of the package) or "no difference"."""
        if self.difference:
            return self.difference.verdict
        low, high = sorted((self.package, self.plain))
        if high <= low * (1 + MARGIN):
            return NO_DIFFERENCE
        return BETTER if self.package < self.plain else WORSE


class Share(NamedTuple):
    """How much of the gap to a reference recovery closed on a split; `closed` is None where there was no gap."""

    split: str
    reference: str
    measure: str
    before: float
    after: float
    goal: float
    closed: float | None


def title(name: str) -> str:
    """The name of an evaluated model in a table: the plain ones are marked."""
    return f"plain: {name}" if name in PLAIN_MODELS else name


def measure(models: Sequence[Metrics], split: str) -> str | None:
    """By what these models can be compared on a split, None if by nothing.

    Perplexity where protocol and number of predicted tokens are the same, else bits per byte by the same protocol.
    """
    if not models or not all(model.get("evaluated") for model in models):
        return None
    if len({model.get("protocol") for model in models}) > 1:
        return None
    tokens = {model.get("predictions", {}).get(split) for model in models}
    if len(tokens) == 1 and all(_known(model, PERPLEXITY, split) for model in models):
        return PERPLEXITY
    return BITS_PER_BYTE if all(_known(model, BITS_PER_BYTE, split) for model in models) else None


def compare(package: Metrics, plain: Metrics) -> dict[str, Comparison]:
    """By split; one that can't be compared is left out."""
    found = {}
    for split in SPLITS:
        if scale := measure([package, plain], split):
            pair = [model[scale][split] for model in (package, plain)]
            if math.isfinite(min(pair)):  # two infinite ones say nothing
                measured = difference(package, plain, split)
                found[split] = Comparison(scale, *pair, measured if measured and measured.measure == scale else None)
    return found


def difference(a: Metrics, b: Metrics, split: str) -> Difference | None:
    """The paired difference of two models over the documents of a split, None where it can't be known.

    It can't without two documents that both were scored on by the same protocol, or with infinite perplexities.
    """
    if measure([a, b], split) is None:
        return None
    pair = [model.get("documents", {}).get(split) for model in (a, b)]
    if None in pair or len(np.intersect1d(pair[0].document, pair[1].document)) < 2:
        return None
    found = bootstrap.compare(*pair, np.random.default_rng(SEED))
    return found if math.isfinite(found.low) and math.isfinite(found.high) else None


def interval(model: Metrics, split: str, scale: str = PERPLEXITY) -> Interval | None:
    """A model's own perplexity or bits per byte on a split; None where it can't be known."""
    documents = model.get("documents", {}).get(split)
    if documents is None or len(documents.document) < 2:
        return None
    found = bootstrap.interval(documents, np.random.default_rng(SEED), scale)
    return found if math.isfinite(found.low) and math.isfinite(found.high) else None


def places(model: Metrics, splits: Sequence[str]) -> dict[str, str]:
    """How a sentence names the splits: "in domain", "out of domain" as stage overlap found them, else as they're meant.

    Splits of one domain are "on test", "on test_ood".
    """
    named = {split: model.get("domains", DOMAINS)[split].replace("-", " ") for split in splits}
    return named if len(set(named.values())) == len(named) else {split: f"on {split}" for split in splits}


def sentence(package: Metrics, plain: Metrics, changes: Sequence[str], same_recovery: bool) -> str:
    """What the pruned package scores against a plain model of its size, the result first.

    Args:
        package, plain: evaluations; `plain` is not evaluated where the baseline is switched off.
        changes: parameters that give the plain model (`way_out`), named where it is better and not worse anywhere.
        same_recovery: False where the package had recovery and the plain model had none.
    """
    if not package.get("evaluated"):
        return "Not compared with a plain model (evaluate is switched off)."
    if not plain.get("evaluated"):
        return "Not compared with a plain model of equal size."
    found = compare(package, plain)
    if not found:
        return "Not compared with a plain model (the two have no common measure)."
    outcomes = {split: comparison.outcome for split, comparison in found.items()}
    text = f"{result(package, plain)}: {_values(found, package, plain, same_recovery)}"
    if WORSE not in outcomes.values() or BETTER in outcomes.values():
        return f"{text}."
    advice = f": {', '.join(changes)}" if changes else ""
    return f"{text}; plain quantisation is better here{advice}."


def result(package: Metrics, plain: Metrics) -> str:
    """ "Better than plain quantisation of equal size", or a result for each split where they differ.

    Both must be evaluated and comparable (`compare`).
    """
    outcomes = {split: comparison.outcome for split, comparison in compare(package, plain).items()}
    return _result(outcomes, places(package, list(outcomes)), _size(package, plain))


def way_out(parameters: Mapping[str, Any], plain_bytes: int | None) -> list[str]:
    """The parameters to change for a plain model of the same size, as "section.name value".

    Args:
        parameters: sections that shaped the package, as the manifest has them.
        plain_bytes: bytes of the plain model's packed linears.
    """
    wanda, depth, gptq, eora = (parameters.get(name, {}) for name in ("wanda", "depth_prune", "gptq", "eora"))
    changes = ["wanda.enabled false"] if wanda.get("enabled") else []
    changes += ["depth_prune.remove 0"] if depth.get("enabled") and depth.get("remove") else []
    changes += ["eora.enabled false"] if eora.get("enabled") else []
    changes += ["gptq.joint null"] if gptq.get("joint") else []
    if gptq.get("enabled") and plain_bytes and gptq.get("budget_bytes") != plain_bytes:
        changes.append(f"gptq.budget_bytes {plain_bytes}")
    return changes


def recovery(metrics: Mapping[str, Metrics]) -> list[Share]:
    """What recovery (wanda to lora) closed of the gap to the fetched and to the equally recovered dense model."""
    shares = []
    for split in SPLITS:
        for reference in (FETCHED, RECOVERED_DENSE):
            models = [metrics.get(name, {}) for name in ("wanda", "lora", reference)]
            scale = measure(models, split)
            values = [model[scale][split] for model in models] if scale else [math.inf]
            if all(map(math.isfinite, values)):
                before, after, goal = values
                gap = before - goal
                shares.append(Share(split, reference, scale, *values, (before - after) / gap if gap > 0 else None))
    return shares


def score(value: float) -> str:
    """Four significant digits: "42.38", "278.3", "12,345", "infinite"."""
    if not math.isfinite(value):
        return "infinite"
    digits = 3 - math.floor(math.log10(value)) if value > 0 else 3
    return f"{value:,.{min(max(digits, 0), 9)}f}"


def _known(model: Metrics, scale: str, split: str) -> bool:
    value = model.get(scale, {}).get(split)
    return value is not None and not math.isnan(value)


def _size(package: Metrics, plain: Metrics) -> str:
    """How the plain model's size relates to the package's."""
    ratio = plain["bytes"]["total"] / package["bytes"]["total"]
    if abs(ratio - 1) <= EQUAL_SIZE:
        return "plain quantisation of equal size"
    return f"plain quantisation in {100 * abs(ratio - 1):.1f} % {'fewer' if ratio < 1 else 'more'} bytes"


def _result(outcomes: Mapping[str, str], named: Mapping[str, str], other: str) -> str:
    """ "Better than OTHER", or a result for each split where they differ."""
    words = {BETTER: "better than", WORSE: "worse than", NO_DIFFERENCE: "no difference to"}
    if len(set(outcomes.values())) == 1:
        (outcome,) = set(outcomes.values())
        return f"{words[outcome].capitalize()} {other}"
    (first, one), (second, two) = outcomes.items()
    return f"{words[one].capitalize()} {other} {named[first]}, {two} {named[second]}"


def _values(found: Mapping[str, Comparison], package: Metrics, plain: Metrics, same_recovery: bool) -> str:
    (split, first), *others = found.items()
    kind = "plain GPTQ" if same_recovery else "plain GPTQ without recovery"
    text = f"{first.measure.replace('_', ' ')} {score(first.package)} in {package['bytes']['total']:,} bytes, "
    text += f"{kind} {score(first.plain)} in {plain['bytes']['total']:,} bytes ({split}"
    text += f", {package['domains'][split]}" if "domains" in package else ""
    text += f", {_ratio(first.difference)}" if first.difference else ""
    named = places(package, list(found))
    for name, each in others:
        scale = "" if each.measure == first.measure else f"{each.measure.replace('_', ' ')} "
        text += f"; {named[name]} {scale}{score(each.package)} against {score(each.plain)}"
        text += f", {_ratio(each.difference)}" if each.difference else ""
    return f"{text})"


def _ratio(found: Difference) -> str:
    """ "ratio 0.856, 95 % interval 0.846 to 0.867"."""
    share = f"{100 * bootstrap.CONFIDENCE:.0f} %"
    return f"ratio {score(found.ratio)}, {share} interval {score(found.low)} to {score(found.high)}"
