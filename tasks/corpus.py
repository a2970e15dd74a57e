"""Write the built-in corpus: software requirements specifications from a seeded grammar, and prose that isn't.

Frames and vocabulary are in data/grammar, the mathematics of expanding them in `tasks.algorithms.text.grammar`. No
frame of one split is used in another, and the test split has product domains that the training never names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tasks.algorithms.text import grammar

if TYPE_CHECKING:
    from tasks.runtime.stage import Stage


def run(stage: Stage) -> None:
    """Write train, calibration, test and prose (out-of-domain) as rows `{"text", "domain"}`."""
    p = stage.params.corpus
    splits = grammar.split(_yaml(stage.input("domains.yaml")), _yaml(stage.input("frames.yaml")), p.seed)
    folder = stage.output("corpus")
    folder.mkdir()
    for name, size in (("train", p.train_bytes), ("calibration", p.calibration_bytes), ("test", p.test_bytes)):
        split = splits[name]
        _write(folder / f"{name}.jsonl", grammar.documents(split, size, p.seed))
        print(f"{name}: {len(split.frames)} frames, {len(split.domains)} domains, {_size(folder / name)} bytes")
    shutil.copyfile(stage.input("prose.jsonl"), folder / "prose.jsonl")


def _yaml(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)


def _size(stem: Path) -> int:
    return stem.with_suffix(".jsonl").stat().st_size


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)
