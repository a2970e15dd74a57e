"""The text file of prompts that evaluate.prompts names."""

from __future__ import annotations

from pathlib import Path

from tasks.algorithms.errors import InputError


def read(path: Path) -> list[str]:
    """A prompt per line of a text file, blanks around it and empty lines left out.

    Raises:
        InputError: it holds none, or is no UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"evaluate.prompts = {path} is no UTF-8 ({error.reason}); save it as such") from error
    if prompts := [line.strip() for line in lines if line.strip()]:
        return prompts
    raise InputError(f"evaluate.prompts = {path} holds no prompt; write one on a line")
