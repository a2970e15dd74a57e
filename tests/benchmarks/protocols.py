"""What does each perplexity protocol say of one model on one text, WikiText-2's test split?

    OMP_NUM_THREADS=1 python -m tests.benchmarks.protocols --threads 1 [--model stories260k] [--only sliding]

Needs ../shared. The text is the rows as the hub serves them, 4,358 with the empty ones; no window is left out.
Perplexity is per token and so belongs to a vocabulary; bits per byte compares. A protocol whose windows exceed the
model's context has a note in the place of figures; sliding-512-512 is gptq-2048 with shorter windows and the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tasks.algorithms.scoring import likelihood, protocols
from tasks.models import dense_folder
from tests.benchmarks.chain import Chain
from tests.benchmarks.table import SHARED, Row, Subject, main

TEXT = SHARED / "data/wikitext2/test.jsonl"
LENGTH = 512
STRIDES = {"sliding": (512, 256)}
"""Tokens between windows' starts of the protocols that have the parameter; elsewhere the length."""
COLUMNS = ["protocol", "perplexity", "bits_per_byte", "predictions", "bytes", "windows"]


def rows(base: Chain, subject: Subject) -> Iterator[Row]:
    """Each protocol with windows of 512."""
    for name in protocols.NAMES:
        for stride in STRIDES.get(name, (LENGTH,)):
            protocol = protocols.protocol(name, LENGTH, stride)
            yield {"protocol": protocol.label}, partial(measured, base, protocol)


def measured(base: Chain, protocol: protocols.Protocol, text: Path = TEXT) -> dict[str, Any]:
    """The row of a protocol."""
    folder = base.output("fetch") / "model"
    protocols.check_context(protocol, dense_folder.config(folder).get("max_position_embeddings"))
    with text.open(encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    prepared = likelihood.prepare(protocol, dense_folder.load_tokenizer(folder), documents)
    score = likelihood.score(dense_folder.load_dense(folder), prepared, 8)
    return {
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "predictions": len(score.nll),
        "bytes": int(score.spans.sum()),
        "windows": score.windows,
    }


if __name__ == "__main__":
    main("protocols", COLUMNS, rows)
