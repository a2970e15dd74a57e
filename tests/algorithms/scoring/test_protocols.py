"""Perplexity protocols against the loops of the code that they are named after."""

from __future__ import annotations

import typing

import pytest

from tasks.algorithms.errors import InputError
from tasks.algorithms.scoring import protocols
from tasks.parameters import schema


def cut(name: str, tokens: list[int], length: int = 8, stride: int = 8, limit: int | None = None) -> list[list[int]]:
    """[text, start, stop, first] of each window."""
    return [list(w) for w in protocols.windows(protocols.protocol(name, length, stride), tokens, limit)]


def test_the_parameter_s_choices_are_the_protocols() -> None:
    assert typing.get_args(schema.Evaluate.model_fields["protocol"].annotation) == protocols.NAMES


@pytest.mark.parametrize("name", protocols.NAMES)
def test_every_name_is_known_and_begins_its_label(name: str) -> None:
    assert protocols.protocol(name, 16, 4).label.startswith(name)


def test_an_unknown_name_is_a_sentence() -> None:
    with pytest.raises(InputError, match="'wikitext' is unknown; known are joined, gptq-2048"):
        protocols.protocol("wikitext", 8, 8)


@pytest.mark.parametrize(("tokens", "length", "stride"), [(20, 5, 5), (23, 6, 2), (30, 8, 7), (30, 8, 1), (6, 6, 3)])
def test_joined_counts_each_token_of_whole_windows_once(tokens: int, length: int, stride: int) -> None:
    found = cut("joined", [tokens], length, stride)
    starts = [start for start in range(0, tokens, stride) if start + length <= tokens]
    assert [w[1] for w in found] == starts
    assert all(stop - start == length for _, start, stop, _ in found)
    counted = [token for _, _, stop, first in found for token in range(first, stop)]
    never = set(starts) if stride == length else {0}
    assert counted == [token for token in range(found[-1][2]) if token not in never]


def test_gptq_is_the_published_loop() -> None:
    tokens, seqlen = 5000, 2048
    samples = tokens // seqlen  # testenc.numel() // model.seqlen; loss over shifted labels, 2047 each
    expected = [[0, i * seqlen, (i + 1) * seqlen, i * seqlen + 1] for i in range(samples)]
    assert cut("gptq-2048", [tokens]) == expected
    assert protocols.protocol("gptq-2048", 8, 8).join == "\n\n"  # "\n\n".join(testdata["text"])


def test_thesis_trims_each_row() -> None:
    assert cut("thesis-512", [700, 1, 0, 2, 512]) == [[0, 0, 512, 1], [3, 0, 2, 1], [4, 0, 512, 1]]


@pytest.mark.parametrize(("tokens", "length", "stride"), [(23, 6, 2), (24, 6, 6), (25, 6, 6), (5, 6, 3), (17, 8, 3)])
def test_sliding_is_the_loop_of_transformers_guide(tokens: int, length: int, stride: int) -> None:
    expected, previous = [], 0
    for begin in range(0, tokens, stride):
        end = min(begin + length, tokens)
        target = end - previous  # labels before it are -100; the first label of all has no prediction
        if end - begin > 1:
            expected.append([0, begin, end, max(end - target, begin + 1)])
        previous = end
        if end == tokens:
            break
    assert cut("sliding", [tokens], length, stride) == expected


@pytest.mark.parametrize("tokens", [2, 8, 9, 16, 17, 30])
def test_rolling_predicts_every_token_after_the_prefix_once(tokens: int) -> None:
    found = cut("rolling", [tokens, 2], 8)  # of them one is the prefix
    assert found[-1] == [1, 0, 2, 1]
    assert all(stop - start <= 9 for _, start, stop, _ in found)  # 8 inputs: the last token is none
    own = [w for w in found if w[0] == 0]
    assert [token for _, _, stop, first in own for token in range(first, stop)] == list(range(1, tokens))
    assert all(stop - start == min(9, tokens) for _, start, stop, _ in own)  # the last one overlaps the one before


def test_a_limit_keeps_the_first_windows_and_shows_in_the_label() -> None:
    assert cut("rolling", [30], 8, 8, limit=2) == cut("rolling", [30], 8, 8)[:2]
    labels = {name: protocols.label(protocols.protocol(name, 16, 4), 60) for name in protocols.NAMES}
    assert labels == {
        "joined": "joined-16-4-nobos-fp32",
        "gptq-2048": "gptq-2048-first60",
        "thesis-512": "thesis-512-first60",
        "sliding": "sliding-16-4-first60",
        "rolling": "rolling-16-first60",
    }
    assert protocols.label(protocols.protocol("gptq-2048", 16, 4), None) == "gptq-2048"


@pytest.mark.parametrize(
    ("name", "length", "way_out"),
    [("gptq-2048", 8, "sliding or rolling"), ("thesis-512", 8, "sliding or rolling"), ("rolling", 257, "lower the")],
)
def test_a_window_above_the_context_is_a_sentence(name: str, length: int, way_out: str) -> None:
    own = protocols.protocol(name, length, 8)
    with pytest.raises(InputError, match=f"windows of {own.length} tokens, but the model's context is 256.*{way_out}"):
        protocols.check_context(own, 256)
    protocols.check_context(own, own.length)
    protocols.check_context(own, None)


def test_too_little_text_is_a_sentence() -> None:
    with pytest.raises(InputError, match="100 tokens, one window needs 2048: give a longer text or another protocol"):
        cut("gptq-2048", [100])
    with pytest.raises(InputError, match="none of 2 texts has two tokens"):
        cut("thesis-512", [1, 0])
