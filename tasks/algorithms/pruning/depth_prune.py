"""Remove whole transformer blocks: which ones, and the smaller model that is left.

Dropping blocks ranked by importance, once or with a new ranking after each removal, follows "Shortened LLaMA" (Kim et
al. 2024, arXiv 2402.02834) and "ShortGPT" (Men et al. 2024, arXiv 2403.03853). It computes no scores itself
(`tasks.algorithms.pruning.importance`) and recovers nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import TypeVar

from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families

Model = TypeVar("Model", bound=nn.Module)
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
"""Keys of configs that hold a list with one entry per block, where present."""
RUNS = {"attention_types": "attention_layers"}
"""Keys that hold such a list once more, as runs: [[entries], how often]."""
COUNTED = ("max_window_layers",)
"""Keys that count leading blocks, where present: those without a sliding window."""


def without(model: Model, removed: Collection[int]) -> Model:
    """Leave out some blocks. The given model stays as it is; the result shares its weights.

    Layer and KV-cache indices, `num_hidden_layers` and the config's per-layer lists follow the blocks that stay.

    Args:
        removed: indices into the model's blocks.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    smaller = copy.deepcopy(model, shared)  # with every tensor in the memo: new modules around the same weights
    family = families.of_model(smaller)
    blocks = families.blocks(smaller)
    kept = [index for index in range(len(blocks)) if index not in set(removed)]
    parent, _, name = family.blocks.rpartition(".")  # "model.layers" is the list `layers` of the module `model`
    setattr(smaller.get_submodule(parent), name, nn.ModuleList(blocks[index] for index in kept))
    # A block's attention finds its place in the KV cache by `layer_idx`: gaps would leave empty places.
    for position, index in enumerate(kept):
        for module in blocks[index].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    config = smaller.config
    config.num_hidden_layers = len(kept)
    for key in PER_LAYER:
        if getattr(config, key, None):
            setattr(config, key, [getattr(config, key)[index] for index in kept])
    for key, per_layer in RUNS.items():
        if getattr(config, key, None):
            setattr(config, key, [[list(getattr(config, per_layer)), 1]])
    # The first block with a sliding window, counted among the blocks that stay.
    for key in COUNTED:
        if getattr(config, key, None) is not None:
            setattr(config, key, sum(index < getattr(config, key) for index in kept))
    return smaller


def unprotected(layers: int, remove: int, protect_first: int, protect_last: int) -> list[int]:
    """List the indices of the blocks that may be removed.

    Raises:
        InputError: fewer than `remove`, or none would stay.
    """
    free = list(range(protect_first, layers - protect_last))
    if remove > len(free):
        raise InputError(
            f"remove = {remove}, but of {layers} layers only {len(free)} are unprotected "
            f"(protect_first = {protect_first}, protect_last = {protect_last}): remove or protect fewer"
        )
    if remove == layers:
        raise InputError(f"remove = {remove} would leave no layer of {layers}: remove fewer")
    return free


def one_shot(scores: Sequence[float] | Tensor, remove: int, protect_first: int, protect_last: int) -> list[int]:
    """Take the `remove` unprotected blocks with the lowest scores, lowest first; of equal scores the lower index.

    Args:
        scores: one per block, higher = more important.

    Raises:
        InputError: fewer blocks than `remove` are unprotected.
    """
    free = unprotected(len(scores), remove, protect_first, protect_last)
    return sorted(free, key=lambda index: (float(scores[index]), index))[:remove]


def greedy(
    model: nn.Module,
    scores: Sequence[float] | Tensor,
    rescore: Callable[[nn.Module], Tensor],
    remove: int,
    protect_first: int,
    protect_last: int,
) -> list[int]:
    """Remove the lowest-scored unprotected block, score the model that is left, and so on; ties as in `one_shot`.

    Args:
        scores: the whole model's, one per block.
        rescore: scores [blocks] of a smaller model.

    Returns:
        Indices of the given model's blocks, in order of removal.

    Raises:
        InputError: fewer blocks than `remove` are unprotected.
    """
    free = unprotected(len(scores), remove, protect_first, protect_last)
    kept = list(range(len(scores)))
    removed: list[int] = []
    while len(removed) < remove:
        if removed:
            scores = rescore(without(model, removed))  # [blocks left]
        # Scores go by the smaller model's places, `kept` says which blocks of the given one they are.
        _, index = min((float(score), index) for index, score in zip(kept, scores, strict=True) if index in free)
        removed.append(index)
        kept.remove(index)
        free.remove(index)
    return removed
