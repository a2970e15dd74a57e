"""harness_data: the hub's rows and a user's file become the same documents, pages of WikiText, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import yaml

from tasks import harness_data
from tasks.algorithms.errors import InputError
from tasks.algorithms.text import task_documents
from tasks.parameters import evaluation_sections, source_sections
from tests.support.paths import DATA, ROOT

REVISION = "0123456789" * 4
AT_HUB = {"path": None, "hub": "stand/in", "revision": REVISION, "config": None, "split": "validation"}

HUB_ROWS: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [
        {
            "activity_label": "Roof",
            "ctx_a": "A man  sits [step] on it.",
            "ctx_b": "he",
            "endings": ["sings [title] A", "falls."],
            "label": "1",
        }
    ],
    "arc_easy": [
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B", "id": "1"}
    ],
    "piqa": [{"goal": "To open", "sol1": "pull", "sol2": "push", "label": 1}],
    "winogrande": [{"sentence": "It is _ .", "option1": "he", "option2": "she", "answer": "2"}],
    "triviaqa_closed": [{"question": "Who?", "answer": {"value": "Lewis", "aliases": ["S. Lewis"], "type": "x"}}],
    "triviaqa_open": [
        {
            "question": "Who?",
            "answer": {"value": "Lewis", "aliases": ["S. Lewis"]},
            "entity_pages": {"wiki_context": ["a long page", ""]},
            "search_results": {"search_context": ["short", "  "]},
        },
        {
            "question": "Without?",
            "answer": {"value": "x", "aliases": []},
            "entity_pages": {"wiki_context": []},
            "search_results": {"search_context": [""]},
        },
    ],
}
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [
        {"query": "Roof: A man sits on it. He", "endings": ["sings. A", "falls."], "label": 1},
    ],
    "arc_easy": [{"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}],
    "piqa": [{"goal": "To open", "sol1": "pull", "sol2": "push", "label": 1}],
    "winogrande": [{"sentence": "It is _ .", "option1": "he", "option2": "she", "answer": "2"}],
    "triviaqa_closed": [{"question": "Who?", "answer": "Lewis", "aliases": ["S. Lewis"]}],
    "triviaqa_open": [{"question": "Who?", "answer": "Lewis", "aliases": ["S. Lewis"], "context": "short"}],
}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def make(make_stage, tmp_path: Path):
    """make(task, source, out) -> the stage, with tmp_path as its folder of local files."""

    def made(task: str, source: dict[str, Any] | None = None, out: str = "out"):
        sources = {} if source is None else {task: source_sections.TaskSource(**AT_HUB | source)}
        given = {"folder": str(tmp_path), "sources": SimpleNamespace(**sources)}
        stage = make_stage({"harness_data": given}, {"corpora": tmp_path}, out, item=task)
        corpora = stage.input
        stage.input = lambda name: tmp_path if name not in ("corpora",) else corpora(name)
        return stage

    return made


def documents(stage: Any) -> list[dict[str, Any]]:
    harness_data.run(stage)
    return read(stage.output("documents.jsonl"))


@pytest.mark.parametrize("task", HUB_ROWS)
def test_rows_of_the_hub_and_documents_in_a_file_give_the_same(task, make, tmp_path, monkeypatch) -> None:
    """`datasets` itself reads a local folder as it would a repository."""
    (tmp_path / "stand/in").mkdir(parents=True)
    (tmp_path / "stand/in/validation.jsonl").write_text(lines(HUB_ROWS[task]), encoding="utf-8")
    (tmp_path / "own.jsonl").write_text(lines(DOCUMENTS[task]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    hub, local = make(task, {}), make(task, {"path": "own.jsonl"}, out="local")
    assert documents(hub) == DOCUMENTS[task] == documents(local)
    said = json.loads(hub.output("source.json").read_text())
    assert said["kind"] == "hub" and said["hub"] == "stand/in" and said["revision"] == REVISION
    assert (said["documents"], said["rows_without_document"]) == (1, len(HUB_ROWS[task]) - 1)
    files = [stage.output("documents.jsonl") for stage in (hub, local)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_corpus_is_the_fetched_test_split(make, tmp_path) -> None:
    (tmp_path / "test.jsonl").write_text(lines([{"text": "naïve"}, {"text": "b"}]), encoding="utf-8")
    assert documents(make("corpus")) == [{"text": "naïve"}, {"text": "b"}]


def test_the_hub_is_asked_for_the_pinned_commit_and_only_streamed(make, monkeypatch) -> None:
    calls = []

    def load(*positional, **named):
        calls.append((positional, named))
        return DOCUMENTS["piqa"]

    monkeypatch.setattr(datasets, "load_dataset", load)
    harness_data.run(make("piqa", {"config": "small"}))
    assert calls == [(("stand/in", "small"), {"split": "validation", "revision": REVISION, "streaming": True})]
    assert not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


@pytest.mark.parametrize("offline", [ConnectionError("no network"), datasets.exceptions.DatasetNotFoundError("x")])
def test_offline_is_one_sentence(make, monkeypatch, offline: Exception) -> None:
    def load(*_, **__):
        raise offline

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError) as caught:
        harness_data.run(make("piqa", {}))
    assert "data set stand/in" in str(caught.value) and "\n" not in str(caught.value)


BAD = {
    "no file": ({"path": "none.jsonl"}, None, "path = none.jsonl is no file in harness_data.folder"),
    "outside": ({"path": "../x.jsonl"}, None, "path = ../x.jsonl leads out of harness_data.folder"),
    "no JSON": ({"path": "own.jsonl"}, "{\n", r"line 1 of own.jsonl \(task piqa\) is not valid JSON"),
    "no object": ({"path": "own.jsonl"}, "[1]\n", r"line 1 of own.jsonl \(task piqa\) is no JSON object"),
    "no UTF-8": ({"path": "own.jsonl"}, b"\xff\n", r"line 1 of own.jsonl \(task piqa\) is not valid JSON"),
    "empty": ({"path": "own.jsonl"}, "", "task piqa has no document in 0 rows"),
    "a column": (
        {"path": "own.jsonl"},
        '{"goal": "x", "sol1": "a"}\n',
        "row 1 of task piqa has no column 'sol2', only",
    ),
    "a label": (
        {"path": "own.jsonl"},
        '{"goal": "x", "sol1": "a", "sol2": "b", "label": 2}\n',
        "row 1 of task piqa can't be used: label 2 is no index of 2 choices",
    ),
    "a type": (
        {"path": "own.jsonl"},
        '{"goal": 7, "sol1": "a", "sol2": "b", "label": 1}\n',
        "row 1 of task piqa can't be used: `goal` is 7, expected text",
    ),
    "no Unicode": (
        {"path": "own.jsonl"},
        '{"goal": "\\ud800", "sol1": "a", "sol2": "b", "label": 1}\n',
        "document 1 of task piqa is no valid Unicode",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_one_sentence(name, make, tmp_path) -> None:
    source, content, sentence = BAD[name]
    if content is not None:
        (tmp_path / "own.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=sentence) as caught:
        harness_data.run(make("piqa", source))
    assert "\n" not in str(caught.value)


ROWS = ["", " = One = \n", "", " Text of one . \n", " = = Part = = \n", " more \n", " = Two = \n", " Text . \n"]


def test_pages_of_wikitext_begin_at_headings_of_the_first_level() -> None:
    pages = [document["page"] for document in task_documents.documents("wikitext", ({"text": row} for row in ROWS))]
    assert pages == [" = One = \n \n Text of one . \n = = Part = = \n more ", " = Two = \n Text . "]
    assert list(task_documents.documents("wikitext", [{"page": "x"}])) == [{"page": "x"}]


def test_wikitext_2_has_its_62_articles() -> None:
    rows = read(DATA / "wikitext2/test.jsonl")  # long rows are cut, no heading is
    assert len(rows) == 4358
    pages = [document["page"] for document in task_documents.documents("wikitext", rows)]
    assert len(pages) == 62  # as EleutherAI/wikitext_document_level
    assert sum(len(page.split()) for page in pages) == sum(len(row["text"].split()) for row in rows)


def test_every_task_has_its_file_and_its_source() -> None:
    files = {path.stem for path in (ROOT / "data/harness_tasks").glob("*.yaml")}
    sources = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["harness_data"]["sources"]
    known = {*evaluation_sections.TaskName.__args__}
    assert files == known == {*sources} == {*task_documents.CONVERTERS, "wikitext"}


def test_off_leaves_empty_files(make) -> None:
    stage = make("corpus")
    harness_data.skip(stage)
    assert read(stage.output("documents.jsonl")) == []
    assert json.loads(stage.output("source.json").read_text()) == {}
