"""A model's head, applied to a few rows at a time: the logits of all tokens at once can take more than the model.

Of 4,096 tokens they are 32 MiB at a vocabulary of 2,048 and 2 GiB at 128,256, and every loss makes copies of them. So
the states after the final norm are computed first, then a few rows of logits at once (`rows`). Chunks move rounding
only, if anything: a row of a matrix product has the same bits in a larger one, but for products of a few rows.

Some families change what the head gives, by a value of their config: a soft cap, a factor (`LOGITS`). The logits of
this module are what the model says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tasks.algorithms.model import families, layers, streaming
from tasks.algorithms.model.rows import chunks
from tasks.algorithms.model.shape import shape_of_model

LOGITS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logit_scale": lambda logits, factor: logits * factor,
    "logits_scaling": lambda logits, divisor: logits / divisor,
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,
}
"""What is done with the head's outputs where a config has the key, and a value there."""


class ChangedHead(nn.Module):
    """A head whose outputs are changed as the model changes them.

    Attributes:
        linear: the head.
        changes: key of `LOGITS` -> value.
    """

    def __init__(self, linear: nn.Module, changes: dict[str, float]) -> None:
        super().__init__()
        self.linear, self.changes, self.out_features = linear, changes, linear.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., hidden] to logits [..., vocabulary]."""
        logits = self.linear(hidden)
        for key, value in self.changes.items():
            logits = LOGITS[key](logits, value)
        return logits


def of(model: Any) -> nn.Module:
    """Return what makes logits of states: the model's head, with what the model does to its outputs.

    Args:
        model: as for `states`.
    """
    linear, config = model.get_output_embeddings(), getattr(model, "config", None)
    changes = {key: getattr(config, key, None) for key in LOGITS}
    changes = {key: value for key, value in changes.items() if value is not None}
    return ChangedHead(linear, changes) if changes else linear


def finished(model: nn.Module, hidden: Tensor) -> Tensor:
    """Return the head's inputs for the last block's outputs [..., hidden]: those after the final norm.

    Raises:
        InputError: the model's family isn't supported.
    """
    for name in families.of_model(model).after:
        hidden = model.get_submodule(name)(hidden)
    return hidden


def states(model: Any, input_ids: Tensor) -> Tensor:
    """Return the head's inputs, [batch * length, hidden], for input_ids [batch, length].

    Args:
        model: a causal language model of transformers, or what has its `base_model` and `get_output_embeddings()`.
    """
    return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)


def states_of(model: Any, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield `states` of each batch.

    A model whose blocks are kept elsewhere opens each block once for many batches: those whose hidden states have
    `streaming.STATES` values together.
    """
    if not layers.kept_elsewhere(model):
        yield from (states(model, input_ids) for input_ids in batches)
        return
    for together in _together(batches, streaming.STATES // shape_of_model(model).hidden):
        for hidden in layers.carry(model, together):
            yield finished(model, hidden).flatten(0, 1)


def _together(batches: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Yield runs of consecutive batches of at most `most` tokens, or of one batch."""
    run: list[Tensor] = []
    for batch in batches:
        if run and sum(each.numel() for each in run) + batch.numel() > most:
            yield run
            run = []
        run.append(batch)
    if run:
        yield run


def logits(model: Any, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their logits [rows, vocabulary]) of the head's inputs [n, hidden], from the first to the last."""
    head = of(model)
    for rows in chunks(len(hidden), head.out_features):
        yield rows, head(hidden[rows])


def nats(model: Any, input_ids: Tensor, following: Tensor) -> Tensor:
    """Return the negative log-likelihood of the token that follows each, in float32: [batch, length].

    Args:
        model: as for `states`.
        input_ids: int64 [batch, length].
        following: int64 [batch, length].
    """
    return next(nats_of(model, [(input_ids, following)]))


@torch.no_grad()
def nats_of(model: Any, batches: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Yield `nats` of each (input_ids, following); where blocks are kept elsewhere, each is opened once for all."""
    for said, (_, following) in zip(states_of(model, [ids for ids, _ in batches]), batches, strict=True):
        yield _nats(model, said, following)


@torch.no_grad()
def nats_after(model: nn.Module, hidden: Tensor, following: Tensor) -> Tensor:
    """Return `nats` from the last block's outputs [batch, length, hidden], before the final norm."""
    return _nats(model, finished(model, hidden).flatten(0, 1), following)


def _nats(model: Any, said: Tensor, following: Tensor) -> Tensor:
    """Return `nats` [batch, length] from the head's inputs [batch * length, hidden]."""
    targets, found = following.flatten().unsqueeze(1), []  # [batch * length, 1]
    for rows, each in logits(model, said):
        found.append(-torch.log_softmax(each.float(), dim=-1).gather(1, targets[rows]).squeeze(1))
    return torch.cat(found).view(following.shape)
