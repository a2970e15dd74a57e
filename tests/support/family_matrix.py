"""The whole DAG on a small random model in this process: the stages' own functions, with dvc.yaml's inputs and outputs.

What DVC does (hashes, cache, records) and what costs seconds of every stage (a process, libraries) is left out, so that
many models can go through all stages in one test session. `tests.benchmarks.families` prints the matrix.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import vl_convert
import yaml
from dvc.repo import Repo

from tasks import baseline
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints
from tasks.parameters import preflight, schema
from tasks.runtime.stage import Inputs
from tests.benchmarks import chain
from tests.support import project
from tests.support.family_list import FAMILIES
from tests.support.paths import ROOT

QUICKER = {
    "gptq.mse": 0.0,
    "gptq.descent_cycles": 1,
    "qad.enabled": True,
    "qad.steps": 2,
    "qad.batch": 2,
    "qad.length": 32,
    "evaluate.new_tokens": 2,
}
"""Of the parameters what takes most of the time of a tiny model: the search of scales."""
LEFT_OUT = ("code", "corpus", "base_model")
"""Stages that know no model."""


@functools.cache
def graph() -> list[SimpleNamespace]:
    """The stages in an order in which they can run: address, inputs, names of parameters."""
    repo = Repo(ROOT)
    edges = repo.index.graph  # an edge leads from a stage to one it depends on
    found, done = [], set()

    def take(node: Any) -> None:
        if node in done:
            return
        done.add(node)
        for other in sorted(edges.successors(node), key=lambda each: each.addressing):
            take(other)
        params = {key.split(".")[0] for dep in node.deps for key in getattr(dep, "params", ())}
        deps = [Path(os.path.relpath(dep.fs_path, ROOT)) for dep in node.deps if not getattr(dep, "params", ())]
        found.append(SimpleNamespace(address=node.addressing, deps=deps, params=params, dvc=node))

    for node in sorted(edges.nodes, key=lambda each: each.addressing):
        take(node)
    return [each for each in found if each.address not in LEFT_OUT]


class ChainStage(Inputs):
    """What a stage module gets; files lie below `root` as below a project."""

    def __init__(self, root: Path, found: SimpleNamespace, params: schema.Params) -> None:
        places = {path: root / path for path in found.deps}
        self.name, _, item = found.address.partition("@")
        if self.name == "fetch":
            paths = [params.fetch.model.path, *(getattr(params.fetch.corpora, each).path for each in CORPORA)]
            places = {Path(os.path.relpath(path)): Path(path) for path in paths}
        if self.name == "evaluate":
            places = {path: ROOT / path if path.suffix == ".txt" else place for path, place in places.items()}
        places = {path: ROOT / path if path.parts[:2] in SOURCES else place for path, place in places.items()}
        super().__init__(found.address, places)
        self.item, self.root, self.dvc, self.everything = item or None, root, found.dvc, params
        self.params = SimpleNamespace(**{key: getattr(params, key) for key in found.params})
        self.folder = root / "data" / self.name / item
        self.journal, self.answers = checkpoints.NOTHING, checkpoints.NOTHING

    def output(self, name: str) -> Path:
        own, _, below = name.partition("/")
        path = self.folder / (below if own == self.folder.name else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def content(self, path: Path) -> None:
        return None

    def note(self, **facts: Any) -> None:
        pass

    def shelf(self, *_: Any, **__: Any) -> Any:
        return checkpoints.NOTHING

    def pass_on(self, source: Path, target: Path) -> None:
        (functools.partial(shutil.copytree, dirs_exist_ok=True) if source.is_dir() else shutil.copyfile)(source, target)

    def progress(self, *_: Any) -> _Progress:
        return _Progress()


class _Progress:
    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, done: int, **figures: float) -> None:
        pass


CORPORA = ("train", "calibration", "test", "test_ood")
SOURCES = (("data", "devices"), ("data", "harness_tasks"))


def parameters(model: Path, corpora: dict[str, Path], **changes: Any) -> schema.Params:
    """params.yaml with values for a tiny model."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values = {
        **project.QUICK,
        **QUICKER,
        "fetch.model.path": str(model),
        **{f"fetch.corpora.{name}.path": str(path) for name, path in corpora.items()},
        **changes,
    }
    return schema.parse(chain.changed(raw, values), "params.yaml")


def run(root: Path, name: str, **changes: Any) -> Iterator[str]:
    """Make a family's model below `root` and run all stages on it; yields the address of each when it has run.

    The charts are not drawn. The cache of attention with a window can't be quantised, as preflight says. The plain
    model is quantised once and, trained, once more, but not again and again until its size is near the package's.

    Args:
        changes: dotted names of parameters, and their values.
    """
    model, corpora = FAMILIES[name].save(root / "source/model"), project.short_corpora(root / "source", documents=16)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    params = parameters(model, corpora, **changes)
    try:
        preflight.check(params, config)
    except InputError as error:
        assert str(error).startswith("kv_cache can't quantise the cache of a model whose attention has a window")
        params = parameters(model, corpora, **changes, **{"kv_cache.enabled": False})
        preflight.check(params, config)
    record = root / "data/lineage/measure.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}", encoding="utf-8")
    for found in graph():
        stage = ChainStage(root, found, params)
        module = importlib.import_module(f"tasks.{stage.name}")
        enabled = getattr(getattr(stage.params, stage.name, None), "enabled", True)
        replaced = (
            (vl_convert, "javascript_bundle", lambda **_: ""),
            (vl_convert, "vegalite_to_svg", lambda *_, **__: "<svg/>"),
            (baseline, "ROUNDS", 1),
        )
        with contextlib.ExitStack() as stack:
            for target in replaced:
                stack.enter_context(mock.patch.object(*target))
            (module.run if enabled else module.skip)(stage)
        yield found.address
