"""Runs of words against naive loops, copies that were planted, and domains of texts whose origin is known."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tasks import overlap
from tasks.algorithms.text import overlap as algorithm
from tasks.parameters.source_sections import Overlap
from tasks.sources import json_lines
from tests.support.paths import DATA, ROOT, SHARED, STORIES_TEXT

PARAMS = Overlap(enabled=True, words=13, domain_words=5, sample=100, in_domain=0.065)


def text(draw: random.Random, words: int, vocabulary: int = 9) -> str:
    return " ".join(f"W{draw.randrange(vocabulary)}," for _ in range(words))


def naive(text: str, length: int) -> list[tuple[str, ...]]:
    words = "".join(c for c in text.lower() if c.isalnum() or c.isspace()).split()
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


@pytest.mark.parametrize("length", [2, 3, 13])
def test_shares_are_those_of_a_naive_loop(length: int) -> None:
    draw = random.Random(length)
    asked, searched = ([text(draw, draw.randrange(40)) for _ in range(12)] for _ in range(2))
    searched.append(asked[0] + " " + text(draw, 20))
    search = algorithm.Search(asked, length)
    for document in searched:
        search.add(document)
    for least in (1, 2):
        runs = [run for document in asked for run in naive(document, length)]
        hits = [run for run in runs if sum(run in naive(document, length) for document in searched) >= least]
        assert algorithm.share(search, asked, least) == pytest.approx(len(hits) / len(runs))
    assert 0 < len(hits) < len(runs) or length == 13


def test_case_punctuation_and_space_don_t_matter_but_order_does() -> None:
    search = algorithm.Search(["The pump, shall STOP."], 3)
    search.add("the   pump shall\nstop")
    assert search.found("The pump, shall STOP.").all()
    other = algorithm.Search(["The pump shall stop"], 3)
    other.add("stop shall pump the")
    assert not other.found("The pump shall stop").any()


def test_nothing_to_ask_and_texts_shorter_than_a_run() -> None:
    search = algorithm.Search(["too short", ""], 5)
    search.add("a b c d e f g")
    assert algorithm.share(search, ["too short", ""]) is None


@pytest.fixture
def stage(tmp_path: Path, make_stage):
    """Train of 60 texts; test has two of them, one a little changed, and one with 13 words of another."""
    draw = random.Random(0)
    texts = {"train": [text(draw, 60, 40) for _ in range(60)]}
    texts["test"] = [text(draw, 60, 40) for _ in range(6)]
    texts["test"] += [texts["train"][7], f"  {texts['train'][8]}\n", texts["train"][9].replace("W1,", "w1")]
    texts["test"].append(f"{text(draw, 20, 10**6)} {' '.join(texts['train'][10].split()[5:18])}")
    texts["test_ood"] = [text(draw, 60, 10**6) for _ in range(5)]
    for name, rows in texts.items():
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    records = {name: {"kind": "local", "path": f"{name}.txt", "field": "text", "sha256": name} for name in texts}
    (tmp_path / "source.json").write_text(json.dumps({"corpora": records}))
    return make_stage({"overlap": PARAMS}, {"corpora": tmp_path, "source.json": tmp_path / "source.json"})


def result(stage) -> dict:
    return json.loads(stage.output("overlap.json").read_text(encoding="utf-8"))


def test_planted_copies_are_found(stage) -> None:
    overlap.run(stage)
    test, other = (result(stage)["splits"][name] for name in ("test", "test_ood"))
    assert (test["documents"], test["verbatim"], test["verbatim_share"]) == (10, 2, 0.2)
    changed = naive(json_lines.read(stage.input("corpora") / "test.jsonl")[8], 13)
    assert test["contaminated"] == 4  # the verbatim ones, the changed one by lower case alone, and the 13 words
    runs = sum(max(words - 12, 0) for words in (*[60] * 9, 33))
    assert test["run_share"] == pytest.approx((2 * 48 + len(changed) + 1) / runs)
    assert (other["verbatim"], other["contaminated"], other["run_share"]) == (0, 0, 0.0)
    assert other["domain"] == "out-of-domain"
    first = stage.output("overlap.json").read_bytes()
    overlap.run(stage)
    assert stage.output("overlap.json").read_bytes() == first


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ({"sha256": "train"}, "the same text as train"),
        ({"path": "train.txt"}, "file train.txt as train"),
        ({"kind": "hub", "hub": "a/b", "config": "c", "split": "test"}, "data set a/b c as train"),
    ],
)
def test_one_source_is_in_domain_whatever_was_measured(stage, records: dict, words: str) -> None:
    path = stage.input("source.json")
    content = json.loads(path.read_text())
    content["corpora"]["test_ood"] |= records
    if "hub" in records:
        del content["corpora"]["train"]["path"]
        content["corpora"]["train"] |= records | {"split": "train"}
    path.write_text(json.dumps(content))
    overlap.run(stage)
    found = result(stage)["splits"]["test_ood"]
    assert (found["domain"], found["because"]) == ("in-domain", words)


def test_a_train_text_of_one_document_has_nothing_to_be_compared_with(stage) -> None:
    path = stage.input("corpora") / "train.jsonl"
    path.write_text(path.read_text().splitlines()[7] + "\n")
    overlap.run(stage)
    found = result(stage)["splits"]["test"]
    assert (found["verbatim"], found["similarity"], found["because"]) == (1, None, "too little text to compare")


def test_off_says_that_nothing_was_measured(stage) -> None:
    overlap.skip(stage)
    assert result(stage) == {"measured": False, "splits": {}}


def test_stories_are_in_the_domain_of_stories_alone() -> None:
    splits = {
        "stories": json_lines.read(STORIES_TEXT),
        "wikipedia": json_lines.read(DATA / "wikitext2/test.jsonl")[:150],
        "technical prose": json_lines.read(ROOT / "data/grammar/prose.jsonl"),
    }
    sources = {name: {"kind": "local", "path": name, "field": "text", "sha256": name} for name in (*splits, "train")}
    found = overlap.measure(DATA / "tinystories/train.jsonl", splits, sources, PARAMS)["splits"]
    assert {split for split, one in found.items() if one["domain"] == "in-domain"} == {"stories"}
    assert all(one["contaminated"] == one["verbatim"] == 0 for one in found.values())


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared: three corpora, 5 MB")
def test_domains_of_real_texts() -> None:
    splits = {
        f"{name} test": json_lines.read(SHARED / "data" / f"{name}/test.jsonl") for name in ("tinystories", "wikitext2")
    }
    splits["c4"] = json_lines.read(SHARED / "data" / "c4/train.jsonl")[:400]
    sources = {name: {"kind": "local", "path": name, "field": "text", "sha256": name} for name in (*splits, "train")}
    for name in ("tinystories", "wikitext2"):
        found = overlap.measure(SHARED / "data" / f"{name}/train.jsonl", splits, sources, PARAMS)["splits"]
        inside = {split for split, one in found.items() if one["domain"] == "in-domain"}
        assert inside == {f"{name} test"}
