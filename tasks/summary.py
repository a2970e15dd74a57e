"""`python -m tasks.summary`: the report's table for the terminal, with the seconds that each stage took.

Figures are those of stages.csv; seconds come from the stages' lineage records, since outputs hold no time. Where these
files lie is asked of DVC. It runs nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
from dvc.exceptions import DvcException
from dvc.repo import Repo

from tasks import lineage

NOTHING = "There is no report yet: `dvc repro` makes it."


def rows() -> list[dict[str, Any]]:
    """The report's rows, with the columns of its stages.csv, and `seconds`.

    A missing value is None; no row where there is no report yet.
    """
    with Repo() as repo:
        path = next((path for path in _outs(repo, "report") if path.name == "stages.csv"), None)
        if path is None or not path.exists():
            return []
        table = pd.read_csv(path).astype(object)
        records = table.where(table.notna(), None).to_dict("records")
        return [record | {"seconds": _seconds(repo, record["stage"])} for record in records]


def table() -> str:
    """The rows as text, and the protocol of the perplexities below; a sentence where there is no report."""
    found = rows()
    if not found:
        return NOTHING
    shown = pd.DataFrame(
        {
            "stage": [row["stage"] for row in found],
            "parameters": [_text(row["parameters"], ",.0f") for row in found],
            "zeros": [_text(row["zero_fraction"], ".1%") for row in found],
            "bytes": [_text(row["bytes"], ",.0f") for row in found],
            "ppl test": [_text(row["perplexity_test"], ",.3f") for row in found],
            "ppl ood": [_text(row["perplexity_test_ood"], ",.3f") for row in found],
            "seconds": [_text(row["seconds"], ",.1f") for row in found],
        }
    )
    width = shown["stage"].str.len().max()
    text = shown.to_string(index=False, formatters={"stage": f"{{:<{width}}}".format})
    protocols = sorted({row["protocol"] for row in found if row["protocol"]})
    return f"{text}\nperplexity by protocol {', '.join(protocols)}" if protocols else f"{text}\nnot evaluated"


def _outs(repo: Repo, name: str) -> list[Path]:
    try:
        return [Path(out.fs_path) for out in repo.stage.load_one(name=name).outs]
    except DvcException:
        return []


def _seconds(repo: Repo, name: str) -> float | None:
    """How long the stage took when it last ran, from its record; None without one."""
    folder = Path(repo.root_dir) / lineage.RECORDS
    path = next((path for path in _outs(repo, name) if folder in path.parents), None)
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"]) if path else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _text(value: Any, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


if __name__ == "__main__":
    print(table())
