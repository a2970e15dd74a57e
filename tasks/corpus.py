"""Write the built-in corpus: software requirements specifications from a seeded grammar, and prose that isn't.

Frames and vocabulary are in data/grammar, the way from them to a document is in `tasks.built_in_model`. No frame of one
split is used in another, and the test split has product domains that the training never names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.built_in_model import documents, splits

if TYPE_CHECKING:
    from tasks.runtime.stage import Stage


def run(stage: Stage) -> None:
    """Write train, calibration, test and prose (out-of-domain) as rows `{"text", "domain"}`."""
    p = stage.params.corpus
    grammar = [splits.load(stage.input(name)) for name in ("grammar/domains.yaml", "grammar/frames.yaml")]
    parts = splits.split(*grammar, p.seed)
    folder = stage.output("corpus")
    folder.mkdir()
    for name, size in (("train", p.train_bytes), ("calibration", p.calibration_bytes), ("test", p.test_bytes)):
        part, path = parts[name], folder / f"{name}.jsonl"
        _write(path, documents.documents(part, size, p.seed))
        print(f"{name}: {len(part.frames)} frames, {len(part.domains)} domains, {path.stat().st_size} bytes")
    shutil.copyfile(stage.input("grammar/prose.jsonl"), folder / "prose.jsonl")


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)
