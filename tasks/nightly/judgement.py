"""Gather a revision's figures and hold them to the gate's limits.

Everything is read at a revision through DVC (dvc.lock names it, the cache has it), so that a night, an experiment and a
promoted model are judged in the same way, wherever they ran. The package's files are hashed again, as they come out of
the cache. A figure whose file is not there was not measured. It judges by `tasks.algorithms.statistics.gate`, with the
limits of the given parameters, and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from dvc.exceptions import DvcException
from dvc.fs import DVCFileSystem
from dvc.repo import Repo
from dvc.scm import SCMError

from tasks.algorithms.errors import InputError
from tasks.algorithms.statistics import bootstrap, gate
from tasks.algorithms.statistics.bootstrap import Sums
from tasks.evaluation import comparison, measurements, results
from tasks.evaluation.comparison import FETCHED, PACKAGE, RECOVERED_DENSE
from tasks.parameters import parameter_file
from tasks.parameters.schema import Gate
from tasks.runtime import git

PACKAGE_FOLDER = "data/package/model"
MANIFEST = "manifest.json"
MEASURED = f"data/measure/{measurements.MODELS}"
MEASURED_BY = "data/lineage/measure.json"
"""In git at every revision: speeds are in no output."""
CHUNK = 1 << 20


class Evidence(NamedTuple):
    """What a revision's stages wrote, as far as the gate needs it.

    Attributes:
        figures: of the package.
        sums: evaluated model -> split -> scores per document.
        task_errors: task -> standard error of its accuracy.
        hosts: of the package and of the fetched model, what stage measure found (`tasks.evaluation.measurements`):
            machine, workload, bytes, seconds per token (median, least); empty where it wasn't measured.
        dense: the evaluated model that is the best dense reference; None where it had less recovery than the package.
    """

    figures: gate.Figures
    sums: Mapping[str, Mapping[str, Sums]]
    task_errors: Mapping[str, float]
    hosts: Mapping[str, Mapping[str, Any]]
    dense: str | None


def read(top: Path, rev: str) -> Evidence:
    """The evidence of a revision.

    Raises:
        InputError: no such revision, or no package and evaluation in it; DVC's cache has lost them.
    """
    git.trust(top)
    try:
        with Repo(str(top)) as repo, repo.switch(rev):
            return _evidence(repo.dvcfs)
    except SCMError as error:
        what = f"{error}; name a commit, a night, or a version's tag, as edgepress@v0.0.1"
        raise InputError(f"{rev} can't be judged: {what}") from error
    except (DvcException, OSError, ValueError, KeyError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{rev[:12]} can't be judged: {what}; `dvc repro` there makes what is missing") from error


def judge(candidate: Evidence, promoted: Evidence | None, limits: Gate) -> gate.Verdict:
    """Hold the candidate to the limits; `promoted` is None where there is no promoted model yet."""
    figures = candidate.figures
    own = candidate.sums.get(PACKAGE, {})
    dense = candidate.sums.get(candidate.dense, {}) if candidate.dense else {}
    return gate.judge(
        figures,
        promoted.figures if promoted else None,
        _limits(limits),
        _against(candidate, promoted, limits) if promoted else gate.Comparison(),
        gate.Comparison(_ratios(own, candidate.sums.get(FETCHED, {}), limits)),
        gate.Comparison(_ratios(own, dense, limits)),
    )


def described(evidence: Evidence) -> dict[str, Any]:
    """The figures as flat data, for records, events and the registry; what was not measured is left out."""
    figures = evidence.figures
    found = {f"perplexity_{split}": value for split, value in figures.perplexity.items()}
    found |= {"bytes": figures.bytes, "fit": figures.fit, "seconds_per_token": figures.seconds_per_token}
    found |= {f"accuracy_{task}": value for task, value in figures.tasks.items()}
    found |= {f"overlap_{kind}": value for kind, value in figures.overlap.items()}
    return {key: value for key, value in found.items() if value is not None}


def _evidence(fs: DVCFileSystem) -> Evidence:
    metrics = {name: _json(fs, f"data/evaluate/{name}/metrics.json") for name in (PACKAGE, FETCHED, RECOVERED_DENSE)}
    if not metrics[PACKAGE].get("evaluated"):
        raise KeyError(f"data/evaluate/{PACKAGE} holds no evaluation")
    sections = _parameters(fs)
    recovered, dense_too = (sections.get(name, {}).get("enabled", False) for name in ("lora", "baseline_lora"))
    scored = {name: _sums(fs, name) for name, found in metrics.items() if found.get("evaluated")}
    dense = (RECOVERED_DENSE if dense_too else None) if recovered else FETCHED
    accuracy, errors = _tasks(fs)
    found = measurements.hosts(_json(fs, MEASURED), _json(fs, MEASURED_BY))
    hosts = {name: found[name] if found.get(name, {}).get("measured") else {} for name in (PACKAGE, FETCHED)}
    seconds = hosts[PACKAGE]["seconds_per_token"]["median"] if hosts[PACKAGE] else None
    figures = _figures(fs, metrics[PACKAGE], scored[PACKAGE])
    figures = replace(figures, tasks=accuracy, seconds_per_token=seconds)
    return Evidence(figures, scored, errors, hosts, dense)


def _figures(fs: DVCFileSystem, metrics: dict[str, Any], own: Mapping[str, Sums]) -> gate.Figures:
    manifest = _json(fs, f"{PACKAGE_FOLDER}/{MANIFEST}")
    fit = _json(fs, "data/hardware_fit/fit.json")
    files = _hashes(fs, PACKAGE_FOLDER)
    named = {name: entry["sha256"] for name, entry in manifest.get("files", {}).items()}
    altered = sorted(name for name in named.keys() | files.keys() if named.get(name) != files.get(name))
    return gate.Figures(
        perplexity=metrics["perplexity"],
        tokens=_tokens(metrics, own),
        bytes=metrics["bytes"]["total"],
        least_bytes=math.fsum(manifest.get("bound", {}).values()) or None,
        fit=fit.get("verdict"),
        fit_term=f"{fit['device']}, {fit['limiting_term']}" if "limiting_term" in fit else None,
        fit_margin=fit["headroom_bytes"] - fit["bytes_over"] if "headroom_bytes" in fit else None,
        files=files if named else {},
        altered=tuple(altered) if named else (),
        overlap=_overlap(fs),
    )


def _tokens(metrics: Mapping[str, Any], sums: Mapping[str, Sums]) -> str:
    """A hash of protocol, documents, and tokens and bytes per document: equal where perplexities are of the same."""
    found = hashlib.sha256(str(metrics["protocol"]).encode())
    for split in sorted(sums):
        for column in (sums[split].document, sums[split].predictions, sums[split].bytes):
            found.update(np.ascontiguousarray(column).tobytes())
    return found.hexdigest()


def _overlap(fs: DVCFileSystem) -> dict[str, float]:
    """Share of the test text that stands in the training text, by kind; of the split with the larger one."""
    splits = _json(fs, "data/overlap/overlap.json").get("splits", {})
    found = [splits[split] for split in comparison.SPLITS if split in splits]
    kinds = {"documents": "verbatim_share", "ngrams": "run_share"}
    shares = {kind: [one[key] for one in found if one.get(key) is not None] for kind, key in kinds.items()}
    return {kind: max(values) for kind, values in shares.items() if values}


def _tasks(fs: DVCFileSystem) -> tuple[dict[str, float], dict[str, float]]:
    """(accuracy, standard error) of the package's tasks: every metric of a task that is a share, by "task metric"."""
    accuracy, errors = {}, {}
    for path in sorted(fs.glob(f"data/harness/{PACKAGE}-*/scores.json")):
        scores = _json(fs, path)
        for metric, found in scores.get("metrics", {}).items():
            if found["higher_is_better"] and 0 <= found["value"] <= 1:
                name = f"{scores['task']} {metric}"
                accuracy[name], errors[name] = found["value"], found["stderr"] or 0.0
    return accuracy, errors


def _against(candidate: Evidence, promoted: Evidence, limits: Gate) -> gate.Comparison:
    """The candidate beside the promoted model."""
    own, other = candidate.figures, promoted.figures
    z = bootstrap.ndtri((1 + bootstrap.CONFIDENCE) / 2)
    drops = {}
    for task in own.tasks.keys() & other.tasks.keys():
        drop = other.tasks[task] - own.tasks[task]
        width = z * math.hypot(candidate.task_errors.get(task, 0.0), promoted.task_errors.get(task, 0.0))
        drops[task] = gate.Interval(drop, drop - width, drop + width)
    ratios = _ratios(candidate.sums.get(PACKAGE, {}), promoted.sums.get(PACKAGE, {}), limits)
    return gate.Comparison(ratios, drops, _latency(candidate.hosts, promoted.hosts))


def _latency(own: Mapping[str, Any], other: Mapping[str, Any]) -> gate.Interval | None:
    """Ratio of the medians of seconds per token, as far as two runs on other days can tell it.

    A host that is busy for all of one run slows median and least time alike, so they say little of the noise between
    two runs. The fetched model was timed in the same run as the package: where it is of the same size in both, the
    ratio of the packages by that of the fetched models is another estimate, and the bounds are the least and the
    largest of all: other programs that slow a whole run make it UNDECIDED at most.

    None where one was not measured, or on another host, or by another workload.
    """
    if not _alike(own[PACKAGE], other[PACKAGE], "host", "workload"):
        return None
    plain = _slower(own[PACKAGE], other[PACKAGE])
    comparable = _alike(own[FETCHED], other[FETCHED], "host", "workload", "bytes")
    paired = plain / _slower(own[FETCHED], other[FETCHED]) if comparable else plain
    found = np.concatenate([plain, paired])
    return gate.Interval(float(plain[0]), float(found.min()), float(found.max()))


def _alike(own: Mapping[str, Any], other: Mapping[str, Any], *keys: str) -> bool:
    return bool(own and other) and all(own.get(key) == other.get(key) for key in keys)


def _slower(own: Mapping[str, Any], other: Mapping[str, Any]) -> np.ndarray:
    """(2,): median and least seconds per token of one by the other's."""
    return np.array([own["seconds_per_token"][key] / other["seconds_per_token"][key] for key in ("median", "least")])


def _ratios(own: Mapping[str, Sums], other: Mapping[str, Sums], limits: Gate) -> dict[str, gate.Interval]:
    """Perplexity of one by the other's, by split, from the paired bootstrap over documents.

    Where the two predict other tokens, it is the ratio of perplexities that the difference in bits per byte makes at
    the other one's tokens. Texts of other lengths are other texts: that split is left out.
    """
    found = {}
    for split in comparison.SPLITS:
        if split not in own or split not in other or not _same_text(own[split], other[split]):
            continue
        generator = np.random.default_rng(limits.seed)
        result = bootstrap.compare(own[split], other[split], generator, limits.resamples)
        bounds = (result.ratio, result.low, result.high)
        if result.measure == bootstrap.BITS_PER_BYTE:
            spans = math.log(2) * other[split].bytes.sum() / other[split].predictions.sum()
            changes = (result.change, result.change_low, result.change_high)
            bounds = tuple(math.exp(spans * change) for change in changes)
        found[split] = gate.Interval(*map(float, bounds))
    return found


def _same_text(own: Sums, other: Sums) -> bool:
    """Whether the documents have the same bytes; the last one may be cut elsewhere by another vocabulary."""
    count = min(len(own.document), len(other.document)) - 1
    pairs = ((own.document, other.document), (own.bytes, other.bytes))
    if np.array_equal(own.predictions, other.predictions):
        return all(np.array_equal(*pair) for pair in pairs)
    return count > 0 and all(np.array_equal(one[:count], two[:count]) for one, two in pairs)


def _limits(limits: Gate) -> gate.Limits:
    given = limits.model_dump(exclude={"resamples", "seed"})
    return gate.Limits(**given)


def _sums(fs: DVCFileSystem, model: str) -> dict[str, Sums]:
    with fs.open(f"data/evaluate/{model}/documents.csv") as file:
        return results.sums(pd.read_csv(file))


def _hashes(fs: DVCFileSystem, folder: str) -> dict[str, str]:
    """Name -> sha256 of every file but the manifest."""
    found = {}
    for path in sorted(fs.find(folder)):
        name = str(Path(path).relative_to(Path(path).anchor or ".").relative_to(folder))
        if name != MANIFEST:
            digest = hashlib.sha256()
            with fs.open(path, "rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
            found[name] = digest.hexdigest()
    return found


def _json(fs: DVCFileSystem, path: str) -> dict[str, Any]:
    """A JSON file's object; empty where there is none."""
    if not fs.exists(path):
        return {}
    with fs.open(path, "r", encoding="utf-8") as file:
        return json.load(file)


def _parameters(fs: DVCFileSystem) -> dict[str, Any]:
    """params.yaml, not validated: an older revision has an older schema."""
    with fs.open("params.yaml", "rb") as file:
        return parameter_file.parse(file.read(), "params.yaml")
