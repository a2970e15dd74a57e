"""What does lm-evaluation-harness say of each model on the tasks whose documents are in ../shared?

    OMP_NUM_THREADS=1 python -m tests.benchmarks.harness --threads 1 [--model stories260k] [--only hellaswag]

The stages harness_data and harness with the fetched model: 500 documents of HellaSwag, 150 questions of TriviaQA closed
book, 24 open book (6 of the 30 have no context), WikiText-2's test split by articles. `agreement` is how far our own
log-likelihood of the same text is from lm_eval's, relatively.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from tests.benchmarks.chain import Chain
from tests.benchmarks.table import SHARED, Row, Subject, main

FILES = {
    "hellaswag": "hellaswag/validation_500.jsonl",
    "triviaqa_closed": "triviaqa/closed_book.jsonl",
    "triviaqa_open": "triviaqa/with_context.jsonl",
    "wikitext": "wikitext2/test.jsonl",
}
METRICS = {
    "hellaswag": ("acc", "acc_norm"),
    "triviaqa_closed": ("exact", "substring", "words", "correct"),
    "triviaqa_open": ("exact", "substring", "words", "correct"),
    "wikitext": ("bits_per_byte", "byte_perplexity", "agreement"),
}
COLUMNS = ["task", "metric", "value", "stderr", "samples", "truncated"]


def rows(base: Chain, subject: Subject) -> Iterator[Row]:
    """Each metric of each task."""
    for task, metrics in METRICS.items():
        given = {
            "harness_data.folder": os.path.relpath(SHARED / "data", base.root),
            f"harness_data.sources.{task}.path": FILES[task],
            "harness.tasks": [task],
        }
        for metric in metrics:
            yield {"task": task, "metric": metric}, partial(measured, base.variant(given), task, metric)


def measured(chain: Chain, task: str, metric: str) -> dict[str, Any]:
    """The row of a metric."""
    path = chain.output(f"harness@fetch-{task}") / "scores.json"
    scores = json.loads(path.read_text(encoding="utf-8"))
    found = {"samples": scores["samples"], "truncated": scores["truncated"]}
    if metric == "agreement":
        return found | {"value": f"{scores['agreement']['relative_difference']:.1e}"}
    return found | {key: scores["metrics"][metric][key] for key in ("value", "stderr")}


if __name__ == "__main__":
    main("harness", COLUMNS, rows, identity=2)
