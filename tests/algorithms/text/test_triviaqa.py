"""TriviaQA's tiers on examples judged by hand, and the official normalisation's corners."""

from __future__ import annotations

import pytest

from tasks.algorithms.text import triviaqa

NORMALISED = {
    "The Beatles": "beatles",
    "  An   apple a day ": "apple day",
    "U.S.A.": "u s",  # the last letter is taken for an article, in the official evaluation too
    "rock_and_roll": "rock and roll",
    "Rock 'n' Roll!": "rock n roll",
    "l’Étoile": "l étoile",
    "Theatre": "theatre",  # articles are whole words
    "🙏": "🙏",
    "The": "",
    "": "",
}


@pytest.mark.parametrize("text", NORMALISED)
def test_normalisation(text: str) -> None:
    assert triviaqa.normalise(text) == NORMALISED[text]
    assert triviaqa.normalise(triviaqa.normalise(text)) == triviaqa.normalise(text)


JUDGED = [
    ("Tequila", ["tequila"], "exact"),
    ("The TEQUILA.", ["Rum", "Tequila"], "exact"),
    (" tequila, made of agave", ["Tequila"], "substring"),
    ("It is Sinclair Lewis of course", ["Sinclair Lewis"], "substring"),
    ("He was born in 1930", ["3"], "substring"),  # as the tier is defined: a short alias is easily found
    ("Lewis, Sinclair", ["Sinclair Lewis"], "words"),  # 2 of 2 words, in another order
    ("of Wales, the Prince: Charles", ["Charles, Prince of Wales"], "words"),  # 4 of 4
    ("one two x three four", ["one two three four five"], "words"),  # 4 of 5 words are 80 %
    ("one two x three", ["one two three four"], None),  # 3 of 4 are 75 %
    ("Lewis", ["Sinclair Lewis"], None),  # 1 of 2
    ("tequilla", ["Tequila"], None),
    ("", ["Tequila"], None),
    ("The.", ["Tequila"], None),  # says nothing
    ("anything", ["The", "!"], None),  # an alias of nothing is no part of it
    ("anything", [], None),
]


@pytest.mark.parametrize(("answer", "aliases", "expected"), JUDGED)
def test_the_strictest_tier_that_holds(answer: str, aliases: list[str], expected: str | None) -> None:
    assert triviaqa.tier(answer, aliases) == expected
    document = {"answer": "zzz", "aliases": aliases}
    found = triviaqa.process_results(document, [answer])
    assert found.pop("correct") == (expected is not None) == sum(found.values())
    assert found == {name: float(name == expected) for name in ("exact", "substring", "words")}


def test_the_gold_answer_counts_beside_its_aliases() -> None:
    assert triviaqa.process_results({"answer": "York", "aliases": ["Leeds"]}, ["york"])["exact"] == 1


def test_a_stricter_tier_of_one_alias_goes_before_a_laxer_one_of_another() -> None:
    assert triviaqa.tier("the red planet", ["planet", "red planet"]) == "exact"
    assert triviaqa.tier("planet mars red", ["red planet", "mars"]) == "substring"
