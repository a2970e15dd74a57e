"""What a model folder holds besides the model (tokenizer, generation settings), copied in as few bytes as goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from tasks.models import generations, model_files, tokenizer_archive


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy the tokenizer and generation settings of a model folder; JSON in as few bytes as goes.

    A file keeps its content: blanks go, and the merges of a BPE are written as strings, if that is the same tokenizer.

    Returns:
        The names of the files.

    Raises:
        InputError: the tokenizer is compressed, and damaged.
    """
    with tokenizer_archive.unpacked(source) as path:
        return _copy(path, folder)


def _copy(source: Path, folder: Path) -> list[str]:
    names = []
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source / name for name in (*model_files.TOKENIZER, model_files.GENERATION)):
        if not path.is_file():
            continue
        if path.suffix == ".json":
            text = path.read_text(encoding="utf-8")
            small = _small_tokenizer(text) if path.name == "tokenizer.json" else None
            content = json.loads(text)
            if path.name == model_files.TOKENIZER_CONFIG:
                content = generations.tokenizer_config(content)
            (folder / path.name).write_text(small or _small_json(content), encoding="utf-8")
        else:
            shutil.copyfile(path, folder / path.name)
        names.append(path.name)
    return names


def _small_json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def _small_tokenizer(text: str) -> str | None:
    """A tokenizer.json whose merges are strings, not pairs; None where the library doesn't read it as the same one."""
    content = json.loads(text)
    try:
        merges = content["model"]["merges"]
        content["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        small = _small_json(content)
        same = tokenizers.Tokenizer.from_str(small).to_str() == tokenizers.Tokenizer.from_str(text).to_str()
    except Exception:  # no BPE, or one that this library can't read: what it raises has no narrower class
        return None
    return small if same else None
