"""The one reader of params.yaml: DVC's own parser, so that a stage computes with the values that DVC records.

YAML has dialects: PyYAML's 1.1 reads `1e-05`, which DVC writes, as text, `010` as 8 and `yes` as true; DVC's 1.2 reads
a number, 10 and a text. It checks no value: that is the schema's part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.algorithms.errors import InputError

if TYPE_CHECKING:
    from dvc.utils.serialize import YAMLFileCorruptedError


def read(path: Path) -> Any:
    """The content of a parameter file.

    Raises:
        InputError: it can't be read, is no UTF-8, no YAML, or gives a key twice.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; run from the project's folder") from error
    return parse(content, str(path))


def parse(content: bytes, source: str) -> Any:
    """The same of a file's bytes.

    Args:
        source: its name, for errors.

    Raises:
        InputError: as `read`.
    """
    from dvc.utils.serialize import YAMLFileCorruptedError, parse_yaml  # DVC takes time, the schema alone needn't

    try:
        return parse_yaml(content.decode("utf-8"), source)
    except UnicodeDecodeError as error:
        raise InputError(_no_text(source, error)) from error
    except YAMLFileCorruptedError as error:
        raise InputError(_sentence(source, error)) from error
    except RecursionError as error:
        raise InputError(f"{source} is nested too deeply; a section holds values and small tables") from error


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(Dotted name, value) of all that a section or a whole file holds; an empty table is a value."""
    if isinstance(value, dict) and value:
        for key in value:
            yield from flat(value[key], f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def told(error: BaseException) -> str | None:
    """The sentence for what DVC couldn't read (params.yaml, dvc.yaml, dvc.lock); None where it failed otherwise."""
    seen: BaseException | None = error
    while seen is not None:
        cause = seen.__cause__
        if type(seen).__name__ == "YAMLFileCorruptedError":
            return _sentence(seen.path, seen)
        if type(seen).__name__ == "EncodingError" and isinstance(cause, UnicodeDecodeError):
            return _no_text(seen.path, cause)
        seen = cause
    return None


def _no_text(source: str, error: UnicodeDecodeError) -> str:
    line = error.object[: error.start].count(b"\n") + 1
    return f"{source} is no UTF-8 text (line {line}): save it as UTF-8"


def _sentence(source: str, error: YAMLFileCorruptedError) -> str:
    """With the line, which DVC's own sentence lacks."""
    cause = error.__cause__
    mark, problem = getattr(cause, "problem_mark", None), getattr(cause, "problem", None)
    if twice := re.match(r'found duplicate key "(.*?)" with value', problem or ""):
        return f"{source}, line {mark.line + 1}: `{twice[1]}` is given a second time; remove one of them"
    where = f", line {mark.line + 1}" if mark else ""
    return f"{source} is not valid YAML: {problem or ' '.join(str(cause).split())}{where}"
