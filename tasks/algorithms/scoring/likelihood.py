"""Score documents under a perplexity protocol: nats, bytes and document of each predicted token, and their means.

The windows are `tasks.algorithms.scoring.protocols`'. Log-probabilities are taken in float32 whatever the model
computes in, and summed in float64. Windows of unequal length share a batch by padding at the end, where a causal
model's earlier positions don't see it; padding is never counted, and no attention mask is needed. It knows no model
beyond its call.

Shapes: n = predictions that count, in the order of the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, head, layers, streaming
from tasks.algorithms.model.device import beside
from tasks.algorithms.model.shape import shape_of_model
from tasks.algorithms.scoring import perplexity, protocols, token_bytes
from tasks.algorithms.scoring.protocols import Protocol, Window


class Prepared(NamedTuple):
    """Tokenised documents, cut into windows; needed once per tokenizer, not per model."""

    label: str
    length: int
    ids: list[Tensor]
    """The token ids of each text, int64 [tokens], with the prefix token where the protocol has one."""
    spans: list[Tensor]
    """The UTF-8 bytes that each of a text's tokens stands for, int64 [tokens]."""
    documents: list[Tensor]
    """The document that each of a text's tokens belongs to, int64 [tokens]."""
    windows: list[Window]


@dataclass(frozen=True)
class Score:
    """The predictions that count, in the order of the text.

    Attributes:
        label: the protocol.
        nll: negative log-likelihood in nats, float64 [n].
        spans: UTF-8 bytes of each predicted token, int64 [n].
        documents: document of each predicted token, int64 [n]; for a token that spans two, the later one.
        windows: forward passes at batch 1.
    """

    label: str
    nll: Tensor
    spans: Tensor
    documents: Tensor
    windows: int

    @property
    def perplexity(self) -> float:
        """The perplexity exp(sum of nats / n) of n predicted tokens. InputError where it isn't finite."""
        return perplexity.from_nll(self.nll.unsqueeze(0), 1)

    @property
    def bits_per_byte(self) -> float:
        """Information of the predictions in bits, per byte of the text that they stand for."""
        # sum of nats / ln 2 = bits; comparable between vocabularies, as perplexity is not
        return float(self.nll.sum()) / math.log(2) / int(self.spans.sum())

    def by_document(self) -> dict[str, np.ndarray]:
        """Return columns `document`, `predictions`, `bytes` (int64), `nll` (nats, float64): a row per document."""
        which, at = self.documents.unique(return_inverse=True)  # sorted [documents], and the row of each prediction [n]
        sums = {
            "predictions": torch.ones_like(self.spans),
            "bytes": self.spans,
            "nll": self.nll,
        }
        rows = {
            name: torch.zeros(len(which), dtype=column.dtype).index_add(0, at, column) for name, column in sums.items()
        }
        return {"document": which.numpy()} | {name: total.numpy() for name, total in rows.items()}


def prepare(protocol: Protocol, tokenizer: Any, documents: Sequence[str], limit: int | None = None) -> Prepared:
    """Tokenise documents and cut them into windows.

    Args:
        limit: only the first so many windows are measured; None: all.

    Raises:
        InputError: too little text for a window, a tokenizer without offsets, or without the prefix token.
    """
    if protocol.join is None:
        encoded = [token_bytes.encode(tokenizer, document) for document in documents]
    else:
        least = None if limit is None else protocol.length + limit * protocol.stride
        encoded = [token_bytes.joined(tokenizer, documents, protocol.join, least)]
    ids, spans = [encoding.ids for encoding in encoded], [encoding.spans for encoding in encoded]
    if protocol.prefix:  # a token that stands for no byte of the text
        first = torch.tensor([_prefix(protocol, tokenizer)])
        ids, spans = [torch.cat([first, i]) for i in ids], [torch.cat([torch.zeros(1).long(), s]) for s in spans]
    windows = protocols.windows(protocol, [len(tokens) for tokens in ids])
    if protocol.join is None:
        belong = [torch.full_like(tokens, text) for text, tokens in enumerate(ids)]
    else:
        belong = [documents_of(spans[0], documents, protocol.join)]
    return Prepared(protocols.label(protocol, limit), protocol.length, ids, spans, belong, windows[:limit])


def documents_of(spans: Tensor, documents: Sequence[str], join: str) -> Tensor:
    """Return the document of each token's last byte, int64 [tokens]; what joins two belongs to the earlier one.

    Args:
        spans: bytes of each token of the joined documents, int64 [tokens].
    """
    sizes = torch.tensor([len(f"{document}{join}".encode()) for document in documents])
    starts = sizes.cumsum(0) - sizes  # an empty document without a joiner would share its start with the next one
    # a token's last byte is at cumsum - 1; its document is the last one that starts at or before it
    return (torch.searchsorted(starts, spans.cumsum(0) - 1, right=True) - 1).clamp(min=0)


def score(
    model: nn.Module, prepared: Prepared, batch: int = 1, saved: checkpoints.Saved = checkpoints.NOTHING
) -> Score:
    """Score prepared documents: the nats of each prediction that counts.

    Args:
        model: as for `tasks.algorithms.model.head.states`.
        batch: windows per forward pass; no effect on the result beyond rounding.
        saved: what it holds of an interrupted run with the same arguments is taken up.
    """
    order = sorted(range(len(prepared.windows)), key=lambda at: -_width(prepared.windows[at]))  # stable; little padding
    nll = {}  # window -> nats of its predictions [stop - first], in `order`
    if begun := saved.load("nll"):
        counts = [prepared.windows[at].stop - prepared.windows[at].first for at in order[: begun.values]]
        nll = dict(zip(order, begun.tensors["nll"].split(counts), strict=False))
    together = batch * _batches_together(model, batch * prepared.length)
    for start in range(len(nll), len(order), together):
        part = order[start : start + together]
        nll |= zip(part, _nll(model, prepared, [prepared.windows[at] for at in part], batch), strict=True)
        if saved.due():
            saved.save("nll", {"nll": torch.cat(list(nll.values()))}, len(nll))
    return Score(
        prepared.label,
        torch.cat([nll[at] for at in range(len(order))]),
        torch.cat([prepared.spans[w.text][w.first : w.stop] for w in prepared.windows]),
        torch.cat([prepared.documents[w.text][w.first : w.stop] for w in prepared.windows]),
        len(order),
    )


def _batches_together(model: nn.Module, tokens: int) -> int:
    """Return how many batches of so many tokens go through a block while it is open; one where all of them are."""
    if not layers.kept_elsewhere(model):
        return 1
    return max(1, streaming.STATES // (tokens * shape_of_model(model).hidden))


def _nll(model: nn.Module, prepared: Prepared, windows: Sequence[Window], batch: int) -> list[Tensor]:
    """Return the nats of the counted predictions of windows sorted by falling length: float64 [stop - first] each."""
    batches, found = [windows[start : start + batch] for start in range(0, len(windows), batch)], []
    given = [_inputs(model, prepared, several) for several in batches]
    for several, each in zip(batches, head.nats_of(model, given), strict=True):
        nll = each.double().cpu()
        # column k holds the token start + 1 + k: from `first` on they count, the padding behind `stop` doesn't
        found += [row[w.first - w.start - 1 : w.stop - w.start - 1] for row, w in zip(nll, several, strict=True)]
    return found


def _inputs(model: nn.Module, prepared: Prepared, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Return what the model gets of a batch, and the tokens that follow: int64 [batch, length] each, padded by 0."""
    ids = torch.zeros(len(windows), _width(windows[0]), dtype=torch.int64)  # [batch, width]
    for row, window in zip(ids, windows, strict=True):
        row[: _width(window)] = prepared.ids[window.text][window.start : window.stop]
    ids = beside(model, ids)
    # -log p(x_t | x_<t): the logits at t - 1 predict the token at t; the last column may be one that none reads.
    # The last token of a window with a prefix is no input.
    return ids[:, : prepared.length], ids.roll(-1, dims=1)[:, : prepared.length]


def _width(window: Window) -> int:
    return window.stop - window.start


def _prefix(protocol: Protocol, tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise InputError(
        f"protocol {protocol.label} begins each document with the tokenizer's bos or eos token, and it has neither;"
        " take another protocol"
    )
