"""Low-rank recovery training (LoRA) that keeps pruned weights at zero.

LoRA (Hu et al. 2022, arXiv:2106.09685) adds `B A * alpha / rank` to a frozen weight W (its eq. 3, with the scale of its
section 4.1). Merged into a pruned W that dense product fills every zero. Here the forward pass and the merge both use

    W + M * (B A * alpha / rank),      M = 1 where a weight was kept, 0 where it was pruned,

so training sees exactly the model that is merged, and the sparsity pattern outlives it (as in SQFT, Munoz et al. 2024,
arXiv:2410.03750, whose "SparsePEFT" is this product). Without masks it is plain LoRA; `apply_masks` after a plain merge
is the common practice that it is compared with. Losses against a teacher are
`tasks.algorithms.recovery.distillation`'s.

Adapters are PEFT's own, so PEFT's `merge_and_unload` is what merges. One layer class is replaced, through
`LoraConfig._register_custom_module`: PEFT documents it ("Custom models") but calls it experimental, and it was tried
with peft 0.21. PEFT's `LoraVariant` was not used: it is private, and it gets the base layer's finished output, which
forces a second full matrix product in every masked layer. Nothing else here touches an experimental part of PEFT.

The frozen weight may be in the type that it is stored in (`tasks.algorithms.model.stored_type`): sum and product are in
float32 all the same. A mask is held as bits. A masked layer needs the gradient of the whole product and keeps the
summed weight until the backward pass, so a training that doesn't compute its blocks anew holds one more copy of the
masked weights. How adapters are trained is `tasks.algorithms.recovery.training`'s. bf16 autocast was measured 1.7 times
faster on a CPU; fp32 until its quality is shown to hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel
from peft.tuners import lora
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, masks, matrices, stored_type
from tasks.algorithms.model.device import seeded


class _Pruned(torch.autograd.Function):
    """Zero a product in place where packed bits say so; its own derivative would keep a byte per weight."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, bits: Tensor) -> Tensor:
        ctx.bits = bits
        ctx.mark_dirty(product)
        return product.masked_fill_(masks.unpack(bits, *product.shape), 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.masked_fill(masks.unpack(ctx.bits, *gradient.shape), 0.0), None


class MaskedLinear(lora.Linear):
    """PEFT's LoRA layer with a mask on the product of the two factors.

    Attributes:
        pruned: True where the weight has to stay zero, as packed bits of [out, in]; None for a dense layer, which is
            PEFT's own layer then: two thin products, no mask in memory, no gradient of the size of the weight.
    """

    pruned: Tensor | None

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.register_buffer("pruned", None, persistent=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return M * (B A * alpha / rank), [out, in]: PEFT merges it, `forward` multiplies with it."""
        delta = super().get_delta_weight(adapter)  # [out, rank] @ [rank, in], scaled
        return delta if self.pruned is None else _Pruned.apply(delta, self.pruned)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x [..., in] to [..., out]. Dropout acts on the input of the low-rank part alone, as in LoRA.

        Without dropout one product with the summed weight does both parts. With it the parts have different inputs,
        so a masked layer costs a second full product.

        Raises:
            NotImplementedError: PEFT's `adapter_names` (a different adapter per row of the batch) with a mask.
        """
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.pruned is None or self.disable_adapters or self.merged or not active:
            return super().forward(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError("a masked layer has one adapter for the whole batch, not one per row")
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if self.training and any(isinstance(self.lora_dropout[name], nn.Dropout) for name in active):
            # LoRA, eq. 3, with the mask: h = W x + M * (B A * alpha / rank) dropout(x)
            result = self.base_layer(x)  # [..., out]
            for name in active:
                result = result + F.linear(self.lora_dropout[name](x), self.get_delta_weight(name).to(x.dtype))
            return result
        # the same without dropout: h = (W + M * (B A * alpha / rank)) x
        for name in active:
            weight = self.get_delta_weight(name).add_(weight)  # in its place: of each sum there is one tensor
        return F.linear(x, weight.to(x.dtype), bias)


def select(model: nn.Module, targets: str) -> list[str]:
    """Name those of a model's block matrices that get an adapter, in running order.

    Args:
        model: of a supported family.
        targets: "all-linear", "attention" or "mlp", as the family sorts them.

    Raises:
        InputError: unknown `targets`.
    """
    family = families.of_model(model)
    try:
        chosen = family.chosen(targets)
    except KeyError as error:
        raise InputError(f"targets = {targets!r}: expected all-linear, attention or mlp") from error
    return [name for name in matrices.of_model(model) if name.endswith(tuple(f".{short}" for short in chosen))]


def revived(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, int]:
    """Count the pruned weights that are not exactly zero, per module; modules without any are left out.

    Args:
        model: any module.
        keep: module name -> bool [out, in], True where a weight was kept.

    Raises:
        InputError: a mask names no module of the model, or its shape is another one than the weight's.
    """
    counts = {}
    modules = dict(model.named_modules())
    for name, mask in sorted(keep.items()):
        if name not in modules:
            raise InputError(f"the masks name {name}, which the model does not have; take both from the same run")
        weight = modules[name].weight
        if mask.shape != weight.shape:
            shapes = f"{tuple(mask.shape)}, the weight {tuple(weight.shape)}"
            raise InputError(f"the mask of {name} has shape {shapes}; take both from the same run")
        if count := masks.revived(weight, mask):
            counts[name] = count
    return counts


def attach(
    model: nn.Module,
    targets: Sequence[str],
    keep: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
) -> LoraModel:
    """Freeze the model and put a fresh adapter, which changes nothing yet, on each target. Works in place.

    Args:
        model: a transformers model; its weights are zero wherever `keep` is False.
        targets: full names of `nn.Linear` modules.
        keep: module name -> bool [out, in]; a module without a mask, or with an all-True one, is dense.
        rank, alpha: the product is scaled by alpha / rank.
        dropout: acts on the low-rank part's input.
        seed: fixes the start values of A; the global random state is left as it was.

    Raises:
        InputError: `rank` above a target's smallest dimension; masks that don't fit the model.
    """
    if broken := revived(model, keep):
        raise InputError(f"pruned weights of {_listed(broken)} are not zero; take model and masks from the same run")
    for name in targets:
        smallest = min(model.get_submodule(name).weight.shape)
        if rank > smallest:
            shape = tuple(model.get_submodule(name).weight.shape)
            raise InputError(f"rank = {rank} is above the smallest dimension of {name} {shape}; use at most {smallest}")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none")
    config._register_custom_module({nn.Linear: MaskedLinear})
    # PEFT draws A and starts B at zero (LoRA, section 4.1): a fresh adapter changes nothing. It would round what it
    # draws to the type of the weight beside it (0.21).
    with seeded(seed), stored_type.taken_for_float32([model.get_submodule(name) for name in targets]):
        adapted = LoraModel(model, config, "default")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, lora.LoraLayer)}
    # PEFT matches targets by the ends of names, and picks the layer's class itself
    wrong = set(layers) ^ set(targets) | {name for name, layer in layers.items() if type(layer) is not MaskedLinear}
    if wrong:
        raise RuntimeError(f"PEFT did not put the masked layer on exactly the targets: {_listed(wrong)}")
    for name, layer in layers.items():
        mask = keep.get(name)
        if mask is not None and not mask.all():
            layer.pruned = masks.pack(~mask).to(layer.weight.device)
    return adapted


def apply_masks(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Set every pruned weight to zero, in place; keep: module name -> bool [out, in], True where kept."""
    for name, mask in keep.items():
        weight = model.get_submodule(name).weight
        weight.data.masked_fill_(~mask.to(weight.device), 0.0)


def merge(adapted: LoraModel, keep: Mapping[str, Tensor]) -> nn.Module:
    """Merge by PEFT's own layers and return the plain model, checked against the masks.

    A weight is merged in float32 and rounded to the type that it has, one at a time.

    Raises:
        RuntimeError: a pruned weight is not exactly zero after the merge.
        ValueError: a merged weight is not finite.
    """
    for layer in adapted.modules():
        if isinstance(layer, lora.LoraLayer):
            with stored_type.rounded_afterwards([layer.get_base_layer()]):
                layer.merge(safe_merge=True)
    model = adapted.unload()
    if broken := revived(model, keep):
        raise RuntimeError(f"the merge brought pruned weights back in {_listed(broken)}")
    return model


def _listed(names: Iterable[str]) -> str:
    first, *more = sorted(names)
    return f"{first} and {len(more)} more" if more else first
