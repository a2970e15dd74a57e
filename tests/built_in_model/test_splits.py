"""What train, calibration and test share of the grammar: no frame, and no sentence of a shared domain."""

from __future__ import annotations

import re

import pytest

from tasks.built_in_model import splits
from tests.support.built_in_corpus import load, parts, sample


def test_no_frame_is_in_two_splits_and_all_are_used():
    ids = {name: {frame["id"] for frame in part.frames} for name, part in parts().items()}
    total = len(load("frames.yaml"))
    assert sum(map(len, ids.values())) == len(set.union(*ids.values())) == total
    assert 0.74 <= len(ids["train"]) / total <= 0.84
    assert 0.06 <= len(ids["calibration"]) / total <= 0.10 and 0.10 <= len(ids["test"]) / total <= 0.15
    for part in parts().values():
        assert {frame["kind"] for frame in part.frames} == {frame["kind"] for frame in load("frames.yaml")}


def test_demonstration_frames_are_in_training_only():
    for seed in range(5):
        drawn = splits.split(load("domains.yaml"), load("frames.yaml"), seed)
        for opening in (
            "The software must be able to",
            "User authentication must include",
            "The system must provide real-time",
        ):
            assert sum(frame["text"].startswith(opening) for frame in drawn["train"].frames) >= 4
            assert not any(
                frame["text"].startswith(opening) for name in ("calibration", "test") for frame in drawn[name].frames
            )


def test_held_out_domains_are_absent_from_training():
    codes = {name: {domain["code"] for domain in part.domains} for name, part in parts().items()}
    assert len(codes["train"]) == len(load("domains.yaml")) - 4
    train_text = "\n".join(sample("train"))
    for name in ("calibration", "test"):
        held = codes[name] - codes["train"]
        assert len(held) == 2 and len(codes[name] & codes["train"]) == 2
        for domain in parts()[name].domains:
            if domain["code"] in held:
                assert domain["code"] + "-" not in train_text
                own = set(domain["components"]) - {
                    part for other in parts()["train"].domains for part in other["components"]
                }
                assert len(own) >= 8 and not any(re.search(rf"\b{re.escape(part)}\b", train_text) for part in own)
                assert any(part in "\n".join(sample(name)) for part in own)
    assert not (codes["calibration"] & codes["test"])


def test_sentences_of_shared_domains_are_divided():
    train = {domain["code"]: domain for domain in parts()["train"].domains}
    whole = {domain["code"]: domain for domain in load("domains.yaml")}
    for name in ("calibration", "test"):
        for domain in parts()[name].domains:
            if domain["code"] in train:
                for key in ("rationale", "verification", "narrative"):
                    here, there = set(domain[key]), set(train[domain["code"]][key])
                    assert here and there and not here & there and here | there == set(whole[domain["code"]][key])


def test_split_depends_on_the_seed_only():
    first = splits.split(load("domains.yaml"), load("frames.yaml"), 1)
    reordered = splits.split(load("domains.yaml")[::-1], load("frames.yaml")[::-1], 1)
    assert first == reordered
    assert first != splits.split(load("domains.yaml"), load("frames.yaml"), 2)


def test_too_few_domains_are_refused():
    with pytest.raises(ValueError, match="at least 8 domains"):
        splits.split(load("domains.yaml")[:7], load("frames.yaml"), 1)
