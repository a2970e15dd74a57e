"""Perplexity under one pinned protocol, so that a number means the same wherever it is printed.

Protocol `joined-<length>-<stride>-nobos-fp32`: the documents of a split are joined by one newline, the whole is
tokenised once without special tokens (no bos, no eos), and windows of `length` tokens start every `stride` tokens; an
incomplete last window is dropped. A window's first token is never predicted: each window has length - 1 predictions.
With stride < length, a later window counts its last `stride` predictions only, so that no token counts twice.
Log-probabilities are taken in float32 whatever the model computes in, and averaged in float64 over all predictions.

It does not weigh by bytes or words: perplexities of models with different tokenizers can't be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import head
from tasks.algorithms.model.device import beside
from tasks.algorithms.scoring import token_stream

JOIN = "\n"


def protocol(length: int, stride: int) -> str:
    """Return the protocol's name, to be printed beside each number."""
    return f"joined-{length}-{stride}-nobos-fp32"


def tokenise(tokenizer: Any, documents: Iterable[str]) -> Tensor:
    """Tokenise the joined documents, without special tokens, to int32 [tokens]: 4 bytes of memory for each.

    The documents are held a window at a time; a tokenizer that gives no offsets needs the text as a whole.
    """
    if not tokenizer.is_fast:
        ids = tokenizer(JOIN.join(documents), add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int32)

    def encode(text: str) -> token_stream.Piece:
        encoded = tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]
        offsets = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)
        return token_stream.Piece(np.array(encoded.ids, dtype=np.int32), offsets)

    return torch.from_numpy(np.concatenate([part.ids for part in token_stream.pieces(encode, documents, JOIN)]))


def windows(tokens: Tensor, length: int, stride: int, max_windows: int | None = None) -> Tensor:
    """Cut tokens [tokens] into int64 windows [windows, length]: the first `max_windows`, or all.

    Raises:
        InputError: the text is shorter than one window.
    """
    if len(tokens) < length:
        raise InputError(
            f"the text has {len(tokens)} tokens, one window needs {length}: give a longer text or a smaller length"
        )
    return tokens.unfold(0, length, stride)[:max_windows].long().contiguous()


def token_nll(model: nn.Module, input_ids: Tensor, batch: int = 1) -> Tensor:
    """Return the negative log-likelihood (nats) of each predicted token.

    Args:
        model: as for `tasks.algorithms.model.head.states`.
        input_ids: [windows, length].
        batch: windows per forward pass; no effect on the result beyond rounding.

    Returns:
        float64 [windows, length - 1].
    """
    losses = []
    for ids in beside(model, input_ids).long().split(batch):
        # -log p(x_t | x_<t): the logits at t - 1 predict the token at t, those of the last one nothing that is known
        losses.append(head.nats(model, ids, ids.roll(-1, dims=1))[:, :-1].double().cpu())
    return torch.cat(losses)


def counted(nll: Tensor, stride: int) -> Tensor:
    """Select the predictions that count, [predictions]: those of the first window, the last `stride` of each later."""
    # with stride < length, a later window's first length - stride tokens were its predecessor's
    return torch.cat([nll[0], nll[1:, -stride:].flatten()])


def perplexity(model: nn.Module, input_ids: Tensor, batch: int = 1, stride: int | None = None) -> float:
    """Return exp of the mean negative log-likelihood per predicted token.

    Args:
        input_ids: [windows, length], from `windows`.
        stride: that of `windows`; None where windows don't overlap.

    Raises:
        InputError: it isn't finite.
    """
    return from_nll(token_nll(model, input_ids, batch), stride or input_ids.shape[1])


def from_nll(nll: Tensor, stride: int) -> float:
    """Return exp of the mean over the predictions that count: exp(-1/n * sum of log p(x_t | x_<t)).

    Args:
        nll: [windows, length - 1], from `token_nll`.

    Raises:
        InputError: it isn't finite.
    """
    mean = float(counted(nll, stride).mean())
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise InputError(f"the perplexity is not finite (mean negative log-likelihood {mean}): the model is broken")
    return value
