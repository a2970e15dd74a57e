"""How long stages will take on this machine, before and during a run.

Of a stage that ran here before it is what it took then: the last time with as much to do, else the last time at all, by
how much more or less there is to do now. Of another one it is what its row of work says (`tasks.parameters.durations`).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tasks.algorithms.errors import InputError
from tasks.parameters import durations, preflight, schema, speed
from tasks.parameters.work import Work
from tasks.runtime import lineage, staleness, warm
from tasks.runtime.order import MOST, Order
from tasks.runtime.progress import STATE
from tasks.runtime.stage import SCRATCH

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import Stage as DvcStage

    from tasks.algorithms.model.shape import ModelShape
    from tasks.parameters.schema import Params
    from tasks.runtime.stage import Stage

WORK = "work"
"""Of a record: what the stage had to do."""
FAR = 4.0
"""A former run with so many times as much work, or as little, is not asked: what no row counts would weigh too much."""
LONG = 3 * 3600
"""Seconds from which on the parameter is named that shortens a run most."""
TOLD = 0.04
"""Of the whole, from which on a stage is named."""


class Run(NamedTuple):
    """A run that is to come, or what is left of one.

    Attributes:
        seconds: stage -> what it will take; of a running one, what is left of it.
        left: until the last one ends, as stages run side by side.
        running: those that run now.
        shorter: where it is long, the parameter that shortens it most when halved, and the seconds that this saves.
    """

    seconds: dict[str, float]
    left: float
    running: tuple[str, ...] = ()
    shorter: tuple[str, float] | None = None

    def sentence(self) -> str:
        """How long, and of which stages; one line."""
        by_name: Counter[str] = Counter()
        for address, seconds in self.seconds.items():
            by_name[address.partition("@")[0]] += seconds
        divisor, unit = _unit(self.left)
        most = [(name, spent) for name, spent in by_name.most_common() if spent >= TOLD * sum(by_name.values())]
        rest = sum(by_name.values()) - sum(spent for _, spent in most)
        shares = [f"{name} {_number(spent / divisor)}" for name, spent in most]
        shares += [f"all others {_number(rest / divisor)}"] if rest > 0 and len(most) < len(by_name) else []
        words = f"{about(self.left)} on this machine: {', '.join(shares)}{f' {unit}' if shares else ''}"
        if self.shorter:
            words += f"; half of {self.shorter[0]} would save {about(self.shorter[1])}"
        return words


def note_work(stage: Stage) -> None:
    """Keep in a stage's record what it had to do, so that its seconds tell of other runs; not of one that went on."""
    if any(vars(stage)[name].goes_on for name in ("journal", "answers") if name in vars(stage)):
        return
    if model := preflight.model_here(stage.everything, None if stage.name == "fetch" else stage.address):
        stage.note(**{WORK: _noted(durations.work(stage.everything, model, stage.address))})


def seconds(stages: Iterable[DvcStage], params: Params, model: ModelShape | None, threads: int) -> dict[str, float]:
    """What each stage will take, by its address; one that nothing is known of is left out.

    Args:
        model: None where its sizes aren't known yet.
        threads: of each stage.
    """
    found = {}
    for stage in stages:
        took = _here(stage, params, model, threads) if model else None
        took = _formula(params, model, stage.addressing, threads) if took is None and model else took
        took = lineage.took(stage).get("seconds") if took is None else took
        if took is not None:
            found[stage.addressing] = took
    return found


def of_run(repo: Repo, stale: Mapping[DvcStage, Collection[DvcStage]], *, flow: bool) -> Run | None:
    """What a run of these stages will take, or what is left of the one that is at work; None where nobody can tell.

    Args:
        stale: of `staleness.to_run`.
        flow: as many at once as `edgepress run` starts; else one after another, as `dvc repro` does.
    """
    try:
        params = schema.load()
        names = {stage.addressing for stage in stale}
        model = preflight.model_here(params, "fetch" if "fetch" in names else None)
        cores, lanes = len(os.sched_getaffinity(0)), 1
        if flow:
            lanes = workers(params, "fetch" not in names)
        threads = int(os.environ.get(warm.THREADS) or max(cores // lanes, 1))
        each = seconds(stale, params, model, threads)
    except (InputError, ValueError):  # the run will say what is wrong; or it is another project's dvc.yaml
        return None
    if not each:
        return None
    running = {name: left for name, left in _running(each).items() if name in names}
    waits = {stage.addressing: [other.addressing for other in above] for stage, above in stale.items()}
    alone = [stage.addressing for stage in stale if (stage.meta or {}).get("alone")]
    order = Order(waits, each | running, alone, lanes, cores)
    order.running = set(running)
    order.waiting = {name: needs for name, needs in order.waiting.items() if name not in running}
    left = order.left({})
    shorter = _shortest(params, model, names, threads) if left >= LONG and model else None
    return Run(order.seconds, left, tuple(running), shorter)


def workers(params: Params, fetched: bool) -> int:
    """How many stages a flow runs at once, as far as that is known; raises as `preflight.at_once`."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, MOST, preflight.at_once(params, fetched) or 1)


def foretell(repo: Repo, *, flow: bool) -> str | None:
    """The line with which a run begins; None where nothing is left to do, or nobody can tell."""
    stale = staleness.to_run(repo, [staleness.row(stage) for stage in repo.index.stages])
    stale = {stage: above for stage, above in stale.items() if stage.name != staleness.code.STAGE}
    run = of_run(repo, stale, flow=flow) if stale else None
    return run.sentence() if run else None


def about(seconds: float) -> str:
    """A length of time in words."""
    divisor, unit = _unit(seconds)
    value = max(seconds, 1) / divisor
    return f"about {value:.1f} h" if unit == "h" else f"about {value:.0f} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    return (1.0, "s") if seconds < 90 else (60.0, "min") if seconds < 5400 else (3600.0, "h")


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 9.5 or value == round(value) else f"{value:.1f}"


def _noted(work: Work) -> dict[str, float]:
    return {name: float(f"{amount:.6g}") for name, amount in vars(work).items() if amount}


def _here(stage: DvcStage, params: Params, model: ModelShape, threads: int) -> float | None:
    """By the last run on this machine; None where none tells."""
    runs = sorted(lineage.runs_here(stage), key=lambda entry: entry.get("started") or "")
    runs = [entry for entry in runs if isinstance(entry.get(WORK), dict) and lineage.seconds(entry)]
    if not runs:
        return None
    now = durations.work(params, model, stage.addressing)
    last = next((entry for entry in reversed(runs) if entry[WORK] == _noted(now)), runs[-1])
    then_threads = (last.get("machine") or {}).get("threads") or threads
    took = lineage.seconds(last)
    if last[WORK] == _noted(now) and then_threads == threads:
        return took
    then, fast = Work(**last[WORK]), speed.of_machine(model, params.device, then_threads)
    now_fast = speed.of_machine(model, params.device, threads)
    if fast is None or now_fast is None:
        return took
    ratio = now.seconds(now_fast) / then.seconds(fast)
    return took * ratio if 1 / FAR < ratio < FAR else None


def _formula(params: Params, model: ModelShape, address: str, threads: int) -> float | None:
    known = speed.of_machine(model, params.device, threads)
    return durations.work(params, model, address).seconds(known) if known else None


def _running(each: Mapping[str, float]) -> dict[str, float]:
    """Stages that run in this folder now -> seconds that are left of them: by their own progress, else by the clock."""
    found = {}
    for address in each:
        if not (holder := staleness.locks.holder(staleness.lock(Path(), address))):
            continue
        gone = time.time() - holder.since.timestamp()
        found[address] = max(each[address] - gone, 0.05 * each[address])
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            path = SCRATCH / STATE.format(address)
            told = json.loads(path.read_text(encoding="utf-8"))
            found[address] = max(float(told["left"]) - (time.time() - path.stat().st_mtime), 0.0)
    return found


def _shortest(params: Params, model: ModelShape, names: Iterable[str], threads: int) -> tuple[str, float] | None:
    if (known := speed.of_machine(model, params.device, threads)) is None:
        return None
    return durations.shortest(params, model, list(names), known)
