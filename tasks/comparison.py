"""What the package is worth: against a plain model of equal size, and how much of the pruning recovery made up for.

Pure: evaluations in (metrics.json of stage evaluate), figures and sentences out. Two models are compared by perplexity
where both predict the same tokens by the same protocol, otherwise (another vocabulary) by bits per byte. It measures
nothing, and test noise beyond MARGIN is not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SPLITS = ("test", "test_ood")
DOMAINS = {"test": "in domain", "test_ood": "out of domain"}
BASE, RECOVERED, PACKAGE, PLAIN = "fetch", "baseline_lora", "package", "baseline"
"""The evaluated models that the report is about: as fetched, recovered without pruning, shipped, plainly quantised."""
PLAIN_MODELS = (RECOVERED, PLAIN)
MARGIN = 0.005
"""Ratios no further from 1 are no difference."""
EQUAL_SIZE = 0.02
"""Sizes whose ratio is no further from 1 are called equal."""
PERPLEXITY, BITS_PER_BYTE = "perplexity", "bits_per_byte"

Metrics = Mapping[str, Any]


class Comparison(NamedTuple):
    """One split of the package and of the plain model, by one measure (lower is better)."""

    measure: str
    package: float
    plain: float

    @property
    def outcome(self) -> str:
        """ "better", "worse" (of the package) or "no difference"."""
        low, high = sorted((self.package, self.plain))
        if high <= low * (1 + MARGIN):
            return "no difference"
        return "better" if self.package < self.plain else "worse"


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
                found[split] = Comparison(scale, *pair)
    return found


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
    if "worse" not in outcomes.values() or "better" in outcomes.values():
        return f"{text}."
    advice = f": {', '.join(changes)}" if changes else ""
    return f"{text}; plain quantisation is better here{advice}."


def result(package: Metrics, plain: Metrics) -> str:
    """ "Better than plain quantisation of equal size", or a result for each split where they differ.

    Both must be evaluated and comparable (`compare`).
    """
    outcomes = {split: comparison.outcome for split, comparison in compare(package, plain).items()}
    return _result(outcomes, _size(package, plain))


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
        for reference in (BASE, RECOVERED):
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


def _result(outcomes: Mapping[str, str], other: str) -> str:
    """ "Better than OTHER", or a result for each split where they differ."""
    words = {"better": "better than", "worse": "worse than", "no difference": "no difference to"}
    if len(set(outcomes.values())) == 1:
        (outcome,) = set(outcomes.values())
        return f"{words[outcome].capitalize()} {other}"
    (first, one), (second, two) = outcomes.items()
    return f"{words[one].capitalize()} {other} {DOMAINS[first]}, {two} {DOMAINS[second]}"


def _values(found: Mapping[str, Comparison], package: Metrics, plain: Metrics, same_recovery: bool) -> str:
    (split, first), *others = found.items()
    kind = "plain GPTQ" if same_recovery else "plain GPTQ without recovery"
    text = f"{first.measure.replace('_', ' ')} {score(first.package)} in {package['bytes']['total']:,} bytes, "
    text += f"{kind} {score(first.plain)} in {plain['bytes']['total']:,} bytes ({split}"
    for name, each in others:
        scale = "" if each.measure == first.measure else f"{each.measure.replace('_', ' ')} "
        text += f"; {DOMAINS[name]} {scale}{score(each.package)} against {score(each.plain)}"
    return f"{text})"
