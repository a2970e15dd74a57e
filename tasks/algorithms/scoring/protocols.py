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
    """A rule by which texts are cut into windows.

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
    """The tokens [start, stop) of text `text`; those from `first` on are predicted and count."""

    text: int
    start: int
    stop: int
    first: int


def protocol(name: str, length: int, stride: int) -> Protocol:
    """Return the protocol of this name (`NAMES`).

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


def too_long(protocol: Protocol, context: int | None) -> str | None:
    """Return a sentence where the windows exceed the model's context (tokens; None: unlimited), else None."""
    if context is None or protocol.length <= context:
        return None
    way_out = "take protocol sliding or rolling with a smaller length" if protocol.fixed else "lower the length"
    return (
        f"protocol {protocol.label} has windows of {protocol.length} tokens, but the model's context is {context}"
        f" (max_position_embeddings); {way_out}"
    )


def check_context(protocol: Protocol, context: int | None) -> None:
    """Refuse windows that exceed the model's context.

    Raises:
        InputError: they do.
    """
    if sentence := too_long(protocol, context):
        raise InputError(sentence)


def windows(protocol: Protocol, tokens: Sequence[int], limit: int | None = None) -> list[Window]:
    """Cut all texts into windows, in order.

    Args:
        tokens: length of each text, the prefix token included.
        limit: at most so many windows.

    Raises:
        InputError: there is none.
    """
    cut = [window for text, length in enumerate(tokens) for window in _cut(protocol, text, length)]
    if not cut and not protocol.partial:
        raise InputError(
            f"the text has {sum(tokens)} tokens, one window needs {protocol.length}: give a longer text or "
            + ("another protocol" if protocol.fixed else "a smaller length")
        )
    if not cut:
        raise InputError(f"none of {len(tokens)} texts has two tokens, so nothing can be predicted; give longer ones")
    return cut[:limit]


def label(protocol: Protocol, limit: int | None) -> str:
    """Return the protocol's label, which says so where at most the first `limit` windows are measured."""
    return protocol.label if limit is None or protocol.label.startswith("joined") else f"{protocol.label}-first{limit}"


def _cut(protocol: Protocol, text: int, tokens: int) -> list[Window]:
    width = protocol.length + protocol.prefix  # with a prefix, the last token of a window is predicted but no input
    starts = [0] if protocol.stride is None else range(0, tokens, protocol.stride)
    cut, seen = [], 0  # `seen`: the tokens before it are predicted already
    for start in starts:
        stop = min(start + width, tokens)
        if protocol.prefix:
            start = max(stop - width, 0)  # the last window is as long as the others
        first = max(seen, start + 1)  # a window's first token is never predicted, and no token counts twice
        if stop <= first or (stop - start < width and not protocol.partial):
            break
        cut.append(Window(text, start, stop, first))
        seen = stop
    return cut
