"""The texts of a corpus: a local .jsonl, .parquet or .txt file, or a data set of the hub at a pinned commit.

They are written as JSON lines of exactly {"text": str}, in their order; rows without text are dropped and counted. No
code of a data set is run.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.algorithms.errors import InputError
from tasks.sources import hub, json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.parameters.source_sections import CorpusSource


def write(name: str, source: CorpusSource, local: Path | None, target: Path) -> dict[str, int]:
    """Write one corpus.

    Args:
        name: of the corpus in params.yaml, for errors.
        local: the file of a corpus that isn't on the hub.

    Returns:
        How many rows it has, and how many were dropped.

    Raises:
        InputError: there is no text, a row isn't text, or the file or the hub can't be read.
    """
    rows = empty = 0
    with open(target, "w", encoding="utf-8", newline="\n") as file:
        for text in _texts(name, source, local):
            if text.strip():
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                rows += 1
            else:
                empty += 1
    if not rows:
        raise InputError(
            f"corpus {name} ({source.hub or source.path}) is empty: {empty} rows, none with text; name another"
        )
    return {"rows": rows, "empty_rows_dropped": empty}


def check_length(corpus: Path, tokenizer: PreTrainedTokenizerBase, needed: int, keys: str) -> None:
    """Refuse a written corpus with fewer tokens than a later stage needs; only as much as necessary is tokenised.

    Args:
        needed: tokens.
        keys: the parameters that ask for them, for the error.

    Raises:
        InputError: it has fewer.
    """
    rows, tokens = 64, 0
    while tokens < needed:
        texts = list(itertools.islice(json_lines.documents(corpus), rows))
        tokens = len(tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"])
        if tokens < needed and len(texts) < rows:
            raise InputError(
                f"corpus {corpus.stem} has {tokens} tokens, {needed} are needed; name a longer one, or lower {keys}"
            )
        rows *= 4


def _texts(name: str, source: CorpusSource, local: Path | None) -> Iterator[str]:
    """The texts of a corpus in their order, empty ones included."""
    for row, value in _hub_rows(source) if local is None else _local_rows(name, source, local):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{row} of corpus {name}: `{source.field}` is {type(value).__name__}, expected text")
        text = value or ""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{row} of corpus {name} is no valid Unicode ({error.reason}); mend the file") from error
        yield text


def _local_rows(name: str, source: CorpusSource, path: Path) -> Iterator[tuple[str, Any]]:
    read = READERS.get(path.suffix)
    if read is None or not path.is_file():
        raise InputError(f"fetch.corpora.{name}.path = {source.path} is no {', '.join(READERS)} file; name one")
    return read(path, source.field)


def _json_lines(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    for number, row in json_lines.rows(path):
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: holds {type(row).__name__}, expected an object with `{field}`")
        if field not in row:
            columns = ", ".join(row) or "none"
            raise InputError(f"{path}, line {number}: no column `{field}`, only {columns}; set `field`")
        yield f"line {number}", row[field]


def _plain_text(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    """One row per line, as the `text` builder of `datasets` has it; the field is of no account."""
    for number, line in json_lines.lines(path):
        yield f"line {number}", line.rstrip("\n")


def _parquet(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet

    row = 0
    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        if field not in columns:
            raise InputError(f"{path}: no column `{field}`, only {', '.join(columns) or 'none'}; set `field`")
        for batch in file.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield f"row {row}", value
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, after row {row}: `{field}` is no UTF-8 text ({error.reason}); write it again"
        ) from error
    except (ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk's; a damaged page is an OSError without a number
            raise
        raise InputError(f"{path} is no valid parquet file ({hub.line(error)}); write it again") from error


READERS = {".jsonl": _json_lines, ".parquet": _parquet, ".txt": _plain_text}
"""By suffix: (path, field) -> (where, value) of each row."""


def _hub_rows(source: CorpusSource) -> Iterator[tuple[str, Any]]:
    import datasets  # slow, and only needed here

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would report each use
    with hub.failures("data set", source):
        data = datasets.load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
    if source.field not in data.column_names:
        columns = ", ".join(data.column_names)
        raise InputError(f"data set {source.hub}: no column `{source.field}`, only {columns}; set `field`")
    with hub.failures("data set", source):
        for row, value in enumerate(data.select_columns([source.field]), 1):
            yield f"row {row}", value[source.field]
