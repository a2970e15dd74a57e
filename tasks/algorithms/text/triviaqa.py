"""Judge answers to TriviaQA's questions in three tiers: exact, substring, words.

The paper (Joshi et al., arXiv 1705.03551) counts an answer as right where it equals an alias after normalisation. A
small model that wasn't trained on the format says more than the alias, so two laxer tiers follow: an alias is part of
the answer, or at least four fifths of an alias's words are in it. Each answer has the strictest tier that holds, so the
tiers' shares add up to the share of right answers. A short alias is easily part of a long answer ("3" of "1930"):
that's why each tier is reported. It asks no model and knows no file.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

TIERS = ("exact", "substring", "words")
"""The tiers go from the strictest to the laxest."""
SHARE = 0.8
"""At least this share of an alias's words has to be in the answer."""
PUNCTUATION = str.maketrans({sign: " " for sign in string.punctuation + "‘’´`"})  # the underscore is among them
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """Normalise as the official evaluation does: lower case, no punctuation, no articles, single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def tier(answer: str, aliases: Sequence[str]) -> str | None:
    """Return the strictest of `TIERS` in which the answer matches an alias; None: it is wrong.

    An alias or answer that normalises to nothing matches nothing.
    """
    said = normalise(answer)
    known = [alias for alias in dict.fromkeys(map(normalise, aliases)) if alias]
    if not said:
        return None
    if said in known:
        return "exact"
    if any(alias in said for alias in known):
        return "substring"
    words = set(said.split())
    if any(_share(alias.split(), words) >= SHARE for alias in known):
        return "words"
    return None


def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer as lm_eval's `process_results`: 1 for the tier that it has and for `correct`, else 0.

    Args:
        document: the question's, with `answer` and `aliases`.
        results: the one answer.
    """
    reached = tier(results[0], [document["answer"], *document["aliases"]])
    return {name: float(name == reached) for name in TIERS} | {"correct": float(reached is not None)}


def _share(alias: Sequence[str], words: set[str]) -> float:
    return sum(word in words for word in alias) / len(alias)
