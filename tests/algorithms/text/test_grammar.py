"""Tests of the corpus grammar against answers worked out by hand and against the properties of the split."""

from __future__ import annotations

import functools
import random
import re
from collections import Counter

import pytest
import yaml

from tasks.algorithms.text import grammar
from tests.support.paths import ROOT

GRAMMAR_FOLDER = ROOT / "data" / "grammar"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@functools.cache
def load(name: str):
    return yaml.load((GRAMMAR_FOLDER / name).read_text(encoding="utf-8"), LOADER)


@functools.cache
def splits():
    return grammar.split(load("domains.yaml"), load("frames.yaml"), 7)


@functools.cache
def sample(name: str, count: int = 200) -> tuple[str, ...]:
    stream = grammar.documents(splits()[name], 10**9, 3)
    return tuple(next(stream)["text"] for _ in range(count))


@pytest.mark.parametrize(
    "phrase, expected",
    [
        ("pump", "a pump"),
        ("infusion pump", "an infusion pump"),
        ("hour meter", "an hour meter"),
        ("unit", "a unit"),
        ("user account", "a user account"),
        ("unexpected restart", "an unexpected restart"),
        ("unidentified caller", "an unidentified caller"),
        ("ultrasonic probe", "an ultrasonic probe"),
        ("ECG lead", "an ECG lead"),
        ("PLC", "a PLC"),
        ("RAM module", "a RAM module"),
        ("UPS", "a UPS"),
        ("one-time code", "a one-time code"),
        ("8-bit port", "an 8-bit port"),
        ("X-ray tube", "an X-ray tube"),
        ("LED", "an LED"),
        ("uplink", "an uplink"),
        ("euro payment", "a euro payment"),
        ("order line", "an order line"),
    ],
)
def test_indefinite_article(phrase, expected):
    assert grammar.indefinite(phrase) == expected


@pytest.mark.parametrize(
    "phrase, expected",
    [
        ("valve", "valves"),
        ("drug library entry", "drug library entries"),
        ("relay", "relays"),
        ("track switch", "track switches"),
        ("gear box", "gear boxes"),
        ("blood analysis", "blood analyses"),
        ("foreman", "foremen"),
        ("member of the public", "members of the public"),
        ("PLC", "PLCs"),
        ("rate of change", "rates of change"),
        ("signal passed at danger", "signals passed at danger"),
        ("field bus", "field buses"),
        ("status", "statuses"),
        ("stock-out", "stock-outs"),
        ("person", "people"),
        ("acceptance criterion", "acceptance criteria"),
        ("top of descent crossing", "top of descent crossings"),
    ],
)
def test_plural(phrase, expected):
    assert grammar.plural(phrase) == expected


@pytest.mark.parametrize(
    "verb, ing, past, third",
    [
        ("start", "starting", "started", "starts"),
        ("stop", "stopping", "stopped", "stops"),
        ("close", "closing", "closed", "closes"),
        ("transmit", "transmitting", "transmitted", "transmits"),
        ("cancel", "cancelling", "cancelled", "cancels"),
        ("open", "opening", "opened", "opens"),
        ("verify", "verifying", "verified", "verifies"),
        ("display", "displaying", "displayed", "displays"),
        ("shut down", "shutting down", "shut down", "shuts down"),
        ("override", "overriding", "overridden", "overrides"),
        ("free", "freeing", "freed", "frees"),
        ("tie", "tying", "tied", "ties"),
        ("scan", "scanning", "scanned", "scans"),
        ("dispatch", "dispatching", "dispatched", "dispatches"),
        ("withdraw", "withdrawing", "withdrawn", "withdraws"),
        ("slowly lower", "slowly lowering", "slowly lowered", "slowly lowers"),
        ("apply", "applying", "applied", "applies"),
        ("load", "loading", "loaded", "loads"),
        ("fix", "fixing", "fixed", "fixes"),
        ("enrol", "enrolling", "enrolled", "enrols"),
    ],
)
def test_verb_forms(verb, ing, past, third):
    assert (grammar.gerund(verb), grammar.participle(verb), grammar.third_person(verb)) == (ing, past, third)


def test_the_data_has_the_promised_size_and_kinds():
    frames, domains = load("frames.yaml"), load("domains.yaml")
    counts = Counter(frame["kind"] for frame in frames)
    assert len(frames) >= 330 and len(domains) >= 12
    assert len({frame["id"] for frame in frames}) == len({frame["text"] for frame in frames}) == len(frames)
    assert set(counts) == {*grammar.REQUIREMENT_KINDS, *grammar.SUPPORT_KINDS, *grammar.CLAUSE_KINDS}
    assert sum(counts[kind] for kind in grammar.REQUIREMENT_KINDS) >= 200
    assert [
        counts[kind] >= least
        for kind, least in (("rationale", 40), ("acceptance", 40), ("definition", 20), ("scenario", 20))
    ] == [True] * 4


def test_the_data_files_are_ascii():
    for name in ("frames.yaml", "domains.yaml"):
        assert (GRAMMAR_FOLDER / name).read_bytes().isascii(), name


def test_every_frame_expands_in_every_domain():
    frames = grammar.compile_frames(load("frames.yaml"))
    for entry in load("domains.yaml"):
        domain = grammar.compile_domain(entry)
        for members in frames.by_kind.values():
            for frame in members:
                writer = grammar._Writer(
                    random.Random(1), domain, frames, grammar._LAYOUTS[0], {}, identifiers=["ABC-FUN-001"]
                )
                text = grammar.expand(frame, {}, writer)
                assert "{" not in text and "  " not in text and " the the " not in text.lower(), text


def test_numbered_slots_differ_and_a_repeated_slot_is_one_draw():
    frames = grammar.compile_frames([])
    domain = grammar.compile_domain(load("domains.yaml")[0])
    frame = grammar.compile_text("{component1}|{component2}|{component3}|{component}|{latency}|{latency2}|{latency}")
    for seed in range(50):
        writer = grammar._Writer(random.Random(seed), domain, frames, grammar._LAYOUTS[0], {})
        one, two, three, again, fast, slow, fast_again = grammar.expand(frame, {}, writer).split("|")
        assert len({one.lower(), two, three}) == 3 and again == one.lower() and fast == fast_again and fast != slow


def test_values_of_a_quantity_lie_on_its_grid():
    entry = {"name": "flow rate", "unit": "litres per hour", "low": 0.5, "high": 3, "step": 0.25}
    for seed in range(200):
        forms = grammar._quantity_forms(entry, random.Random(seed))
        value = float(forms["value"].split()[0])
        assert 0.5 <= value <= 3 and (value * 4) == int(value * 4)
        assert forms["range"] == "between 0.50 and 3.00 litres per hour" and forms["step"] == "0.25 litres per hour"
    assert grammar._with_unit("1", "degrees Celsius") == "1 degree Celsius"


def test_same_seed_same_text_and_other_seed_other_text():
    def first(seed):
        return [item["text"] for item in grammar.documents(splits()["train"], 20_000, seed)]

    assert first(5) == first(5) != first(6)


def test_documents_stop_soon_after_the_requested_size():
    texts = [item["text"] for item in grammar.documents(splits()["test"], 30_000, 1)]
    sizes = [len(text.encode("utf-8")) for text in texts]
    assert sum(sizes) >= 30_000 > sum(sizes[:-1])


@pytest.mark.parametrize("name", grammar.SPLIT_NAMES)
def test_documents_are_complete_ascii_and_of_plausible_length(name):
    for text in sample(name):
        assert text.isascii() and not re.search(r"[{}]", text)
        assert 200 <= len(text.split()) <= 950
        assert not re.search(r"\b[Aa] [aeio]\w+|\bthe the\b|\.\.| ,|\ba a\b", text.replace("a one", "")), text


@pytest.mark.parametrize("name", grammar.SPLIT_NAMES)
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


def test_no_frame_is_in_two_splits_and_all_are_used():
    ids = {name: {frame["id"] for frame in part.frames} for name, part in splits().items()}
    total = len(load("frames.yaml"))
    assert sum(map(len, ids.values())) == len(set.union(*ids.values())) == total
    assert 0.74 <= len(ids["train"]) / total <= 0.84
    assert 0.06 <= len(ids["calibration"]) / total <= 0.10 and 0.10 <= len(ids["test"]) / total <= 0.15
    for part in splits().values():
        assert {frame["kind"] for frame in part.frames} == {frame["kind"] for frame in load("frames.yaml")}


def test_demonstration_frames_are_in_training_only():
    for seed in range(5):
        parts = grammar.split(load("domains.yaml"), load("frames.yaml"), seed)
        for opening in (
            "The software must be able to",
            "User authentication must include",
            "The system must provide real-time",
        ):
            assert sum(frame["text"].startswith(opening) for frame in parts["train"].frames) >= 4
            assert not any(
                frame["text"].startswith(opening) for name in ("calibration", "test") for frame in parts[name].frames
            )


def test_held_out_domains_are_absent_from_training():
    codes = {name: {domain["code"] for domain in part.domains} for name, part in splits().items()}
    assert len(codes["train"]) == len(load("domains.yaml")) - 4
    train_text = "\n".join(sample("train"))
    for name in ("calibration", "test"):
        held = codes[name] - codes["train"]
        assert len(held) == 2 and len(codes[name] & codes["train"]) == 2
        for domain in splits()[name].domains:
            if domain["code"] in held:
                assert domain["code"] + "-" not in train_text
                own = set(domain["components"]) - {
                    part for other in splits()["train"].domains for part in other["components"]
                }
                assert len(own) >= 8 and not any(re.search(rf"\b{re.escape(part)}\b", train_text) for part in own)
                assert any(part in "\n".join(sample(name)) for part in own)
    assert not (codes["calibration"] & codes["test"])


def test_sentences_of_shared_domains_are_divided():
    parts = splits()
    train = {domain["code"]: domain for domain in parts["train"].domains}
    whole = {domain["code"]: domain for domain in load("domains.yaml")}
    for name in ("calibration", "test"):
        for domain in parts[name].domains:
            if domain["code"] in train:
                for key in ("rationale", "verification", "narrative"):
                    here, there = set(domain[key]), set(train[domain["code"]][key])
                    assert here and there and not here & there and here | there == set(whole[domain["code"]][key])


def test_split_depends_on_the_seed_only():
    first = grammar.split(load("domains.yaml"), load("frames.yaml"), 1)
    reordered = grammar.split(load("domains.yaml")[::-1], load("frames.yaml")[::-1], 1)
    assert first == reordered
    assert first != grammar.split(load("domains.yaml"), load("frames.yaml"), 2)


def test_too_few_domains_are_refused():
    with pytest.raises(ValueError, match="at least 8 domains"):
        grammar.split(load("domains.yaml")[:7], load("frames.yaml"), 1)
