"""The pipeline without DVC and Prefect, for sweeps: the real stage modules, with other parameters, cached by content.

`Chain(...).output("lora")` computes lora and whatever it needs, once: inputs, outputs, parameters and code of each
stage are read from dvc.yaml. A stage's key is a hash of the values of its declared parameters and the bytes of its
declared dependencies (data and code), so points of a sweep that begin alike share that beginning, also across processes
and restarts. A frozen stage is not run: its outputs are taken as they lie in the project.

    python -c 'from tests.benchmarks.chain import Chain; print(Chain(params={"lora.steps": 3}).perplexity("package"))'

It checks no memory and no disk (`tasks.parameters.preflight`), writes no lineage and holds no lock: two processes that
need the same output at the same time both compute it, and the second one's is dropped.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from tasks.algorithms.model import checkpoints
from tasks.models import model_files
from tasks.parameters import schema
from tasks.runtime import accelerator, files
from tasks.runtime.stage import Inputs, Stage
from tests.support.paths import ROOT

CACHE = ROOT / "data/.scratch/benchmarks"
LIBRARIES = ("torch", "transformers", "peft", "gptqmodel")
"""Their versions are part of every key."""
RECORD = "record.json"
"""Written last into a finished folder."""
SHIPPED = ("model.safetensors", "model.json")
"""The files that hold a packed model."""


@dataclass(frozen=True)
class Declared:
    """A stage (or one item of its matrix) as dvc.yaml has it, with every `${…}` filled in.

    Attributes:
        address: "wanda", "evaluate@gptq".
        deps: files and folders, as written.
        params: dotted names.
        out: its folder.
    """

    address: str
    deps: tuple[str, ...]
    params: tuple[str, ...]
    out: str
    frozen: bool

    @property
    def name(self) -> str:
        return self.address.partition("@")[0]


class Chain:
    """One setting of all parameters.

    Args:
        model: a model folder; None: the one that params.yaml names.
        corpora: split (train, calibration, test, test_ood) -> .jsonl file; the others are those of params.yaml.
        scratch: where the outputs are kept.
        params: dotted name -> value, over params.yaml.
        replaced: (stage, declared dependency) -> what the stage gets in its place.
        root: the project's folder.

    Attributes:
        computed: addresses of the stages that were run, because they weren't in the cache; in order.

    Raises:
        InputError: the parameters break the schema.
    """

    def __init__(
        self,
        model: Path | None = None,
        corpora: Mapping[str, Path] | None = None,
        scratch: Path = CACHE,
        params: Mapping[str, Any] | None = None,
        replaced: Mapping[tuple[str, str], Path] | None = None,
        root: Path = ROOT,
    ) -> None:
        self.root, self.scratch = root, Path(scratch)
        self.changed = dict(params or {})
        if model is not None:
            self.changed["fetch.model.path"] = os.path.relpath(model, root)
        for split, path in (corpora or {}).items():
            self.changed[f"fetch.corpora.{split}.path"] = os.path.relpath(path, root)
        self.replaced = dict(replaced or {})
        raw = _yaml(root / "params.yaml")
        self.everything = schema.parse(changed(raw, self.changed), "params.yaml with the benchmark's values")
        self.values = self.everything.model_dump()
        self.stages = declared(root / "dvc.yaml", self.values)
        self.computed: list[str] = []
        self._finished: dict[str, Path] = {}

    def variant(
        self, params: Mapping[str, Any] | None = None, replaced: Mapping[tuple[str, str], Path] | None = None
    ) -> Chain:
        """The same with further changes, on the same cache."""
        return Chain(
            scratch=self.scratch,
            params=self.changed | dict(params or {}),
            replaced=self.replaced | dict(replaced or {}),
            root=self.root,
        )

    def output(self, address: str) -> Path:
        """The folder with a stage's outputs: `output("lora") / "model"`.

        Raises:
            LookupError: dvc.yaml has no such stage.
            InputError, and whatever else the stage raises.
        """
        if address not in self.stages:
            raise LookupError(f"`{address}` is no stage of dvc.yaml, which has {sorted(self.stages)}")
        return self._folder(address) / "data" / address.replace("@", "/")

    def metrics(self, model: str) -> dict[str, Any]:
        """What stage evaluate says of the model of a stage ("package")."""
        path = self.output(f"evaluate@{model}") / "metrics.json"
        return json.loads(path.read_text(encoding="utf-8"))

    def perplexity(self, model: str) -> dict[str, float]:
        """{"test": …, "test_ood": …} of a stage's model."""
        return self.metrics(model)["perplexity"]

    def bytes(self, model: str) -> int:
        """Bytes of the files that hold a stage's model; of a folder that isn't packed, of all weight files."""
        folder = self.output(model) / "model"
        if (folder / SHIPPED[1]).exists():
            return sum((folder / name).stat().st_size for name in SHIPPED)
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))

    def folder_bytes(self, model: str) -> int:
        """Bytes of every file of a stage's model folder, tokenizer and manifest included."""
        return model_files.stored_bytes(self.output(model) / "model")

    def seconds(self, address: str) -> float:
        """How long a stage took when it was computed, without its inputs."""
        return json.loads((self._folder(address) / RECORD).read_text(encoding="utf-8"))["seconds"]

    def measure(self, model: Path) -> dict[str, float]:
        """Perplexities of any model folder, with the corpora and the evaluation of this chain."""
        return self.variant(replaced={("evaluate@lora", "data/lora/model"): model}).perplexity("lora")

    def derive(self, name: str, sources: Mapping[str, Path], make: Callable[[Path], None]) -> Path:
        """A folder that no stage makes: `make(folder)` fills it, once for each content of `sources` and name.

        Args:
            name: of the kind of folder; `make`'s own code is no part of the key, so another `make` needs another name.
        """
        key = _hash({"name": name, "sources": {label: digest(path) for label, path in sorted(sources.items())}})
        folder = self.scratch / name / key
        if not (folder / RECORD).exists():
            with _publishing(folder, {"name": name}) as unfinished:
                make(unfinished)
        return folder

    def _folder(self, address: str) -> Path:
        if address not in self._finished:
            stage = self.stages[address]
            places = {dep: self._place(stage, dep) for dep in stage.deps}
            values = {key: _lookup(self.values, key) for key in stage.params}
            identity = {
                "stage": address,
                "params": values,
                "deps": {dep: digest(place) for dep, place in places.items()},
                "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
                "threads": torch.get_num_threads(),  # sums round differently
            }
            folder = self.scratch / address / _hash(identity)
            if not (folder / RECORD).exists():
                self._compute(stage, places, folder, identity)
            self._finished[address] = folder
        return self._finished[address]

    def _place(self, stage: Declared, dep: str) -> Path:
        """Where a declared dependency lies: replaced, in another stage's cached folder, or in the project."""
        if (stage.address, dep) in self.replaced:
            return self.replaced[stage.address, dep]
        for other in self.stages.values():
            if not other.frozen and _within(dep, other.out):
                return self._folder(other.address) / dep
        return Path(os.path.normpath(self.root / dep))

    def _compute(self, stage: Declared, places: Mapping[str, Path], folder: Path, identity: Mapping[str, Any]) -> None:
        print(f"computing {stage.address}", file=sys.stderr, flush=True)
        accelerator.prepare(self.everything.device)
        with contextlib.redirect_stdout(sys.stderr):  # gptqmodel prints when it is imported
            module = importlib.import_module(f"tasks.{stage.name}")
        with _publishing(folder, identity) as unfinished, contextlib.redirect_stdout(sys.stderr):
            given = CachedStage(stage, self.everything, places, unfinished)
            (module.run if given.enabled else module.skip)(given)
            read = {dep for other in self.stages.values() for dep in other.deps if _within(dep, str(given.folder))}
            missing = [path for path in sorted(read | {str(given.folder)}) if not (unfinished / path).exists()]
            if missing:
                raise RuntimeError(f"stage {stage.address} did not write {', '.join(missing)}")
        self.computed.append(stage.address)


class CachedStage(Stage):
    """tasks.runtime.stage.Stage with inputs from anywhere: names are those of dvc.yaml, places the chain's."""

    def __init__(
        self, declared: Declared, everything: schema.Params, places: Mapping[str, Path], scratch: Path
    ) -> None:
        Inputs.__init__(self, declared.address, {Path(dep): place for dep, place in places.items()})
        self.name, _, item = declared.address.partition("@")
        self.item = item or None
        self.everything = everything
        sections = sorted({key.split(".")[0] for key in declared.params})
        self.params = SimpleNamespace(**{key: getattr(everything, key) for key in sections})
        self.folder = Path(declared.out)
        self.scratch = scratch
        self.journal = self.answers = checkpoints.NOTHING

    def content(self, path: Path) -> None:
        """Nobody asks whether two models are the same."""

    def shelf(self, *_: Any, **__: Any) -> checkpoints.Saved:
        """Nothing is shared: what a stage takes is its own."""
        return checkpoints.NOTHING


def changed(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of parsed YAML with other values: {"wanda.keep": 1}."""
    copy = json.loads(json.dumps(raw))
    for key, value in values.items():
        *parents, last = key.split(".")
        section = copy
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return copy


def declared(path: Path, values: Mapping[str, Any]) -> dict[str, Declared]:
    """Every stage of a dvc.yaml, each item of a matrix apart ("evaluate@gptq"), by address in the file's order."""
    found = {}
    for name, stage in _yaml(path)["stages"].items():
        matrix = {key: _values(given, values) for key, given in stage.get("matrix", {}).items()}
        for items in itertools.product(*matrix.values()):
            address = f"{name}@{'-'.join(items)}" if items else name
            context = {**values, "item": dict(zip(matrix, items, strict=True))}
            (out,) = map(_path, stage["outs"])
            found[address] = Declared(
                address,
                tuple(dict.fromkeys(os.path.normpath(_fill(dep, context)) for dep in stage["deps"])),
                tuple(_fill(key, context) for key in stage.get("params", [])),
                _fill(out, context),
                stage.get("frozen", False),
            )
    return found


@functools.cache  # finished folders don't change, and code is imported once
def digest(path: Path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files."""
    if path.is_file():
        return files.sha256(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is declared in dvc.yaml, and there is no such file or folder")
    return _hash({str(f.relative_to(path)): digest(f) for f in sorted(path.rglob("*")) if f.is_file()})


@contextlib.contextmanager
def _publishing(folder: Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to fill, moved to `folder` with its record when that is done, removed when it fails."""
    unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    started = time.monotonic()
    try:
        yield unfinished
        record = {**identity, "seconds": round(time.monotonic() - started, 3)}
        files.write_json(unfinished / RECORD, record)
        with contextlib.suppress(OSError):  # another process was first
            os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _yaml(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)


def _path(out: str | Mapping[str, Any]) -> str:
    return out if isinstance(out, str) else next(iter(out))


def _within(path: str, folder: str) -> bool:
    return Path(path) == Path(folder) or Path(folder) in Path(path).parents


def _lookup(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _values(given: str | list[str], values: Mapping[str, Any]) -> list[str]:
    """A matrix's list, or the list of params.yaml that it names: `${harness.tasks}`."""
    return _lookup(values, given[2:-1]) if isinstance(given, str) else given


def _fill(text: str, context: Mapping[str, Any]) -> str:
    return re.sub(r"\$\{([^}]+)\}", lambda match: str(_lookup(context, match[1])), text)
