"""Make the one folder to ship: the final model, and a manifest that says what each file is and where it came from.

The manifest's lineage holds what this stage's declared inputs and parameters fix, so that the same inputs give the same
bytes: source, parameters of every stage, hashes. When, where and by which packages is in data/lineage
(`python -m tasks.lineage show`). Nothing is converted here; sizes are those of the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks import checkpoint, quantised, sparsity

if TYPE_CHECKING:
    from tasks.stage import Stage

MANIFEST = "manifest.json"


def run(stage: Stage) -> None:
    """Link the model's files, check the masks on the weights as loaded from there, write manifest and sparsity.csv.

    Raises:
        InputError: a pruned weight is no longer zero.
    """
    folder = stage.output("package/model")
    stage.pass_on(stage.input("eora/model"), folder)
    keep, pattern = checkpoint.load_masks(stage.input("masks.safetensors"))
    table = sparsity.ledger(quantised.block_weights(quantised.load_model(folder)), keep, pattern)
    sparsity.check(table, "package", enforce=True)
    sparsity.write(table, stage.output("sparsity.csv"))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "files": {str(path.relative_to(folder)): describe(path) for path in files},
        "pattern": pattern,
        "pruned_matrices": len(keep),
        "lineage": _lineage(stage),
    }
    checkpoint.write_json(folder / MANIFEST, manifest)
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    print(
        f"{len(files)} files, {total} bytes; pattern {pattern}: 0 violations in {len(keep)} pruned matrices as loaded"
    )


def skip(stage: Stage) -> None:
    """Pass the model on, with a manifest that names no file."""
    folder = stage.output("package/model")
    stage.pass_on(stage.input("eora/model"), folder)
    checkpoint.write_json(folder / MANIFEST, {"files": {}, "pattern": None, "pruned_matrices": 0, "lineage": {}})
    sparsity.write(pd.DataFrame(columns=sparsity.COLUMNS), stage.output("sparsity.csv"))


def describe(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": checkpoint.sha256(path)}


def _lineage(stage: Stage) -> dict[str, Any]:
    parameters = {name: section.model_dump() for name, section in vars(stage.params).items()}
    inputs = ("masks.safetensors", "source.json", "removed.json")
    return {
        "source": json.loads(stage.input("source.json").read_text(encoding="utf-8")),
        "parameters": {name: values for name, values in sorted(parameters.items())},
        "inputs": {name: describe(stage.input(name))["sha256"] for name in inputs},
    }
