"""A language model that says what a function says, as `tasks.algorithms.model.head` asks one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


class Says(nn.Identity):
    """The head of states that are logits already.

    Args:
        vocabulary: how many there are of a token.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.out_features = vocabulary


class StandIn:
    """Its logits of input_ids [batch, length] are `says(input_ids)`, [batch, length, vocabulary]."""

    def __init__(self, vocabulary: int, says: Callable[[Tensor], Tensor]) -> None:
        self.head, self.says = Says(vocabulary), says

    def base_model(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(last_hidden_state=self.says(input_ids))

    def get_output_embeddings(self) -> nn.Module:
        return self.head
