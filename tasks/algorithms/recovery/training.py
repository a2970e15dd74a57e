"""The training of adapters or codes: AdamW on windows of a corpus, with a causal-LM loss and losses against a teacher.

What an adapter is, is `tasks.algorithms.recovery.masked_lora`'s, what a trained code is `qad`'s; losses are
`distillation`'s, what the teacher says of a window is `targets`'s. In memory are the student's weights, in whatever
type they have, what is trained, with gradient and AdamW's two moments in float32, and activations: of all blocks, or,
where each block is computed anew for the backward pass (`checkpointing`), of one block and the inputs of all. The bytes
are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, families, head, heap
from tasks.algorithms.model.device import repeatable_attention, seeded
from tasks.algorithms.recovery import distillation
from tasks.algorithms.recovery.targets import Target, Targets

if TYPE_CHECKING:
    from peft import LoraModel

    from tasks.algorithms.recovery.qad import Adapted

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
    return _cut(tokens, _starts(tokens, windows, length, generator), length)


def _cut(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
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
    return lambda step: _cut(tokens, starts[step - 1], recipe.length)


def train(
    model: LoraModel | Adapted,
    tokens: Tensor,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    kept: Sequence[int] | None = None,
    report: Callable[[int, float], None] = lambda step, loss: None,
    saved: checkpoints.Saved = checkpoints.NOTHING,
    shared: checkpoints.Saved = checkpoints.NOTHING,
    turn: int = 0,
    checkpointing: bool = False,
) -> list[dict[str, float]]:
    """Train the adapters with AdamW (no weight decay) on windows cut from the corpus at seeded random places.

    Args:
        model: from `masked_lora.attach` or `qad.trainable`; trained in place, in evaluation mode afterwards.
        tokens: int [corpus], the corpus as one row of token ids, on the CPU.
        recipe: see `Recipe`.
        teacher: a model of the same vocabulary on the same device; given if and only if the recipe distils.
        kept: for `recipe.hidden`: the teacher's block whose output each of the model's blocks has to reproduce.
            None: the same block, in models of one depth.
        report: called after each step with its number (from 1) and its loss.
        saved: what it holds of an interrupted training of the same model is taken up: the rest gives the same bytes.
        shared, turn: where targets are left for another training on the same windows, and found (`Targets`).
        checkpointing: compute each block anew for the backward pass, for less memory and the same bytes.

    Returns:
        One row per step with the keys `COLUMNS`, losses in nats before that step's update (`hidden` is relative);
        what has no share in the loss is NaN and not computed, except causal_lm.

    Raises:
        InputError: the corpus is shorter than a window; loss or gradient stop being finite.
        ValueError: `teacher` and the recipe contradict each other.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    drawn_at = drawn(tokens, recipe)
    targets = _targets(teacher, lambda step: drawn_at(step).to(device), recipe, kept, shared, turn)
    generators = [torch.default_generator, *torch.cuda.default_generators]  # dropout's
    history: list[dict[str, float]] = []
    with seeded(recipe.seed), repeatable_attention(device), _training(model, checkpointing):
        if before := saved.load(STATE):
            checkpoints.restore_training(before.tensors, parameters, optimizer, generators)
            history = before.values
        for step in range(len(history) + 1, recipe.steps + 1):
            losses = _losses(model, drawn_at(step).to(device), recipe, targets and targets.of(step))
            learning_rate = rate(step, recipe)
            update(losses[0], optimizer, step, learning_rate)
            figures = [float(value.detach()) for value in losses]
            history.append(dict(zip(COLUMNS, (step, *figures, learning_rate), strict=True)))
            if saved.due():
                saved.save(STATE, checkpoints.training_state(parameters, optimizer, generators), history)
            report(step, figures[0])
            heap.return_freed(heap.LARGE)
    return history


@contextmanager
def _training(model: LoraModel | Adapted, checkpointing: bool) -> Iterator[None]:
    """Within this context the model is in training mode, by need with its blocks computed anew for a backward pass."""
    model.train()
    if checkpointing:  # transformers' own, around torch's; the embedding is frozen, no gradient has to reach it
        model.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.model.disable_input_require_grads()
    try:
        yield
    finally:
        if checkpointing:
            model.model.activation_checkpointing_disable()
        model.eval()


def _targets(
    teacher: nn.Module | None,
    windows: Callable[[int], Tensor],
    recipe: Recipe,
    kept: Sequence[int] | None,
    shared: checkpoints.Saved,
    turn: int,
) -> Targets | None:
    """What the teacher says of each step's windows; of its blocks, too, where the recipe wants their outputs.

    Raises:
        ValueError: `teacher` and the recipe contradict each other.
    """
    if (teacher is not None) != (recipe.distillation > 0 or recipe.hidden > 0):
        shares = f"distillation = {recipe.distillation}, hidden = {recipe.hidden}"
        raise ValueError(f"{shares} {'without' if teacher is None else 'with'} a teacher")
    if teacher is None:
        return None
    compared: Sequence[nn.Module] = ()
    if recipe.hidden:  # each block with the one that it came from, whatever depth pruning removed around it
        blocks = families.blocks(teacher)
        compared = [blocks[index] for index in (range(len(blocks)) if kept is None else kept)]
        shared = checkpoints.NOTHING
    return Targets(teacher, windows, recipe.steps, shared, turn, compared)


def _losses(
    model: LoraModel | Adapted, ids: Tensor, recipe: Recipe, target: Target | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the losses of a batch, ids int64 [batch, length]: all together, causal LM, distillation, hidden."""
    blocks = families.blocks(model.model) if recipe.hidden else []
    with distillation.outputs_of(blocks) as outputs:
        said = distillation.Said(head.states(model.model, ids), head.of(model.model))
    taught = target.said if target is not None and recipe.distillation else None
    loss, causal, distilled = distillation.token_losses(said, ids, taught, recipe.distillation, recipe.temperature)
    hidden = torch.tensor(math.nan)
    if recipe.hidden:
        hidden = distillation.hidden_loss([each for (each,) in outputs], target.outputs)  # of [batch, length, hidden]
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
