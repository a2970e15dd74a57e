"""Perplexity protocols: how documents become windows, and which of their tokens are predicted.

One model has many published perplexities, because a perplexity is a property of a model, a text and a protocol. So the
protocol has a name, and the name stands beside the number:

| name | documents | windows |
|---|---|---|
| `joined-<length>-<stride>-nobos-fp32` | joined by a newline | whole ones of `length`, every `stride` tokens |
| `gptq-2048` | joined by a blank line | whole ones of 2048, side by side |
| `thesis-512` | each alone, trimmed to 512 tokens | one each; padding never counts |
| `sliding-<length>-<stride>` | joined by a blank line | of `length`, every `stride`, and what is left at the end |
| `rolling-<length>` | each alone, after one bos (or eos) token | `length` inputs, side by side; the last overlaps |

No token counts twice; a window's first token is never predicted (with `rolling` that is the bos token). `gptq-2048` is
that of the GPTQ code (Frantar et al., arXiv 2210.17323) without the bos token that its tokenizer adds; `sliding` is of
transformers' guide "Perplexity of fixed-length models"; `rolling` is lm-evaluation-harness's `loglikelihood_rolling`.
All but `rolling` add no special token. A mean is one over predictions, not over windows or documents. Where at most the
first windows are measured, the name ends in `-first<windows>`; not so `joined`, this project's own, which always did.

A window never exceeds a model's context: nothing is cut silently, it is refused (`check_context`). The definitions need
no torch; `tasks.algorithms.scoring.likelihood` computes. They say nothing about units: bits per byte is computed beside
each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tasks.algorithms.errors import InputError

NAMES = ("joined", "gptq-2048", "thesis-512", "sliding", "rolling")


@dataclass(frozen=True)
class Protocol:
    """How texts are cut.

    Attributes:
        label: what is printed beside a number.
        join: between documents; None: each is a text of its own.
        length: tokens that the model sees at once, at most.
        stride: tokens from one window's start to the next one's; None: a text has one window.
        prefix: whether a text begins with the tokenizer's bos (or eos) token, so that its first token is predicted.
        partial: whether a window may be shorter than `length`.
        fixed: whether `length` is part of the protocol's definition, and no parameter.
    """

    label: str
    join: str | None
    length: int
    stride: int | None
    prefix: bool = False
    partial: bool = True
    fixed: bool = False


class Window(NamedTuple):
    """Tokens [start, stop) of text `text`; those from `first` on are predicted and count."""

    text: int
    start: int
    stop: int
    first: int


def protocol(name: str, length: int, stride: int) -> Protocol:
    """The protocol of this name (`NAMES`).

    Args:
        length: tokens per window; no effect on `gptq-2048` and `thesis-512`.
        stride: tokens between starts, of `joined` and `sliding`.

    Raises:
        InputError: no such protocol.
    """
    known = {
        "joined": Protocol(f"joined-{length}-{stride}-nobos-fp32", "\n", length, stride, partial=False),
        "gptq-2048": Protocol("gptq-2048", "\n\n", 2048, 2048, partial=False, fixed=True),
        "thesis-512": Protocol("thesis-512", None, 512, None, fixed=True),
        "sliding": Protocol(f"sliding-{length}-{stride}", "\n\n", length, stride),
        "rolling": Protocol(f"rolling-{length}", None, length, length, prefix=True),
    }
    if name not in known:
        raise InputError(f"protocol {name!r} is unknown; known are {', '.join(NAMES)}")
    return known[name]


def too_long(own: Protocol, context: int | None) -> str | None:
    """One sentence where the windows exceed the model's context (tokens; None: unlimited), else None."""
    if context is None or own.length <= context:
        return None
    way_out = "take protocol sliding or rolling with a smaller length" if own.fixed else "lower the length"
    return (
        f"protocol {own.label} has windows of {own.length} tokens, but the model's context is {context}"
        f" (max_position_embeddings); {way_out}"
    )


def check_context(own: Protocol, context: int | None) -> None:
    """Refuse windows that exceed the model's context.

    Raises:
        InputError: they do.
    """
    if sentence := too_long(own, context):
        raise InputError(sentence)


def texts(own: Protocol, documents: Sequence[str]) -> list[str]:
    """What is tokenised, each on its own."""
    return list(documents) if own.join is None else [own.join.join(documents)]


def windows(own: Protocol, tokens: Sequence[int], limit: int | None = None) -> list[Window]:
    """The windows of all texts, in order.

    Args:
        tokens: length of each text, the prefix token included.
        limit: at most so many windows.

    Raises:
        InputError: there is none.
    """
    found = [window for text, length in enumerate(tokens) for window in _cut(own, text, length)]
    if not found and not own.partial:
        raise InputError(
            f"the text has {sum(tokens)} tokens, one window needs {own.length}: give a longer text or "
            + ("another protocol" if own.fixed else "a smaller length")
        )
    if not found:
        raise InputError(f"none of {len(tokens)} texts has two tokens, so nothing can be predicted; give longer ones")
    return found[:limit]


def label(own: Protocol, limit: int | None) -> str:
    """The protocol's label, which says so where at most the first `limit` windows are measured."""
    return own.label if limit is None or own.label.startswith("joined") else f"{own.label}-first{limit}"


def _cut(own: Protocol, text: int, tokens: int) -> list[Window]:
    width = own.length + own.prefix  # with a prefix, the last token of a window is predicted but no input
    starts = [0] if own.stride is None else range(0, tokens, own.stride)
    found, seen = [], 0
    for start in starts:
        stop = min(start + width, tokens)
        if own.prefix:
            start = max(stop - width, 0)  # the last window is as long as the others
        first = max(seen, start + 1)  # a window's first token is never predicted, and no token counts twice
        if stop <= first or (stop - start < width and not own.partial):
            break
        found.append(Window(text, start, stop, first))
        seen = stop
    return found
