"""A stage's only view of the world: its declared inputs, its outputs, its parameters, its journal.

Names and paths come from dvc.yaml through DVC's own API; no stage writes one in Python. Which model a stage works on
follows from the order of its dependencies (`Inputs.model_in`), so a new stage between two others needs dvc.yaml alone.
How a stage is run, published and restored is `tasks.runtime.execution`'s.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tasks.parameters import schema
from tasks.runtime.progress import Progress

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import Stage as DvcStage

    from tasks.runtime.journal import Journal
    from tasks.runtime.shelf import Shelf

SCRATCH = Path("data/.scratch")
"""Unfinished outputs; on the same file system as data/ so that moving is atomic. Git and DVC ignore it."""
JOURNALS = SCRATCH / "journal"
"""Of each stage a folder with what it had finished when it was interrupted (`tasks.runtime.journal`)."""
SHELVES = SCRATCH / "shelves"
"""What several stages compute alike, by what it is (`tasks.runtime.shelf`)."""
ANSWERS = SCRATCH / "answers"
"""Of each stage that asks a model a folder with its answers: another limit or a repetition asks for the rest alone."""
MODEL = "model"
"""Last name of a path with a model."""


class Inputs:
    """The dependencies that dvc.yaml declares for a stage, found by how their paths end.

    Args:
        address: the stage's.
        places: path as declared -> where it lies, in the order of dvc.yaml.
    """

    def __init__(self, address: str, places: Mapping[Path, Path]) -> None:
        self.address, self.places = address, dict(places)

    @property
    def model_in(self) -> Path:
        """The model that the stage works on: the first declared dependency called `model`; others are references.

        Raises:
            LookupError: dvc.yaml declares none for this stage.
        """
        models = self.inputs_named(MODEL)
        if not models:
            declared = sorted(map(str, self.places))
            raise LookupError(f"stage {self.address} has no dependency called `{MODEL}`; dvc.yaml declares {declared}")
        return models[0]

    def input(self, name: str) -> Path:
        """The declared dependency whose path ends with `name` ("corpora", "fetch/model", "masks.safetensors").

        Or what lies in a declared folder, by its name ("hardware_fit/fit.json" where that is `data/hardware_fit`).

        Raises:
            LookupError: dvc.yaml declares no such dependency for this stage, or several.
        """
        if not _matches(self.places, name):
            for folder in Path(name).parents[:-1]:  # the last one is "."
                if len(found := _matches(self.places, str(folder))) == 1:
                    return self.places[found[0]] / Path(name).relative_to(folder)
        return self.places[_find(self.places, name, f"dependency of stage {self.address}")]

    def has_input(self, name: str) -> bool:
        """Whether exactly one declared dependency ends with `name`."""
        return len(_matches(self.places, name)) == 1

    def inputs_named(self, name: str) -> list[Path]:
        """The declared dependencies of this last name, in the order of dvc.yaml."""
        return [place for path, place in self.places.items() if path.name == name]


class Stage(Inputs):
    """What `run(stage)` of a stage module gets.

    Attributes:
        start: what the result depends on, as it was before the parameters were read.
        name: the stage's name in dvc.yaml, without the matrix item.
        item: the matrix item (`gptq` in `evaluate@gptq`), or None.
        everything: all sections, for the checks before the stage starts; a stage computes with `params` alone.
        params: the declared sections of params.yaml, as attributes; an undeclared one is an AttributeError.
        folder: the stage's one output, data/NAME or data/NAME/ITEM, which holds all that it writes.
        scratch: what it writes lies here until all of it is complete.
        facts: of `note`.
    """

    def __init__(self, address: str, repo: Repo) -> None:
        from tasks.runtime import edits, lineage  # they import DVC, which the benchmarks' stages do without

        self.dvc = lineage.stage_of(repo, address)
        self.start = edits.Start(self.dvc)
        files = [_relative(dep) for dep in self.dvc.deps if not getattr(dep, "params", ())]
        super().__init__(address, {path: path for path in files})  # one corpus may serve as two
        self.name, _, item = address.partition("@")
        self.item = item or None
        self.everything = schema.load()
        declared = {key.split(".")[0] for dep in self.dvc.deps for key in getattr(dep, "params", ())}
        self.params = SimpleNamespace(**{key: getattr(self.everything, key) for key in sorted(declared)})
        self.folder = _folder(self.dvc)
        self.scratch = SCRATCH / address
        self.facts: dict[str, Any] = {}

    @property
    def enabled(self) -> bool:
        """False where the stage's own section says `enabled: false`."""
        return getattr(getattr(self.params, self.name, None), "enabled", True)

    def content(self, path: Path) -> str | None:
        """DVC's hash of a declared input: that of its bytes, whatever stage wrote them; None where it has none."""
        return self.start.identity["inputs"][path.as_posix()]

    @functools.cached_property
    def journal(self) -> Journal:
        """What an interrupted run with the same inputs, parameters and code had finished, and where to note more."""
        from tasks.runtime import journal  # here, as it imports torch, which not every stage needs

        return journal.open_for(self.start, JOURNALS / self.address)

    @functools.cached_property
    def answers(self) -> Journal:
        """What a model answered to which request, with the same inputs and code; it stays when the stage is done."""
        from tasks.runtime import journal

        return journal.open_for(self.start, ANSWERS / self.address, parameters=False)

    def shelf(self, purpose: str, module: str, inputs: Iterable[Path], **given: Any) -> Shelf:
        """What stages that have these inputs compute alike of them and of what is `given`, by this module's code."""
        from tasks.runtime import shelf  # as above

        hashes = {path.as_posix(): self.start.identity["inputs"][path.as_posix()] for path in inputs}
        return shelf.open_for(self.start, SHELVES / purpose, module, hashes, **given)

    def output(self, name: str) -> Path:
        """Where to write this file or folder of the stage's own folder; its parent folder exists.

        Args:
            name: as seen from there ("model", "layers.csv"), the folder's own name before it or not ("wanda/model");
                that name alone is the folder.
        """
        own, _, below = name.partition("/")
        path = self.scratch / self.folder / (below if own == self.folder.name else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def expected(self) -> list[Path]:
        """The folder, and what other stages read of it, and metrics and plots: what must be there when it has run."""
        index = self.dvc.repo.index
        paths = {self.folder, *(_relative(dep) for dep in index.deps if not getattr(dep, "params", ()))}
        paths |= {Path(*key) for keys in (index.metric_keys, index.plot_keys) for key in keys["repo"]}
        return sorted(path for path in paths if path.is_relative_to(self.folder))

    def pass_on(self, source: Path, target: Path) -> None:
        """Make `target` (from `output`) the same bytes as `source`, at no cost in disk (hard links where possible)."""
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)
        else:
            _link(source, target)

    def note(self, **facts: Any) -> None:
        """Facts of this run alone for the stage's lineage record: what it measured, which would repeat nowhere."""
        self.facts |= facts

    def progress(self, description: str, total: int) -> Progress:
        """A progress bar; a context manager with `update(done, **figures)`."""
        return Progress(description, total)


def _folder(stage: DvcStage) -> Path:
    outs = [_relative(out) for out in stage.outs]
    if len(outs) != 1:
        raise LookupError(f"stage {stage.addressing} has one output, its folder; dvc.yaml declares {outs}")
    return outs[0]


def _relative(item: Any) -> Path:
    return Path(os.path.relpath(item.fs_path))


def _matches(paths: Iterable[Path], name: str) -> list[Path]:
    """The path that is the name, else those that end with it: `test.jsonl` ends `wiki/test.jsonl`, too."""
    wanted = Path(name).parts
    found = [path for path in paths if path.parts[-len(wanted) :] == wanted]
    return [path for path in found if path.parts == wanted] or found


def _find(paths: Iterable[Path], name: str, what: str) -> Path:
    matches = _matches(paths, name)
    if len(matches) != 1:
        kind = "an ambiguous" if matches else "no"
        raise LookupError(f"`{name}` is {kind} {what}; dvc.yaml declares {sorted(map(str, paths))}")
    return matches[0]


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
