"""Bring the documents of an evaluation task into data/harness_data/: a local file, or the hub's data set at a commit.

An item of the stage's matrix is a task that `harness.tasks` names, cached by DVC on its own. Its documents.jsonl has
one form whatever the source (`tasks.algorithms.text.task_documents`), so the stage `harness` needs no network, and a
task reruns only where its own documents changed. source.json says where they came from, and how many rows had no
document. The hub's rows are streamed: nothing is left in a cache, and no code of a data set is run. What a split holds
is not judged here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.algorithms.errors import InputError
from tasks.algorithms.text import task_documents
from tasks.runtime import files
from tasks.sources import hub, json_lines

if TYPE_CHECKING:
    from tasks.parameters.source_sections import TaskSource
    from tasks.runtime.stage import Stage

CORPUS = "corpus"
"""The task whose documents are the fetched test split."""
DOCUMENTS = "documents.jsonl"


def run(stage: Stage) -> None:
    """Write documents.jsonl of the task, and source.json.

    Raises:
        InputError: a file is not there, the hub can't be reached, or a row can't be used.
    """
    task = stage.item
    source = None if task == CORPUS else getattr(stage.params.harness_data.sources, task)
    origin, rows = _hub(source) if source and source.path is None else _local(stage, task, source)
    record = {**origin, **_write(task, rows, stage.output(DOCUMENTS))}
    files.write_json(stage.output("source.json"), record)
    print(f"{task}: {record['documents']} documents, {record['rows_without_document']} rows without")


def skip(stage: Stage) -> None:
    """Write an empty file."""
    stage.output(DOCUMENTS).touch()
    files.write_json(stage.output("source.json"), {})


def _local(stage: Stage, task: str, source: TaskSource | None) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    if source is None:
        return {"kind": "corpus", "split": "test"}, _rows(stage.input("corpora") / "test.jsonl", task)
    own = stage.params.harness_data.folder
    folder = stage.input(os.path.relpath(own))
    path = folder / source.path
    if folder.resolve() not in path.resolve().parents:
        raise InputError(f"harness_data.sources.{task}.path = {source.path} leads out of harness_data.folder = {own}")
    if not path.is_file():
        raise InputError(
            f"harness_data.sources.{task}.path = {source.path} is no file in harness_data.folder = {own};"
            " name one, or null for the hub's"
        )
    return {"kind": "local", "path": source.path}, _rows(path, task)


def _rows(path: Path, task: str) -> Iterator[dict[str, Any]]:
    try:
        for number, row in json_lines.rows(path):
            if not isinstance(row, dict):
                raise InputError(f"line {number} of {path.name} (task {task}) is no JSON object")
            yield row
    except json_lines.BadLine as bad:
        raise InputError(f"line {bad.number} of {path.name} (task {task}) is not valid JSON: {bad.reason}") from bad


def _hub(source: TaskSource) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    return {"kind": "hub", **source.model_dump(exclude={"path"})}, _hub_rows(source)


def _hub_rows(source: TaskSource) -> Iterator[dict[str, Any]]:
    import datasets  # slow, and only needed here

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would report each use
    with hub.failures("data set", source):
        yield from datasets.load_dataset(
            source.hub, source.config, split=source.split, revision=source.revision, streaming=True
        )


def _write(task: str, rows: Iterator[dict[str, Any]], target: Path) -> dict[str, int]:
    written = dropped = 0
    with target.open("w", encoding="utf-8", newline="\n") as file:
        for document in task_documents.documents(task, rows):
            if document is None:
                dropped += 1
                continue
            written += 1
            try:
                file.write(json.dumps(document, ensure_ascii=False, sort_keys=True) + "\n")
            except UnicodeEncodeError as error:
                raise InputError(f"document {written} of task {task} is no valid Unicode ({error.reason})") from error
    if not written:
        raise InputError(f"task {task} has no document in {dropped} rows; name another file for it")
    return {"documents": written, "rows_without_document": dropped}
