"""Bring model, tokenizer and corpora into data/fetch/: local files, or the Hugging Face hub's at a pinned commit.

A model folder is untrusted input. Cheap questions come first: config, tokenizer, corpora, and only then the weights, so
that a model the pipeline can't take is refused before its weights are read or downloaded. Which files are taken says
`tasks.models.model_files`, what a corpus becomes `tasks.sources.corpus_source`.

The model is copied as it is (no conversion; sharded stays sharded). It is a copy, never a link: DVC makes the files of
its cache read-only, and a later edit of the user's own file must not reach into that cache.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.model.shape import shape_of_config
from tasks.models import dense_folder, model_files
from tasks.parameters import preflight
from tasks.parameters.special_tokens import Known
from tasks.runtime import files
from tasks.sources import canonical_names, corpus_source, hub, model_source, weight_check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.parameters.source_sections import ModelSource
    from tasks.runtime.stage import Stage

CORPORA = ("train", "calibration", "test", "test_ood")


def run(stage: Stage) -> None:
    """Write data/fetch/model, data/fetch/corpora and data/fetch/source.json.

    Raises:
        InputError: the model or a corpus can't be used, or the hub can't be reached.
    """
    source, target = stage.params.fetch.model, stage.output("model")
    target.mkdir(parents=True)
    folder, inside = model_source.locate(source, _declared(stage, source))
    config = check_folder(folder, inside)
    importlib.import_module("tasks.packed.self_test").check(config)  # by name: it shapes no artifact
    model_source.copy(folder, inside, model_source.present(folder, model_files.SMALL), target)
    tokenizer = _tokenizer(target)
    size = _tokenizer_size(tokenizer)
    preflight.check_tokenizer(size, shape_of_config(config).vocabulary)
    preflight.check_special_tokens(stage.everything, _special_tokens(tokenizer))
    if source.hub is not None:  # of a local model everything was known before the stage started
        preflight.check(stage.everything, config, tokenizer_size=size, stage="fetch")
    corpora = _corpora(stage, tokenizer)
    model_source.copy(folder, inside, model_source.weights(source, folder, inside), target)
    if families.known(config) is None and canonical_names.rewrite(target):
        print("tensors of the model were renamed to what transformers calls them")
    tensors = weight_check.check_weights(target, stage)
    record = {
        "model": model_source.origin(source)
        | {"architecture": families.family(config).architecture, "tensors": tensors},
        "files": {file.name: _identity(file) for file in target.iterdir()},
        "corpora": corpora,
    }
    files.write_json(stage.output("source.json"), record)


def check_folder(folder: Path, inside: Path | None = None) -> dict[str, Any]:
    """Refuse a model folder by its small files alone; no weight is read.

    Args:
        inside: no link may lead out of this folder; the model folder itself by default.

    Returns:
        The config.

    Raises:
        InputError: no config, code of its own, quantised already, unsupported architecture, a link that leads out, a
            text that is far too large.
    """
    model_source.refuse_links(folder, inside or folder)
    model_files.check_sizes(folder)
    return model_source.check_config(folder)


def _corpora(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Write all corpora, and say where they came from."""
    folder, corpora = stage.output("corpora"), {}
    folder.mkdir(parents=True)
    for name in CORPORA:
        source, target = getattr(stage.params.fetch.corpora, name), folder / f"{name}.jsonl"
        rows = corpus_source.write(name, source, _declared(stage, source), target)
        corpora[name] = model_source.origin(source) | {"field": source.field} | rows | _identity(target)
    for name, (tokens, keys) in preflight.tokens_needed(stage.everything).items():
        corpus_source.check_length(folder / f"{name}.jsonl", tokenizer, tokens, keys)
    return corpora


def _declared(stage: Stage, source: ModelSource) -> Path | None:
    """The folder or file of a local source, as dvc.yaml declares it."""
    return stage.input(os.path.relpath(source.path)) if source.hub is None else None


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return dense_folder.load_tokenizer(folder)
    except Exception as error:  # any entry of an untrusted tokenizer can be wrong in its own way
        way_out = "name a model folder with a tokenizer.json"
        if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
            raise InputError(f"the tokenizer is a tokenizer.model alone, which isn't read here; {way_out}") from error
        raise InputError(f"the tokenizer can't be loaded ({hub.line(error)}); {way_out}") from error


def _tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)  # ids may have gaps


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> Known:
    return Known(tokenizer.bos_token_id is not None, tokenizer.eos_token_id is not None, tokenizer.is_fast)


def _identity(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
