"""What `auto` stands for in params.yaml: rules of a model's size, each with where it was measured.

A rule asks for what all models on the way through the DAG have in common: the sizes of one block, and the device. So
every stage comes to the same value by the config of the model that it works on, whatever layers and tokens are left.
One rule counts layers: it serves the stage that removes them. A stage sees values, never `auto` (`settle`).

They go through two points: the built-in model (hidden size 128), and SmolLM2-135M (576), measured as
tests/benchmarks/README.md says ("Defaults on a real model").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.algorithms.model.shape import ModelShape
from tasks.parameters.section import AUTO, Section

if TYPE_CHECKING:
    from tasks.parameters.schema import Params

Kind = TypeVar("Kind", bound=Section)

HIDDEN, BLOCK = 128, 196_608
"""Hidden size and weights of one block of the built-in model."""
SMALL = 256
"""Hidden size up to which a CPU has time for the recovery that closes what pruning opens."""


def _layers(model: ModelShape, device: str) -> int:
    return model.layers // 6 if model.hidden <= SMALL else 0


def _kept(model: ModelShape, device: str) -> int:
    """Of every `wanda.of`: half, or three quarters where less recovery has to make up for what is gone."""
    return 2 if model.hidden <= SMALL else 3


def _steps(model: ModelShape, device: str) -> int:
    """90 up to the built-in's size; beyond, time grows with the square root of a block, not with the block.

    Of the weights and of the codes each: half of both is better than the whole of the weights alone, in the same time.
    """
    return 90 if device == "cuda" else max(1, round(90 * math.sqrt(min(1.0, BLOCK / model.in_block))))


def _learning_rate(model: ModelShape, device: str) -> float:
    """0.01 up to the built-in's size; beyond, it falls with the square root of the hidden size."""
    return float(f"{0.01 * math.sqrt(min(1.0, HIDDEN / model.hidden)):.2g}")


def _code_rate(model: ModelShape, device: str) -> float:
    """0.03 up to the built-in's size; beyond, it falls with the hidden size to the power of 1.5."""
    return float(f"{0.03 * min(1.0, HIDDEN / model.hidden) ** 1.5:.2g}")


def _adapter_bytes(model: ModelShape, device: str) -> int:
    """About 1 % of the package: 8,000 for ten blocks of the built-in."""
    return max(1, round(model.in_blocks * 8000 / (10 * BLOCK)))


def _windows(model: ModelShape, device: str) -> int:
    """Of each split and for ten models: with more, evaluating a real model would take as long as recovering it."""
    return 60 if model.hidden <= SMALL else 16


RULES: dict[str, dict[str, Callable[[ModelShape, str], Any]]] = {
    "DepthPrune": {"remove": _layers},
    "Wanda": {"keep": _kept},
    "Lora": {"steps": _steps, "learning_rate": _learning_rate},
    "Qad": {"steps": _steps, "learning_rate": _code_rate},
    "Eora": {"budget_bytes": _adapter_bytes},
    "Evaluate": {"max_windows": _windows},
}
"""Class of a section -> parameter -> its rule, from the shape of a model and the device.

Classes by name: a stage that settles its own section doesn't depend on the schema of the others.
"""


def settle(section: Kind, model: ModelShape, device: str) -> Kind:
    """The section with a value for each `auto`.

    Args:
        model: the sizes of any model on the way through the DAG; for `depth_prune` of the one that loses layers.
        device: where the stages compute.
    """
    rules = RULES.get(type(section).__name__, {})
    values = {key: rule(model, device) for key, rule in rules.items() if getattr(section, key) == AUTO}
    return section.model_copy(update=values) if values else section


def settle_all(params: Params, model: ModelShape) -> Params:
    """`settle` of every section; `model` is the fetched one's."""
    sections = {name: section for name, section in params if type(section).__name__ in RULES}
    settled = {name: settle(section, model, params.device) for name, section in sections.items()}
    return params.model_copy(update=settled)
