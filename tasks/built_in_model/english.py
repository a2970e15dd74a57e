"""English inflection: articles, plurals and verb forms of the vocabulary in data/grammar, not of all English."""

from __future__ import annotations

import re

from tasks.built_in_model.irregular_words import (
    A_PREFIXES,
    AN_LETTERS,
    AN_WORDS,
    DOUBLING,
    LY_VERBS,
    NOT_DOUBLING,
    PARTICIPLES,
    PHRASE_PLURALS,
    PLURALS,
    POSTMODIFIERS,
    SPOKEN_ACRONYMS,
    UN_NEGATIVE,
)


def indefinite(phrase: str) -> str:
    """Return `phrase` with the indefinite article its first sound asks for."""
    word = re.split(r"[\s/-]", phrase, maxsplit=1)[0]
    return ("an " if _sounds_like_a_vowel(word) else "a ") + phrase


def _sounds_like_a_vowel(word: str) -> bool:
    lower = word.lower()
    if len(word) > 1 and word[:2].isupper() and not word.startswith(SPOKEN_ACRONYMS):
        return word[0] in AN_LETTERS
    if word[0].isdigit():
        return word[0] == "8" or word in ("11", "18")
    if len(word) == 1:
        return word.upper() in AN_LETTERS
    if lower.startswith(AN_WORDS) or lower.startswith(UN_NEGATIVE):
        return True
    if lower.startswith(A_PREFIXES):
        return False
    return lower[0] in "aeiou"


def plural(phrase: str) -> str:
    """Return the plural of a noun phrase, inflecting the noun before the first preposition."""
    if phrase in PHRASE_PLURALS:
        return PHRASE_PLURALS[phrase]
    cuts = [position for position in (phrase.find(mark) for mark in POSTMODIFIERS) if position > 0]
    head = phrase[: min(cuts)] if cuts else phrase
    tail = phrase[len(head) :]
    start = max(head.rfind(" "), head.rfind("-")) + 1
    return head[:start] + _plural_word(head[start:]) + tail


def _plural_word(word: str) -> str:
    if word.lower() in PLURALS:
        return PLURALS[word.lower()]
    if word.isupper() or word[-1:].isdigit():
        return word + "s"
    if word.endswith("man") and len(word) > 3:
        return word[:-3] + "men"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    if re.search(r"(s|x|z|[^r]ch|rch|sh)$", word):
        return word + "es"
    return word + "s"


def _verb_parts(verb: str) -> tuple[str, str, str]:
    """Split "automatically shut down" into the adverb, the word that is inflected and the particle."""
    words = verb.split(" ")
    first = 1 if len(words) > 1 and words[0].endswith("ly") and words[0] not in LY_VERBS else 0
    before, after = " ".join(words[:first]), " ".join(words[first + 1 :])
    return before + " " if before else "", words[first], " " + after if after else ""


def _stem(word: str, vowel_suffix: str) -> str:
    """Return the stem to which -ing or -ed is added."""
    if "-" in word:
        head, _, last = word.rpartition("-")
        return f"{head}-{_stem(last, vowel_suffix)}"
    if word in DOUBLING or (word not in NOT_DOUBLING and re.fullmatch(r"[^aeiou]*[aeiou][bdfglmnprt]", word)):
        return word + word[-1]
    if re.fullmatch(r"squ[aeiou][bdglmnprt]", word):
        return word + word[-1]
    if vowel_suffix == "ing":
        if word.endswith("ie"):
            return word[:-2] + "y"
        return word[:-1] if word.endswith("e") and not word.endswith(("ee", "oe", "ye")) else word
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "i"
    return word[:-1] if word.endswith("e") else word


def gerund(verb: str) -> str:
    """Return the -ing form of a verb, which may have an adverb before it and a particle after it."""
    before, word, after = _verb_parts(verb)
    return f"{before}{_stem(word, 'ing')}ing{after}"


def participle(verb: str) -> str:
    """Return the past participle of a verb, which may have an adverb before it and a particle after it."""
    before, word, after = _verb_parts(verb)
    irregular = PARTICIPLES.get(word.rpartition("-")[2])
    if irregular:
        return f"{before}{word[: len(word) - len(word.rpartition('-')[2])]}{irregular}{after}"
    return f"{before}{_stem(word, 'ed')}ed{after}"


def third_person(verb: str) -> str:
    """Return the third person singular of a verb."""
    before, word, after = _verb_parts(verb)
    if re.search(r"[^aeiou]y$", word):
        word = word[:-1] + "ies"
    elif re.search(r"(s|x|z|ch|sh|[^aeiou]o)$", word):
        word += "es"
    else:
        word += "s"
    return f"{before}{word}{after}"


def capital(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]
