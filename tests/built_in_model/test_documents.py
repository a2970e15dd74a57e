"""Whole documents: what every one of them holds, and that the seed alone decides."""

from __future__ import annotations

import re

import pytest

from tasks.built_in_model import documents, splits
from tests.support.built_in_corpus import parts, sample


def test_same_seed_same_text_and_other_seed_other_text():
    def first(seed):
        return [item["text"] for item in documents.documents(parts()["train"], 20_000, seed)]

    assert first(5) == first(5) != first(6)


def test_documents_stop_soon_after_the_requested_size():
    texts = [item["text"] for item in documents.documents(parts()["test"], 30_000, 1)]
    sizes = [len(text.encode("utf-8")) for text in texts]
    assert sum(sizes) >= 30_000 > sum(sizes[:-1])


@pytest.mark.parametrize("name", splits.SPLIT_NAMES)
def test_documents_are_complete_ascii_and_of_plausible_length(name):
    for text in sample(name):
        assert text.isascii() and not re.search(r"[{}]", text)
        assert 200 <= len(text.split()) <= 950
        assert not re.search(r"\b[Aa] [aeio]\w+|\bthe the\b|\.\.| ,|\ba a\b", text.replace("a one", "")), text


@pytest.mark.parametrize("name", splits.SPLIT_NAMES)
def test_identifiers_increase_and_traces_point_backwards(name):
    for text in sample(name, 60):
        seen: dict[str, int] = {}
        declared: set[str] = set()
        for line in text.splitlines():
            found = re.findall(r"[A-Z]{3}-[A-Z]{3}-\d{3}", line)
            starts = re.match(r"(?:\*\*|\[|ID: )?([A-Z]{3}-[A-Z]{3}-\d{3})", line)
            if starts:
                kind, number = starts.group(1).rsplit("-", 1)
                assert int(number) > seen.get(kind, 0)
                seen[kind] = int(number)
                declared.add(starts.group(1))
            else:
                assert set(found) <= declared, text
        assert len(declared) >= 3
