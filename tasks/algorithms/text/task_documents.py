"""One form for the documents of each evaluation task, whether they come from the hub's data set or from a user's file.

A row of either kind becomes the document that data/harness_tasks/<task>.yaml writes its prompt from:

| task | document |
|---|---|
| hellaswag | query, endings, label (index of the right ending) |
| arc_easy, arc_challenge | question, choices {text, label}, answerKey |
| piqa | goal, sol1, sol2, label (0 or 1) |
| winogrande | sentence with a `_`, option1, option2, answer ("1" or "2") |
| triviaqa_closed | question, answer, aliases |
| triviaqa_open | the same and context: the shortest that is not empty |
| wikitext | page: an article of WikiText, joined from the rows of the hub's data set |
| corpus | text |

Prompts follow lm_eval 0.4.13's own tasks of the same names. It knows no file and asks no hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tasks.algorithms.errors import InputError

Row = Mapping[str, Any]


def documents(task: str, rows: Iterable[Row]) -> Iterator[dict[str, Any] | None]:
    """Make the documents of a task; None for a row that has none (an open-book question without a context).

    Raises:
        InputError: a row lacks a column, or holds what the task can't use; the row is named.
    """
    if task == "wikitext":
        yield from _pages(rows)
        return
    for number, row in enumerate(rows, 1):
        try:
            document = CONVERTERS[task](row)
            _check_texts(document or {})
            yield document
        except KeyError as error:
            columns = ", ".join(sorted(map(str, row))) or "none"
            raise InputError(f"row {number} of task {task} has no column {error}, only {columns}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"row {number} of task {task} can't be used: {error}") from error


def _check_texts(document: Mapping[str, Any]) -> None:
    """Check that everything but a number as label is text, or a list of text."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            _check_texts(value)
            continue
        texts = value if isinstance(value, list) else [] if key == "label" else [value]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"`{key}` is {value!r}, expected text")


def _hellaswag(row: Row) -> dict[str, Any]:
    if "query" in row:
        query, endings = row["query"], list(row["endings"])
    else:  # the hub's columns
        query = _cleaned(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        endings = [_cleaned(ending) for ending in row["endings"]]
    return {"query": query, "endings": endings, "label": _index(row["label"], len(endings))}


def _cleaned(text: str) -> str:
    """Remove the marks that WikiHow left in HellaSwag, as lm_eval's task does."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _arc(row: Row) -> dict[str, Any]:
    choices = {key: list(row["choices"][key]) for key in ("text", "label")}
    if row["answerKey"] not in choices["label"]:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of {choices['label']}")
    return {"question": row["question"], "choices": choices, "answerKey": row["answerKey"]}


def _piqa(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in ("goal", "sol1", "sol2")} | {"label": _index(row["label"], 2)}


def _winogrande(row: Row) -> dict[str, Any]:
    if row["sentence"].count("_") != 1 or str(row["answer"]) not in ("1", "2"):
        raise ValueError(f"expected one `_` in the sentence and answer 1 or 2, got {row['answer']!r}")
    return {key: row[key] for key in ("sentence", "option1", "option2")} | {"answer": str(row["answer"])}


def _triviaqa_closed(row: Row) -> dict[str, Any]:
    answer = row["answer"]
    value, aliases = (answer["value"], answer["aliases"]) if isinstance(answer, Mapping) else (answer, row["aliases"])
    return {"question": row["question"], "answer": value, "aliases": list(aliases)}


def _triviaqa_open(row: Row) -> dict[str, Any] | None:
    if "context" in row:
        contexts = [row["context"]]
    else:  # the hub's columns
        contexts = [*row["entity_pages"]["wiki_context"], *row["search_results"]["search_context"]]
    known = [context for context in contexts if context.strip()]
    return {**_triviaqa_closed(row), "context": min(known, key=len)} if known else None


def _corpus(row: Row) -> dict[str, Any]:
    return {"text": row["text"]}


CONVERTERS: dict[str, Callable[[Row], dict[str, Any] | None]] = {
    "hellaswag": _hellaswag,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "triviaqa_closed": _triviaqa_closed,
    "triviaqa_open": _triviaqa_open,
    "corpus": _corpus,
}


def _pages(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Join rows to WikiText's articles: each begins at a heading of the first level.

    The hub's rows are the lines of the file, an empty one being " " there; pages as EleutherAI/wikitext_document_level.
    """
    page: list[str] = []
    for number, row in enumerate(rows, 1):
        text = row.get("page", row.get("text"))
        if not isinstance(text, str):
            raise InputError(f"row {number} of task wikitext has no text in a column `text` or `page`")
        if "page" in row:
            yield {"page": text}
            continue
        line = text.removesuffix("\n") or " "
        if _is_title(line):
            yield from _page(page)
            page = []
        page.append(line)
    yield from _page(page)


def _is_title(line: str) -> bool:
    words = line.split()
    return len(words) > 2 and words[0] == words[-1] == "=" and words[1] != "=" and words[-2] != "="


def _page(lines: list[str]) -> Iterator[dict[str, Any]]:
    if "".join(lines).strip():
        yield {"page": "\n".join(lines)}


def _index(value: Any, size: int) -> int:
    if not 0 <= int(value) < size:
        raise ValueError(f"label {value!r} is no index of {size} choices")
    return int(value)
