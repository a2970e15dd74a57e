"""Count what goes wrong when a compressed model writes: it repeats itself, says nothing, leaves ASCII, finds no end.

Perplexity hardly shows these, a reader sees them at once. Of each greedy continuation:

| figure | definition |
|---|---|
| `seq_rep_4` | 1 - distinct runs of four tokens / runs of four tokens (Welleck et al., arXiv 1908.04319) |
| `loop` | ends in a block of two tokens or more, three times running or more (Holtzman et al., arXiv 1904.09751) |
| `empty` | nothing but white space |
| `non_ascii` | characters beyond ASCII |
| `ended` | an end token came before the limit |

A loop is counted, `seq_rep_4` is a mean: lists and set phrases repeat without harm. A text that never ends may be cut
off by a small limit only, and characters beyond ASCII are right in many languages: both say something beside the dense
model's count, and nothing alone. It judges no meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RUN = 4
"""seq-rep is taken over runs of so many tokens."""
TIMES = 3
"""So many equal blocks, one after the other, make a loop."""
SHORTEST = 2
"""A block has at least so many tokens; one token counts as a block of two when it comes six times."""


def describe(tokens: Sequence[int], text: str, ends: Sequence[int]) -> dict[str, Any]:
    """Return the figures of one continuation.

    Args:
        tokens: new ones, with the end token if there was one.
        text: as decoded, without special tokens.
        ends: the model's end tokens; without any, none is ever ended.
    """
    ended = bool(tokens) and tokens[-1] in ends
    written = list(tokens[: len(tokens) - ended])
    return {
        "tokens": len(written),
        "ended": ended,
        "empty": not text.strip(),
        "loop": loops(written),
        "seq_rep_4": repetition(written),
        "non_ascii": sum(not character.isascii() for character in text),
    }


def repetition(tokens: Sequence[int]) -> float:
    """Return seq-rep-4 of the tokens; it is 0 for fewer than four."""
    runs = [tuple(tokens[start : start + RUN]) for start in range(len(tokens) - RUN + 1)]
    # seq-rep-n of Welleck et al.: 1 - |unique n-grams| / |n-grams|
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def loops(tokens: Sequence[int]) -> bool:
    """Tell whether the tokens end in the same block, at least three times running."""
    written = list(tokens)
    return any(
        written[-TIMES * size :] == written[-size:] * TIMES for size in range(SHORTEST, len(written) // TIMES + 1)
    )


def count(completions: Sequence[Mapping[str, Any]]) -> dict[str, int | float | None]:
    """Sum up all continuations of a model, each as `describe` has it, with its text as `completion`.

    Returns:
        completions, loops, empty, never_ending: how many; seq_rep_4: the mean; non_ascii_share: of all characters. The
        last two are None without continuations or characters.
    """
    characters = sum(len(row["completion"]) for row in completions)
    return {
        "completions": len(completions),
        "loops": sum(row["loop"] for row in completions),
        "empty": sum(row["empty"] for row in completions),
        "never_ending": sum(not row["ended"] for row in completions),
        "seq_rep_4": sum(row["seq_rep_4"] for row in completions) / len(completions) if completions else None,
        "non_ascii_share": sum(row["non_ascii"] for row in completions) / characters if characters else None,
    }
