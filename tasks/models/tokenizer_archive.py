"""A tokenizer's files as one compressed file, which an entropy coded package has in their place.

bzip2 of a JSON object: name -> text, or, where a text is JSON without blanks, its content. Of a BPE the tokens that
merges make are left out, as they follow from those: of SmolLM2's 1,367,758 bytes 167,976 are left, where bzip2 or xz
alone leave 439,693 or 425,224. What doesn't come back to the character is stored as it is. bzip2 has one encoder, whose
output hasn't changed in twenty years, no time in its header, and a checksum.
"""

from __future__ import annotations

import bz2
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.algorithms.errors import InputError
from tasks.models import model_files


def pack(folder: Path) -> None:
    """Put the archive in the place of a folder's tokenizer files, but for those that are no text."""
    texts = {}
    for name in model_files.TOKENIZER:
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            texts[name] = (folder / name).read_bytes().decode()
    if not texts:
        return
    content = {name: _content(text) for name, text in texts.items()}
    (folder / model_files.ARCHIVE).write_bytes(bz2.compress(_json(content).encode(), 9))
    for name in texts:
        (folder / name).unlink()


def read(folder: Path) -> dict[str, str]:
    """Name -> text of the files that a folder's archive holds; empty without one.

    Raises:
        InputError: it is damaged.
    """
    path = folder / model_files.ARCHIVE
    if not path.exists():
        return {}
    model_files.check_sizes(folder)
    most = max(model_files.LARGEST.values())
    try:
        coder = bz2.BZ2Decompressor()
        data = coder.decompress(path.read_bytes(), most)
        if not coder.eof or coder.unused_data:
            raise ValueError(f"it holds more than {most} bytes, or ends too early or too late")
        content = json.loads(data)
        if not content.keys() <= set(model_files.TOKENIZER):
            raise ValueError("it names other files than a tokenizer's")
        return {name: _text(value) for name, value in content.items()}
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({str(error)[:100]}): fetch it again") from error


def added_bytes(folder: Path) -> int:
    """Bytes by which a folder's tokenizer is larger than its archive; 0 without one.

    Raises:
        InputError: as `read`.
    """
    texts = read(folder)
    size = (folder / model_files.ARCHIVE).stat().st_size if texts else 0
    return sum(len(text.encode()) for text in texts.values()) - size


@contextlib.contextmanager
def unpacked(folder: Path) -> Iterator[Path]:
    """A folder with a model folder's tokenizer and generation settings as stock libraries read them.

    It is the folder itself, or for the time being another one.

    Raises:
        InputError: as `read`.
    """
    texts = read(folder)
    if not texts:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in (*model_files.TOKENIZER, model_files.GENERATION):
            if name in texts:
                (Path(scratch) / name).write_bytes(texts[name].encode())
            elif (folder / name).is_file():
                shutil.copyfile(folder / name, Path(scratch) / name)
        yield Path(scratch)


def _json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def _content(text: str) -> Any:
    """An object that `_text` makes the text of; the text itself where there is none."""
    try:
        content = json.loads(text)
        short = _without_merged(content)
        if isinstance(short, dict) and _text(short) == text:
            return short
        return content if isinstance(content, dict) and _text(content) == text else text
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return text


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    vocabulary = value["model"]["vocab"] if _is_bpe(value) else None
    if isinstance(vocabulary, list):
        before, after = vocabulary
        tokens = [*before, *_merged(value), *after]
        value = value | {"model": value["model"] | {"vocab": {token: place for place, token in enumerate(tokens)}}}
    return _json(value)


def _is_bpe(content: Any) -> bool:
    model = content.get("model")
    return isinstance(model, Mapping) and "merges" in model and "vocab" in model


def _merged(content: Mapping[str, Any]) -> list[str]:
    """The token that each merge makes."""
    return [merge.replace(" ", "", 1) for merge in content["model"]["merges"]]


def _without_merged(content: Any) -> Any:
    """A BPE whose vocabulary is two lists: the tokens before those that the merges make, and after them."""
    if not _is_bpe(content):
        return content
    tokens, merged = list(content["model"]["vocab"]), _merged(content)
    first = tokens.index(merged[0]) if merged and merged[0] in tokens else len(tokens)
    return content | {"model": content["model"] | {"vocab": [tokens[:first], tokens[first + len(merged) :]]}}
