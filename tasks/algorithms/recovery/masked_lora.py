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

Cost: a masked layer needs the gradient of the whole product and keeps the summed weight until the backward pass, so
a training holds one more copy of the masked weights. Not here: gradient checkpointing, mixed precision (bf16 autocast
was measured 1.7 times faster on a CPU; fp32 until its quality is shown to hold).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel
from peft.tuners import lora
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, families, head, layers, masks, matrices
from tasks.algorithms.model.device import repeatable_attention
from tasks.algorithms.quantisation import eora, output_error
from tasks.algorithms.recovery import distillation
from tasks.algorithms.recovery.targets import Targets

COLUMNS = ("step", "loss", "causal_lm", "distillation", "hidden", "learning_rate")
"""A row of a training's history has these keys."""

STATE = "state"
"""Under this key is saved a training's state after its last step."""

CLIP = 1.0
"""The gradient of all trained weights together is scaled down to this norm where it is larger."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a training: `length` in tokens, `batch` in windows, `warmup` as a share of the steps."""

    steps: int
    batch: int
    length: int
    learning_rate: float
    warmup: float
    distillation: float
    """Share of the distillation loss on logits, 0 to 1; the rest is the causal-LM loss."""
    temperature: float
    seed: int
    hidden: float = 0.0
    """Weight of the loss on the blocks' outputs, added to the others."""


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
        """Return M * (B A * alpha / rank), [out, in]: PEFT merges it, `forward` multiplies with it."""
        delta = super().get_delta_weight(adapter)  # [out, rank] @ [rank, in], scaled
        return delta if self.pruned is None else delta.masked_fill(self.pruned, 0.0)

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
            result = F.linear(x, weight, bias)  # [..., out]
            for name in active:
                result = result + F.linear(self.lora_dropout[name](x), self.get_delta_weight(name).to(x.dtype))
            return result
        # the same without dropout: h = (W + M * (B A * alpha / rank)) x
        for name in active:
            weight = (weight + self.get_delta_weight(name)).to(weight.dtype)
        return F.linear(x, weight, bias)


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
    with _seeded(seed):  # PEFT draws A and starts B at zero (LoRA, section 4.1): a fresh adapter changes nothing
        adapted = LoraModel(model, config, "default")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, lora.LoraLayer)}
    # PEFT matches targets by the ends of names, and picks the layer's class itself
    wrong = set(layers) ^ set(targets) | {name for name, layer in layers.items() if type(layer) is not MaskedLinear}
    if wrong:
        raise RuntimeError(f"PEFT did not put the masked layer on exactly the targets: {_listed(wrong)}")
    for name, layer in layers.items():
        mask = keep.get(name)
        if mask is not None and not mask.all():
            layer.pruned = ~mask.to(layer.weight.device)  # [out, in]
    return adapted


def start_from_eora(adapted: LoraModel, teacher: Mapping[str, Tensor], input_ids: Tensor, batch: int) -> None:
    """Initialise the adapters with EoRA's compensation of what the weights lost ("EoRA", arXiv:2410.21271).

    The product times alpha / rank is the rank-r matrix closest to W_teacher - W on the inputs that the linear gets when
    all before it are compensated; a mask acts on it as in training. Where nothing was lost, PEFT's start stays.

    Args:
        adapted: from `attach`, of a supported family; changed in place, in evaluation mode afterwards.
        teacher: full module name -> weight [out, in] before it was pruned, for every target at least.
        input_ids: [windows, length] on the model's device; every token counts.
        batch: windows per forward pass.
    """
    model = adapted.eval().model

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        for name, matrix in matrices.by_block(model)[index].items():
            layer = matrix.module
            if not isinstance(layer, MaskedLinear):
                continue
            lost = teacher[name].to(layer.weight.device, torch.float32) - layer.weight.detach()  # [out, in]
            if lost.any():
                moments = output_error.second_moments({name: matrix}, block, inputs)[name]
                # A [rank, in] and B [out, rank]; the layer scales B A by alpha / rank, so each takes 1 / sqrt of it
                a, b = eora.factors(lost, moments, layer.r["default"])
                share = layer.scaling["default"] ** -0.5
                layer.lora_A["default"].weight.data.copy_(a * share)
                layer.lora_B["default"].weight.data.copy_(b * share)

    layers.walk(model, input_ids, visit, batch)


def apply_masks(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Set every pruned weight to zero, in place; keep: module name -> bool [out, in], True where kept."""
    for name, mask in keep.items():
        weight = model.get_submodule(name).weight
        weight.data.masked_fill_(~mask.to(weight.device), 0.0)


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


def rate(step: int, recipe: Recipe) -> float:
    """Return the learning rate of a step (from 1): linear warm-up, then half a cosine towards zero."""
    warm = round(recipe.warmup * recipe.steps)
    if step <= warm:
        return recipe.learning_rate * step / warm
    done = (step - 1 - warm) / (recipe.steps - warm)  # 0 at the first step after the warm-up, never quite 1
    # cosine annealing (Loshchilov and Hutter 2017, SGDR), one period, down to zero
    return recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2


def sample(tokens: Tensor, windows: int, length: int, generator: torch.Generator) -> Tensor:
    """Cut windows from the corpus [tokens] at random places, [windows, length]; they can overlap.

    Raises:
        InputError: the corpus is shorter than a window.
    """
    starts = _starts(tokens, windows, length, generator)
    return tokens.unfold(0, length, 1)[starts].long()  # of a view [tokens - length + 1, length] of all there are


def _starts(tokens: Tensor, windows: int, length: int, generator: torch.Generator) -> Tensor:
    if len(tokens) < length:
        raise InputError(
            f"the training corpus has {len(tokens)} tokens, less than one window of {length}: "
            "give a longer corpus or lower `length`"
        )
    return torch.randint(len(tokens) - length + 1, (windows,), generator=generator)


def drawn(tokens: Tensor, recipe: Recipe) -> Callable[[int], Tensor]:
    """Draw the windows of all steps; returns what gives those of one, from 1, int64 [batch, length].

    Raises:
        InputError: as `sample`.
    """
    sampler = torch.Generator().manual_seed(recipe.seed)
    starts = [_starts(tokens, recipe.batch, recipe.length, sampler) for _ in range(recipe.steps)]
    return lambda step: tokens.unfold(0, recipe.length, 1)[starts[step - 1]].long()


def train(
    model: LoraModel,
    tokens: Tensor,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    kept: Sequence[int] | None = None,
    report: Callable[[int, float], None] = lambda step, loss: None,
    saved: checkpoints.Saved = checkpoints.NOTHING,
    shared: checkpoints.Saved = checkpoints.NOTHING,
    turn: int = 0,
) -> list[dict[str, float]]:
    """Train the adapters with AdamW (no weight decay) on windows cut from the corpus at seeded random places.

    Args:
        model: from `attach`; trained in place, in evaluation mode afterwards.
        tokens: int [corpus], the corpus as one row of token ids, on the CPU.
        recipe: see `Recipe`.
        teacher: a model of the same vocabulary on the same device; given if and only if the recipe distils.
        kept: for `recipe.hidden`: the teacher's block whose output each of the model's blocks has to reproduce.
            None: the same block, in models of one depth.
        report: called after each step with its number (from 1) and its loss.
        saved: what it holds of an interrupted training of the same model is taken up: the rest gives the same bytes.
        shared, turn: where targets are left for another training on the same windows, and found (`Targets`); not
            with `recipe.hidden`, whose targets are the blocks'.

    Returns:
        One row per step with the keys `COLUMNS`, losses in nats before that step's update (`hidden` is relative);
        what has no share in the loss is NaN and not computed, except causal_lm.

    Raises:
        InputError: the corpus is shorter than a window; loss or gradient stop being finite.
        ValueError: `teacher` and the recipe contradict each other.
    """
    if (teacher is not None) != (recipe.distillation > 0 or recipe.hidden > 0):
        shares = f"distillation = {recipe.distillation}, hidden = {recipe.hidden}"
        raise ValueError(f"{shares} {'without' if teacher is None else 'with'} a teacher")
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    windows = drawn(tokens, recipe)
    generators = [torch.default_generator, *torch.cuda.default_generators]  # dropout's
    targets = None
    if teacher is not None and not recipe.hidden:
        targets = Targets(teacher, lambda step: windows(step).to(device), recipe.steps, shared, turn)
    history: list[dict[str, float]] = []
    model.train()
    with _seeded(recipe.seed), repeatable_attention(device):
        if before := saved.load(STATE):
            checkpoints.restore_training(before.tensors, parameters, optimizer, generators)
            history = before.values
        for step in range(len(history) + 1, recipe.steps + 1):
            ids = windows(step).to(device)  # [batch, length]
            losses = _losses(model, teacher, ids, recipe, kept, targets and targets.of(step))
            learning_rate = rate(step, recipe)
            update(losses[0], optimizer, step, learning_rate)
            figures = [float(value.detach()) for value in losses]
            history.append(dict(zip(COLUMNS, (step, *figures, learning_rate), strict=True)))
            if saved.due():
                saved.save(STATE, checkpoints.training_state(parameters, optimizer, generators), history)
            report(step, figures[0])
    model.eval()
    return history


def _losses(
    model: LoraModel,
    teacher: nn.Module | None,
    ids: Tensor,
    recipe: Recipe,
    kept: Sequence[int] | None,
    states: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the losses of a batch: all together, causal LM, distillation, hidden.

    Args:
        ids: int64 [batch, length].
        states: the teacher's, [batch * length, hidden], where they are known already.
    """
    ours, theirs, target = [], [], None
    if recipe.hidden:
        ours = list(families.blocks(model.model))
        blocks = families.blocks(teacher)
        # each block is compared with the one that it came from, whatever depth pruning removed around it
        theirs = [blocks[index] for index in (range(len(ours)) if kept is None else kept)]
    if teacher is not None and states is None:
        with torch.no_grad(), distillation.outputs_of(theirs) as wanted:  # inference_mode's can't be part of a loss
            states = head.states(teacher, ids)  # [batch * length, hidden]
    if recipe.distillation:
        target = distillation.Said(states, teacher.get_output_embeddings())
    with distillation.outputs_of(ours) as outputs:
        said = distillation.Said(head.states(model.model, ids), model.model.get_output_embeddings())
    loss, causal, distilled = distillation.token_losses(said, ids, target, recipe.distillation, recipe.temperature)
    hidden = torch.tensor(math.nan)
    if recipe.hidden:
        hidden = distillation.hidden_loss(outputs, wanted)  # of [batch, length, hidden] per block
        loss = loss + recipe.hidden * hidden
    return loss, causal, distilled, hidden


def update(loss: Tensor, optimizer: torch.optim.Optimizer, step: int, learning_rate: float) -> None:
    """Take one step of the optimizer at this learning rate, with the gradient's norm cut to `CLIP`.

    Raises:
        InputError: loss or gradient are not finite.
    """
    _finite("loss", loss, step, learning_rate)
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # g * min(1, CLIP / ||g||) over all of them (Pascanu et al. 2013)
    _finite("gradient norm", nn.utils.clip_grad_norm_(parameters, CLIP), step, learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()


def _finite(what: str, value: Tensor, step: int, learning_rate: float) -> None:
    number = float(value.detach())
    if not math.isfinite(number):
        raise InputError(
            f"the {what} of step {step} is {number} at a learning rate of {learning_rate:.3g}: expected a finite "
            "number; lower `learning_rate`, or check that the model before the training gives finite losses"
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global random state inside (PEFT's start values and dropout take no generator), restore it after."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _listed(names: Iterable[str]) -> str:
    first, *more = sorted(names)
    return f"{first} and {len(more)} more" if more else first
