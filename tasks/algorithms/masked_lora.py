"""Low-rank recovery training (LoRA) that keeps pruned weights at zero.

LoRA (Hu et al. 2022, arXiv:2106.09685) adds `B A * alpha / rank` to a frozen weight W. Merged into a pruned W that
dense product fills every zero again. Here both the forward pass and the merge use

    W + M * (B A * alpha / rank),      M = 1 where a weight was kept, 0 where it was pruned,

so training sees exactly the model that is merged, and the sparsity pattern outlives it (as in SQFT, Munoz et al. 2024,
arXiv:2410.03750, whose "SparsePEFT" is this product). The loss may mix in the distillation of Hinton et al. 2015
(arXiv:1503.02531).

Adapters are PEFT's own, so PEFT's `merge_and_unload` is what merges. One layer class is replaced, through
`LoraConfig._register_custom_module`: PEFT documents it ("Custom models") but calls it experimental, and it was tried
with peft 0.21. PEFT's `LoraVariant` was not used: it is private, and it gets the base layer's finished output, which
forces a second full matrix product in every masked layer. Nothing else here touches an experimental part of PEFT.

Cost: a masked layer needs the gradient of the whole product and keeps the summed weight until the backward pass, so
a training holds one more copy of the masked weights. Not here: hidden-state distillation, gradient checkpointing,
resuming, mixed precision (bf16 autocast was measured 1.7 times faster on a CPU; fp32 until its quality is
shown to hold).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tasks.algorithms.errors import InputError

COLUMNS = ("step", "loss", "causal_lm", "distillation", "learning_rate")
"""Keys of a row of `train`'s history."""

CLIP = 1.0
"""Largest norm of the gradient of all adapters together."""


@dataclass(frozen=True)
class Recipe:
    """How to train. `length` in tokens, `batch` in windows, `warmup` as a share of the steps."""

    steps: int
    batch: int
    length: int
    learning_rate: float
    warmup: float
    distillation: float
    """Share of the distillation loss, 0 to 1; the rest is the causal-LM loss."""
    temperature: float
    seed: int


class MaskedLinear(lora.Linear):
    """PEFT's LoRA layer with a mask on the product of the two factors.

    Attributes:
        pruned: bool [out, in], True where the weight has to stay zero; None for a dense layer, which is PEFT's own
            layer then: two thin products, no mask in memory, no gradient of the size of the weight.
    """

    pruned: Tensor | None

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.register_buffer("pruned", None, persistent=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """M * (B A * scale), [out, in]: PEFT merges it, `forward` multiplies with it."""
        delta = super().get_delta_weight(adapter)
        return delta if self.pruned is None else delta.masked_fill(self.pruned, 0.0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out]. Dropout acts on the input of the low-rank part alone, as in LoRA.

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
            result = F.linear(x, weight, bias)
            for name in active:
                result = result + F.linear(self.lora_dropout[name](x), self.get_delta_weight(name).to(x.dtype))
            return result
        for name in active:
            weight = (weight + self.get_delta_weight(name)).to(weight.dtype)
        return F.linear(x, weight, bias)


def select(linears: Iterable[str], targets: str) -> list[str]:
    """Those of a model's block linears that get an adapter, in the given order.

    Args:
        linears: full module names.
        targets: "all-linear", "attention" (a part of the name holds "attn" or "attention") or "mlp" (the others).

    Raises:
        InputError: unknown `targets`, or it fits no linear.
    """
    if targets not in ("all-linear", "attention", "mlp"):
        raise InputError(f"targets = {targets!r}: expected all-linear, attention or mlp")
    names = list(linears)
    attention = [name for name in names if any("attn" in part or "attention" in part for part in name.split("."))]
    others = [name for name in names if name not in set(attention)]
    chosen = {"all-linear": names, "attention": attention, "mlp": others}[targets]
    if not chosen:
        raise InputError(f"targets = {targets!r} fits none of the model's {len(names)} linears; choose all-linear")
    return chosen


def revived(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, int]:
    """How many pruned weights are not exactly zero, per module; modules without any are left out.

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
        if count := int(torch.count_nonzero(weight.detach()[~mask.to(weight.device)])):
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
        dropout: on the low-rank part's input.
        seed: of the start values of A; the global random state is left as it was.

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
    with _seeded(seed):
        adapted = LoraModel(model, config, "default")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, lora.LoraLayer)}
    wrong = set(layers) ^ set(targets) | {name for name, layer in layers.items() if type(layer) is not MaskedLinear}
    if wrong:
        raise RuntimeError(f"PEFT did not put the masked layer on exactly the targets: {_listed(wrong)}")
    for name, layer in layers.items():
        mask = keep.get(name)
        if mask is not None and not mask.all():
            layer.pruned = ~mask.to(layer.weight.device)
    return adapted


def merge(adapted: LoraModel, keep: Mapping[str, Tensor]) -> nn.Module:
    """Merge by PEFT's own `merge_and_unload` and return the plain model, checked against the masks.

    Raises:
        RuntimeError: a pruned weight is not exactly zero after the merge.
        ValueError: a merged weight is not finite.
    """
    model = adapted.merge_and_unload(safe_merge=True)
    if broken := revived(model, keep):
        raise RuntimeError(f"the merge brought pruned weights back in {_listed(broken)}")
    return model


def causal_lm_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy (nats) of each next token; logits [batch, length, vocabulary], ids int64 [batch, length]."""
    following = F.pad(ids[:, 1:], (0, 1), value=-100)  # shifts the ids instead of copying all but one of the logits
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """[batch, length, vocabulary] -> [batch * length, vocabulary], in nats."""
    return F.log_softmax(logits.flatten(0, 1) / temperature, dim=-1)


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student), in nats, averaged over all positions.

    Args:
        logits: the student's [batch, length, vocabulary].
        teacher: the teacher's `log_probabilities` at the same temperature, [batch * length, vocabulary].
        temperature: T; the square keeps the gradient's size independent of it.
    """
    student = log_probabilities(logits, temperature)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def rate(step: int, recipe: Recipe) -> float:
    """The learning rate of a step (from 1): linear warm-up, then half a cosine towards zero."""
    warm = round(recipe.warmup * recipe.steps)
    if step <= warm:
        return recipe.learning_rate * step / warm
    done = (step - 1 - warm) / (recipe.steps - warm)
    return recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2


def train(
    model: LoraModel,
    tokens: Tensor,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> list[dict[str, float]]:
    """Train the adapters with AdamW (no weight decay) on windows cut from the corpus at seeded random places.

    Args:
        model: from `attach`; trained in place, in evaluation mode afterwards.
        tokens: int64 [corpus], the corpus as one row of token ids, on the CPU.
        recipe: see `Recipe`.
        teacher: a model of the same vocabulary on the same device; given if and only if `recipe.distillation` > 0.
        report: called after each step with its number (from 1) and its loss.

    Returns:
        One row per step with the keys `COLUMNS`, losses in nats before that step's update; `distillation` is NaN when
        its share is 0, as it is not computed then.

    Raises:
        InputError: the corpus is shorter than a window; loss or gradient stop being finite.
        ValueError: `teacher` and `recipe.distillation` contradict each other.
    """
    if len(tokens) < recipe.length:
        raise InputError(
            f"the training corpus has {len(tokens)} tokens, less than one window of {recipe.length}: "
            "give a longer corpus or lower `length`"
        )
    if (teacher is not None) != (recipe.distillation > 0):
        raise ValueError(f"distillation = {recipe.distillation} {'without' if teacher is None else 'with'} a teacher")
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    windows = tokens.unfold(0, recipe.length, 1)
    sampler = torch.Generator().manual_seed(recipe.seed)
    history = []
    model.train()
    with _seeded(recipe.seed), _repeatable_attention(device):
        for step in range(1, recipe.steps + 1):
            places = torch.randint(len(windows), (recipe.batch,), generator=sampler)
            row = _step(model, teacher, windows[places].to(device), recipe, optimizer, step)
            history.append(row)
            report(step, row["loss"])
    model.eval()
    return history


def _step(
    model: LoraModel,
    teacher: nn.Module | None,
    ids: Tensor,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> dict[str, float]:
    """One update; ids int64 [batch, length]. Returns the step's row of the history."""
    target = None
    if teacher is not None:
        with torch.no_grad():  # no inference_mode: its tensors can't be part of a loss
            target = log_probabilities(teacher(input_ids=ids, use_cache=False).logits, recipe.temperature)
    logits = model(input_ids=ids, use_cache=False).logits
    with torch.set_grad_enabled(recipe.distillation < 1):  # at 1 it is only reported
        loss = causal = causal_lm_loss(logits, ids)
    distilled = torch.tensor(math.nan)
    if target is not None:
        distilled = distillation_loss(logits, target, recipe.temperature)
        loss = (1 - recipe.distillation) * causal + recipe.distillation * distilled
    learning_rate = rate(step, recipe)
    _finite("loss", loss, step, learning_rate)
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    _finite("gradient norm", nn.utils.clip_grad_norm_(parameters, CLIP), step, learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    figures = [float(value.detach()) for value in (loss, causal, distilled)]
    return dict(zip(COLUMNS, (step, *figures, learning_rate), strict=True))


def _finite(what: str, value: Tensor, step: int, learning_rate: float) -> None:
    number = float(value.detach())
    if not math.isfinite(number):
        raise InputError(
            f"the {what} of step {step} is {number} at a learning rate of {learning_rate:.3g}: expected a finite "
            "number; lower `learning_rate`, or check that the model before the training gives finite losses"
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeded global random state inside (PEFT's start values and dropout take no generator), the old one after it."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _repeatable_attention(device: torch.device) -> Any:
    """On a GPU the fused attention kernels add up gradients in any order; the plain one always gives the same bytes."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def _listed(names: Iterable[str]) -> str:
    first, *more = sorted(names)
    return f"{first} and {len(more)} more" if more else first
