"""The data of the grammar, and its compiled form against answers worked out by hand."""

from __future__ import annotations

import random
from collections import Counter

from tasks.built_in_model import documents, frames, layouts
from tests.support.built_in_corpus import FOLDER, load


def test_the_data_has_the_promised_size_and_kinds():
    frames, domains = load("frames.yaml"), load("domains.yaml")
    counts = Counter(frame["kind"] for frame in frames)
    assert len(frames) >= 330 and len(domains) >= 12
    assert len({frame["id"] for frame in frames}) == len({frame["text"] for frame in frames}) == len(frames)
    assert set(counts) == {*documents.REQUIREMENT_KINDS, *documents.SUPPORT_KINDS, *documents.CLAUSE_KINDS}
    assert sum(counts[kind] for kind in documents.REQUIREMENT_KINDS) >= 200
    assert [
        counts[kind] >= least
        for kind, least in (("rationale", 40), ("acceptance", 40), ("definition", 20), ("scenario", 20))
    ] == [True] * 4


def test_the_data_files_are_ascii():
    for name in ("frames.yaml", "domains.yaml"):
        assert (FOLDER / name).read_bytes().isascii(), name


def test_every_frame_expands_in_every_domain():
    compiled = frames.compile_frames(load("frames.yaml"))
    for entry in load("domains.yaml"):
        domain = frames.compile_domain(entry)
        for members in compiled.by_kind.values():
            for frame in members:
                writer = documents.Writer(
                    random.Random(1), domain, compiled, layouts.LAYOUTS[0], {}, identifiers=["ABC-FUN-001"]
                )
                text = documents.expand(frame, {}, writer)
                assert "{" not in text and "  " not in text and " the the " not in text.lower(), text


def test_numbered_slots_differ_and_a_repeated_slot_is_one_draw():
    compiled = frames.compile_frames([])
    domain = frames.compile_domain(load("domains.yaml")[0])
    frame = frames.compile_text("{component1}|{component2}|{component3}|{component}|{latency}|{latency2}|{latency}")
    for seed in range(50):
        writer = documents.Writer(random.Random(seed), domain, compiled, layouts.LAYOUTS[0], {})
        one, two, three, again, fast, slow, fast_again = documents.expand(frame, {}, writer).split("|")
        assert len({one.lower(), two, three}) == 3 and again == one.lower() and fast == fast_again and fast != slow


def test_values_of_a_quantity_lie_on_its_grid():
    entry = {"name": "flow rate", "unit": "litres per hour", "low": 0.5, "high": 3, "step": 0.25}
    for seed in range(200):
        forms = frames.quantity_forms(entry, random.Random(seed))
        value = float(forms["value"].split()[0])
        assert 0.5 <= value <= 3 and (value * 4) == int(value * 4)
        assert forms["range"] == "between 0.50 and 3.00 litres per hour" and forms["step"] == "0.25 litres per hour"
    assert frames.with_unit("1", "degrees Celsius") == "1 degree Celsius"
