"""Read the corpora that fetch wrote: JSON lines of {"text": str}."""

from __future__ import annotations

import json
from pathlib import Path


def read(path: Path) -> list[str]:
    """The documents of a corpus, in order."""
    with path.open(encoding="utf-8") as rows:
        return [json.loads(row)["text"] for row in rows]
