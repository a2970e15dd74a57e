"""The result in plain sentences, the most important first: what a team reads before anything else.

The first one says all in short: size, perplexity, against plain quantisation of equal size, and where it fits. The
others give each of these with its reference. Pure; figures are those of `tasks.reporting.figures`, judgement against
the plain model is `tasks.evaluation.comparison`'s.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tasks.evaluation import comparison
from tasks.evaluation.comparison import FETCHED, PACKAGE, PLAINLY_QUANTISED
from tasks.reporting.figures import FITTING
from tasks.reporting.format import change, mebibytes, number

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence

NAMED = 3
"""At most so many devices are named in the first sentence."""


def verdict(evidence: Evidence, found: dict[str, Any]) -> list[str]:
    """The result in plain sentences; `found` are the report's figures."""
    sentences = [headline(evidence, found), plain_sentence(evidence), fit_sentence(evidence)]
    sentences += [_size_sentence(found), _perplexity_sentence(evidence)]
    if evidence.fit_checked:
        sentences.append(_bound_sentence(evidence.fit))
    if evidence.pattern_broken:
        sentences.append(pattern_sentence(evidence))
    return sentences


def headline(evidence: Evidence, found: dict[str, Any]) -> str:
    """Size, perplexity, against plain quantisation and where it fits; what is not known is said to be so."""
    parts = [_short_size(found), _short_perplexity(evidence)]
    if parts == [None, None]:
        parts = ["the package was not evaluated (evaluate is switched off)"]
    parts.append(_short_plain(evidence) or "not compared with a plain model of equal size")
    text = "; ".join([*filter(None, parts), devices(evidence.fit)]) + "."
    return text[0].upper() + text[1:]


def _short_size(found: dict[str, Any]) -> str | None:
    if "compression_vs_stored" not in found:
        return None
    ratio = found["compression_vs_stored"]
    compared = f"{ratio:.1f} times smaller than" if ratio >= 1 else f"{1 / ratio:.1f} times larger than"
    return f"{compared} the fetched model ({found['package_bytes']:,} bytes)"


def _short_perplexity(evidence: Evidence) -> str | None:
    compared = comparison.compare(evidence.model(PACKAGE), evidence.model(FETCHED))
    if not compared:
        return None
    split, each = next(iter(compared.items()))
    measure = each.measure.replace("_", " ")
    return f"{measure} {comparison.score(each.package)} on {split} (fetched {comparison.score(each.plain)})"


def _short_plain(evidence: Evidence) -> str | None:
    compared = comparison.compare(evidence.model(PACKAGE), evidence.model(PLAINLY_QUANTISED))
    if not compared:
        return None
    words = comparison.result(evidence.model(PACKAGE), evidence.model(PLAINLY_QUANTISED))
    return f"{words[0].lower()}{words[1:]} (plain {comparison.score(next(iter(compared.values())).plain)})"


def devices(fit: dict[str, Any]) -> str:
    """ "fits siracusa and 5 of 7 other devices"."""
    if fit["verdict"] == "NOT_CHECKED":
        return "not checked against a device (hardware_fit is switched off)"
    rows = fit["all_devices"]
    fitting = [row["device"] for row in rows if row["verdict"] in FITTING]
    chosen = f"{'fits' if fit['verdict'] in FITTING else 'does not fit'} {fit['device']}"
    others = [name for name in fitting if name != fit["device"]]
    if not others:
        return chosen if len(rows) < 2 else f"{chosen}, and none of {len(rows) - 1} other devices"
    counted = "all" if len(others) == len(rows) - 1 else f"{len(others)} of"
    names = ", ".join(others) if len(others) <= NAMED else f"{counted} {len(rows) - 1} other devices"
    return f"{chosen} and {names}" if fit["verdict"] in FITTING else f"{chosen}, but {names}"


def plain_sentence(evidence: Evidence) -> str:
    """What the package scores against a plain model of its size."""
    parameters = evidence.lineage.get("parameters", {})
    size = int(evidence.bits["bytes"].sum()) if not evidence.bits.empty else None
    same = evidence.history.empty or not evidence.plain_history.empty
    changes = comparison.way_out(parameters, size)
    return comparison.sentence(evidence.model(PACKAGE), evidence.model(PLAINLY_QUANTISED), changes, same)


def fit_sentence(evidence: Evidence) -> str:
    """Whether the packaged model fits the chosen device."""
    fit = evidence.fit
    if not evidence.fit_checked:
        return "The packaged model was not checked against a device (hardware_fit is switched off)."
    term = fit["limiting_term"]
    if fit["verdict"] in FITTING:
        how = " by streaming weights" if fit["verdict"] == "FITS_STREAMING" else ""
        return (
            f"The packaged model fits {fit['device']}{how}: {number(fit['headroom_bytes'])} bytes stay free ({term})."
        )
    return f"The packaged model does not fit {fit['device']}: {number(fit['bytes_over'])} bytes over ({term})."


def _bound_sentence(fit: dict[str, Any]) -> str:
    speed, base = fit["tokens_per_second"], fit.get("fetched")
    bound = f"At most {number(speed['bound'], 0)} tokens per second there, limited by {speed['limited_by']}"
    if base and base["verdict"] in FITTING:
        bound += "; the fetched model in bf16 would fit, too"
    elif base:
        over, term = base["bytes_over"], base["limiting_term"]
        bound += f"; the fetched model in bf16 would be {number(over)} bytes over ({term})"
    return f"{bound}."


def _size_sentence(found: dict[str, Any]) -> str:
    if "compression_vs_stored" not in found:
        return "Its size was not measured (evaluate is switched off)."
    ratios = {key: f"{found[f'compression_vs_{key}']:.2f}" for key in ("stored", "fp32", "bf16")}
    return (
        f"It takes {number(found['package_bytes'])} bytes ({mebibytes(found['package_bytes'])}): {ratios['stored']} "
        f"times smaller than the fetched model as stored ({number(found['base_bytes'])} bytes), {ratios['fp32']} times "
        f"smaller than that model's parameters in fp32, {ratios['bf16']} times in bf16."
    )


def _perplexity_sentence(evidence: Evidence) -> str:
    package = evidence.model(PACKAGE)
    compared = comparison.compare(package, evidence.model(FETCHED))
    if not compared:
        return "Its perplexity was not measured, or not under the fetched model's protocol."
    parts = []
    for split, each in compared.items():
        after, before = number(each.package, 3), number(each.plain, 3)
        ratio = each.package / each.plain
        rise = f", {change(ratio)}" if 0 < ratio < math.inf else ""
        parts.append(f"{after} on {split} (fetched {before}{rise})")
    measures = sorted({each.measure.replace("_", " ") for each in compared.values()})
    return f"Its {' and '.join(measures)} is {' and '.join(parts)}, by protocol {package['protocol']}."


def pattern_sentence(evidence: Evidence) -> str | None:
    """What the package's sparsity is labelled as; None without a package."""
    pattern = evidence.manifest.get("pattern")
    if not pattern:
        return None
    if evidence.pattern_broken:
        asked = evidence.manifest["asked"]
        return f"{asked} was asked for, but a later stage broke it: the package is labelled and stored as {pattern}."
    return (
        "The package is dense." if pattern == "dense" else f"The package's sparsity pattern is {pattern}, and it holds."
    )
