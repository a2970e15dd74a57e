"""Export a model folder to the engines that run it on small devices, and say what that changed and cost.

onnx-int4: ONNX Runtime GenAI with the package's own codes and scales. onnx-int8: the same engine, weights quantised
again. gguf: llama.cpp, the package's codes and scales. gguf-f32: llama.cpp with every weight in float32, the way to
compare it with PyTorch without its rounding of activations. DIR gets the engine's files and export.json: what was
densified, merged or repeated, with the bytes of the component that it concerns (all its changes together) and whether
the engine still computes with the package's values; bytes by what they are for against the package's; and with `text`
perplexity and greedy tokens against the PyTorch model: what the changes that are not exact cost, together. Nothing is
written where anything fails. It trains and repairs nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import importlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tasks.algorithms.errors import InputError
from tasks.export import source_model
from tasks.models import dense_folder
from tasks.runners import any_folder, engines, llama_bindings
from tasks.runtime import files
from tasks.sources import json_lines

_ENGINES = {
    "tasks.export.onnx_format": lambda: importlib.import_module("onnxruntime_genai"),
    "tasks.export.gguf_format": llama_bindings.import_library,
}
"""Module -> what imports the engine that runs what it writes, which a check needs."""
FORMATS = {
    "onnx-int4": ("tasks.export.onnx_format", "int4", "onnxruntime-genai"),
    "onnx-int8": ("tasks.export.onnx_format", "int8", "onnxruntime-genai"),
    "gguf": ("tasks.export.gguf_format", "write", "gguf"),
    "gguf-f32": ("tasks.export.gguf_format", "write_float32", "gguf"),
}
"""Name -> (module, its function, the package that defines the format)."""
REPORT = "export.json"
SCRATCH = ".export"
"""Ends the name of the folder in which an export is made."""
_SAME = {"values": ("positions", "blocks")}
"""Component of an export -> those of a source that are the same matter: where kept weights are; dense matrices."""
_PROMPTS, _PROMPT, _NEW = 20, 16, 40
"""Of a check: prompts, the beginnings of documents; tokens of each; and greedy tokens after each."""
_WINDOWS = 16
"""Of a check's perplexity, each as long as the context, at most 256."""


def export(folder: Path, kind: str, out: Path, text: Path | None = None) -> dict[str, Any]:
    """Write `out` and return the content of its export.json.

    Args:
        folder: a packed, quantised or dense model folder.
        kind: one of `FORMATS`.
        text: a JSONL file of {"text"}, to check the export on; None: not checked.

    Raises:
        InputError: an unknown format; `out` holds something; a package isn't installed; the model is damaged, or the
            format can't hold it; the text is too short.
    """
    module, function, engine = _format(kind)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} isn't empty: name a folder that isn't there yet")
    if text:
        _need(_ENGINES[module.__name__], f"checking {kind}")
    windows, prompts = _check_data(folder, text) if text else ([], [])
    source = source_model.read(folder, module.check)
    with _scratch(out) as scratch:
        written = scratch / "model"
        written.mkdir()
        changes = getattr(module, function)(source, written)
        report = {"format": kind, "written_with": f"{engine} {importlib.metadata.version(engine)}"}
        report |= _sizes(folder, written, module.component_bytes(written))
        report["changes"] = {what: _cost(change, report["components"]) for what, change in changes.items()}
        if text:
            report["check"] = check(folder, written, windows, prompts)
        files.write_json(written / REPORT, report)
        for path in (*written.rglob("*"), written):
            files.sync(path)
        if out.exists():
            out.rmdir()
        os.replace(written, out)
    return report


def check(folder: Path, exported: Path, windows: list[np.ndarray], prompts: list[np.ndarray]) -> dict[str, Any]:
    """Perplexity and greedy tokens of a model in PyTorch and exported.

    Args:
        windows: int [length] each.
        prompts: int [length] each.

    Returns:
        `perplexity`: of source and export, and the relative change; `largest_logit_difference` over the windows;
        `same_argmax`: the share of the windows' places with the same most likely token; `prompts` and, of them,
        `same_prompts`, whose greedy tokens are all the same; `widest_gap`: where tokens first differ, how much more the
        source's logit is than that of the export's token, at most.
    """
    ours, theirs = engines.load(folder), engines.load(exported)
    before, after = engines.perplexity(ours, windows), engines.perplexity(theirs, windows)
    pairs = [(ours.logits(window), theirs.logits(window)) for window in windows]
    same = [(a.argmax(axis=1) == b.argmax(axis=1)).mean() for a, b in pairs]
    gaps = [_gap(ours, theirs, ids) for ids in prompts]
    return {
        "perplexity": {"source": before, "export": after, "change": after / before - 1},
        "largest_logit_difference": max(float(np.abs(a - b).max()) for a, b in pairs),
        "same_argmax": float(np.mean(same)),
        "prompts": len(prompts),
        "new_tokens": _NEW,
        "same_prompts": gaps.count(0.0),
        "widest_gap": max(gaps, default=0.0),
    }


def _gap(ours: engines.Engine, theirs: engines.Engine, ids: np.ndarray) -> float:
    """0 where both generate the same; else how far apart the logits of their first different tokens are in `ours`."""
    a, b = (engine.generate(ids[None], _NEW)[0] for engine in (ours, theirs))
    if (a == b).all():
        return 0.0
    place = int((a != b).argmax())
    logits = ours.logits(np.concatenate([ids, a[:place]]))[-1]
    return max(float(logits[a[place]] - logits[b[place]]), 1e-9)  # never taken for the same


def _format(kind: str) -> tuple[Any, str, str]:
    if kind not in FORMATS:
        raise InputError(f"format = {kind!r} is not known: choose one of {', '.join(FORMATS)}")
    module, function, engine = FORMATS[kind]
    try:
        return importlib.import_module(module), function, engine
    except ModuleNotFoundError as error:
        raise InputError(_missing(kind, error.name)) from error


def _need(import_engine: Callable[[], Any], what: str) -> None:
    try:
        import_engine()
    except ModuleNotFoundError as error:
        raise InputError(_missing(what, error.name)) from error


def _missing(what: str, package: str | None) -> str:
    way_out = "cyllama, or llama-cpp-python for a model with an adapter" if package == "cyllama" else "-e '.[export]'"
    return f"{what} needs the package {package}, which isn't installed: pip install {way_out}"


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside `out` for as long as this process writes to it; what a killed one left of it is removed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{glob.escape(out.name)}.*{SCRATCH}"):
            with contextlib.suppress(OSError), _held(left):  # else another process is writing to it
                shutil.rmtree(left)
        scratch = Path(tempfile.mkdtemp(SCRATCH, f".{out.name}.", out.parent))
    except OSError as error:
        raise InputError(f"cannot write to {out.parent} ({error.strerror}): name another folder") from error
    with _held(scratch):
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; a BlockingIOError where one holds it. A kill lets it go."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _check_data(folder: Path, text: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Windows and prompts of a JSONL file, in the model's tokens."""
    if not text.is_file():
        raise InputError(f'{text} is no file: name a JSONL file of {{"text"}}')
    try:
        rows = [row + "" for row in json_lines.read(text)]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{text} is no JSONL of {{"text": a string}} ({error!r}): name another file') from error
    tokenizer = dense_folder.load_tokenizer(folder)
    length = min(256, any_folder.config(folder).get("max_position_embeddings", 256))
    ids = np.array(tokenizer("\n".join(rows), add_special_tokens=False, verbose=False)["input_ids"])
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:_WINDOWS]
    starts = [tokenizer(row[: 8 * _PROMPT], add_special_tokens=False)["input_ids"][:_PROMPT] for row in rows]
    starts = [np.array(start) for start in starts if len(start) == _PROMPT]
    if not windows or len(starts) < _PROMPTS:
        raise InputError(
            f"{text} has {len(ids)} tokens and {len(starts)} documents of {_PROMPT} or more, where a check needs "
            f"{length} and {_PROMPTS}: name a longer one"
        )
    return windows, starts[:: len(starts) // _PROMPTS][:_PROMPTS]


def _sizes(folder: Path, written: Path, components: dict[str, int]) -> dict[str, Any]:
    paths = {path.name: path for path in sorted(written.iterdir())}
    total, before = source_model.folder_bytes(written), source_model.folder_bytes(folder)
    return {
        "files": {name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for name, path in paths.items()},
        "bytes": {"source": before, "export": total, "ratio": total / before},
        "components": {
            "source": any_folder.component_bytes(folder),
            "export": components | {"metadata": total - sum(components.values())},
        },
    }


def _cost(change: source_model.Change, components: dict[str, dict[str, int]]) -> dict[str, Any]:
    """A change as plain data, with the bytes that its component takes more than in the source."""
    named = (change.component, *_SAME.get(change.component, ()))
    before = sum(components["source"].get(name, 0) for name in named)
    bytes_ = components["export"].get(change.component, 0) - before if change.component else 0
    return {"done": change.done, "component": change.component, "bytes": bytes_, "exact": change.exact}
