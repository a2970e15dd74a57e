"""The folder of a model that is copied: a local one, or a snapshot of the hub's at a pinned commit.

Taken are the files of the model alone (`tasks.models.model_files`), never a pickle and never a link that leads out of
the folder. A hub model's small files come first, so that it can be refused before its weights are downloaded. What the
config says is checked here, what the weights hold in `tasks.sources.weight_check`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from tasks.algorithms.errors import InputError
from tasks.models import model_files
from tasks.models.model_files import INDEX, QUANTISED, SINGLE, SMALL
from tasks.models.stored_tensors import some
from tasks.parameters import preflight
from tasks.parameters.source_sections import CorpusSource, ModelSource
from tasks.sources import hub

DVC_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")
"""A file of DVC's cache, which DVC links to where `cache.type` is symlink."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def locate(source: ModelSource, local: Path | None) -> tuple[Path, Path]:
    """The model's folder, without its weights if it is on the hub, and the folder that its links must stay in.

    Args:
        local: the folder of a model that isn't on the hub.

    Raises:
        InputError: `local` is no folder, or the hub can't be reached.
    """
    if local is None:
        folder = _download(source, [*SMALL, *QUANTISED, INDEX])
        return folder, folder.parent.parent.resolve()  # the hub's cache: snapshots/COMMIT/ links to files in blobs/
    if not local.is_dir():
        raise InputError(f"fetch.model.path = {source.path} is no folder; name a folder with a model")
    return local, local.resolve()


def refuse_links(folder: Path, inside: Path) -> None:
    """Refuse a model folder whose small files are links out of the folder `inside`.

    Raises:
        InputError: names the file.
    """
    for name in present(folder, (*SMALL, *QUANTISED, INDEX)):
        _refuse_link(folder / name, inside)


def check_config(folder: Path) -> dict[str, Any]:
    """Refuse a model by its small files alone.

    Returns:
        The config.

    Raises:
        InputError: no config, code of its own, quantised already, unsupported architecture.
    """
    config = preflight.read_config(folder)
    preflight.model_shape(config)
    for name in present(folder, QUANTISED):
        raise InputError(f"the model is quantised already ({name} beside its weights); take its dense original")
    if "auto_map" in _json(folder / "tokenizer_config.json"):
        raise InputError("tokenizer_config.json has `auto_map`: it wants to run Python code, which is never done")
    return config


def weights(source: ModelSource, folder: Path, inside: Path) -> list[str]:
    """Names of the weight files, the index among them; those of a hub model are downloaded.

    Raises:
        InputError: there are none, an index names what isn't there, a link leads out, or the hub can't be reached.
    """
    if source.hub is not None:
        _download(source, [SINGLE] if not (folder / INDEX).exists() else model_files.weights(folder))
    names = model_files.weights(folder)
    if not names:
        raise InputError(_no_weights(source, folder))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise InputError(f"{INDEX} names {some(missing)}, which is not there; fetch the model again")
    for name in names:
        _refuse_link(folder / name, inside)
    return [*names, INDEX] if names != [SINGLE] else names


def present(folder: Path, names: Iterable[str]) -> list[str]:
    """Those names that the folder has, be it as a broken link."""
    return [name for name in names if os.path.lexists(folder / name)]


def copy(folder: Path, inside: Path, names: Iterable[str], target: Path) -> None:
    """Copy files of a model folder, links as the files that they lead to within the folder `inside`.

    Raises:
        InputError: a link leads out.
    """
    for name in sorted(names):
        _refuse_link(folder / name, inside)
        shutil.copyfile(folder / name, target / name)


def origin(source: ModelSource) -> dict[str, Any]:
    """Where a model or a corpus came from, as source.json says it."""
    if source.hub is None:
        return {"kind": "local", "path": source.path}
    extra = {"config": source.config, "split": source.split} if isinstance(source, CorpusSource) else {}
    return {"kind": "hub", "hub": source.hub, "revision": source.revision} | extra


def _no_weights(source: ModelSource, folder: Path) -> str:
    if source.hub is not None:
        with hub.failures("model", source):
            names = HfApi().list_repo_files(source.hub, revision=source.revision)
    else:
        names = [path.name for path in folder.iterdir()]
    pickled = sorted(name for name in names if name.endswith(PICKLES))
    where = source.hub or source.path
    if pickled:
        return (
            f"{where} holds only pickled weights ({some(pickled)}), which can run code when they are read;"
            " take a revision with safetensors"
        )
    return f"{where} holds no {SINGLE} and no {INDEX}; take a model with safetensors weights"


def _download(source: ModelSource, names: list[str]) -> Path:
    """The folder of the hub's cache with these files of the repository, as far as it has them."""
    with hub.failures("model", source):
        return Path(snapshot_download(source.hub, revision=source.revision, allow_patterns=names))


def _refuse_link(path: Path, inside: Path) -> None:
    """Only ordinary files of the folder: a link could bring in any file that this user may read."""
    real = path.resolve()
    if inside.resolve() not in real.parents:
        ours = DVC_OBJECT.search(real.as_posix())
        way_out = f"`dvc unprotect {path.parent}` makes it one" if ours else "copy the file itself there (`cp -L`)"
        raise InputError(f"{path} is a link out of the model folder, not a file; {way_out}")
    if path.exists() and not real.is_file():
        raise InputError(f"{path} is no ordinary file; fetch the model again")


def _json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch the model again") from error
    return value if isinstance(value, dict) else {}
