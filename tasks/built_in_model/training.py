"""Train a small Llama or GPT-2 from scratch.

Muon (Jordan et al. 2024, torch.optim.Muon) moves the matrices of the blocks, AdamW the embeddings, norms and biases;
the learning rate rises, holds and falls linearly to zero. The grammar's frames are few for a language model, so it is
kept from learning them by heart: random tokens in the input, label smoothing, weight decay, and of the measured points
the best on the calibration split is kept. Windows are drawn by a seeded generator.
Not bit-reproducible across machines: bfloat16 autocast and the thread count enter the sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.scoring import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tasks.parameters.source_sections import BaseModelParams
    from tasks.runtime.stage import Stage

CURVE_POINTS = 24


def model(p: BaseModelParams, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model of the parameters, as transformers makes it."""
    shared = {
        "vocab_size": p.vocabulary,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if p.architecture == "gpt2":
        undropped = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        sizes = {"n_embd": p.hidden, "n_inner": p.mlp, "n_layer": p.layers, "n_head": p.heads, "n_positions": p.context}
        return GPT2LMHeadModel(GPT2Config(**shared, **sizes, **undropped))
    return LlamaForCausalLM(
        LlamaConfig(
            **shared,
            hidden_size=p.hidden,
            intermediate_size=p.mlp,
            num_hidden_layers=p.layers,
            num_attention_heads=p.heads,
            num_key_value_heads=p.kv_heads,
            max_position_embeddings=p.context,
        )
    )


def train(
    model: PreTrainedModel, tokens: Tensor, held_out: Mapping[str, Tensor], p: BaseModelParams, stage: Stage
) -> pd.DataFrame:
    """Train in place and keep the weights of the curve's point with the lowest calibration perplexity.

    Args:
        model: its matrices are linears, [out, in], as the optimiser asks for.
        tokens: [tokens].
        held_out: split -> [windows, context].
        stage: shows the progress.

    Returns:
        The curve.
    """
    generator = torch.Generator().manual_seed(p.seed)
    initialise(model, generator)
    optimisers = _optimisers(model, p)
    steps = p.tokens // (p.batch * p.context)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _trapezoid(step, steps, p)) for o in optimisers]
    curve = _Curve(model, held_out)
    with stage.progress("base_model", steps) as progress:
        for step in range(1, steps + 1):
            starts = torch.randint(len(tokens) - p.context, (p.batch,), generator=generator)
            batch = torch.stack([tokens[start : start + p.context] for start in starts.tolist()])
            loss = _step(model.train(), batch, optimisers, schedules, p, generator)
            progress.update(step, loss=loss)
            if step % max(1, steps // CURVE_POINTS) == 0 or step == steps:
                curve.measure({"step": step, "tokens": step * p.batch * p.context, "loss": loss})
    model.load_state_dict(curve.best)
    return pd.DataFrame(curve.rows)


@dataclass
class _Curve:
    """Points of the training, and the weights of the best one."""

    model: PreTrainedModel
    held_out: Mapping[str, Tensor]
    rows: list[dict[str, float]] = field(default_factory=list)
    lowest: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)

    def measure(self, point: dict[str, float]) -> None:
        """Add a point with its perplexities, and keep the weights if none was better."""
        self.model.eval()
        perplexities = {
            name: perplexity.perplexity(self.model, windows, batch=4) for name, windows in self.held_out.items()
        }
        self.rows.append({**point, **perplexities})
        print(f"step {point['step']}: loss {point['loss']:.4f}, perplexity {perplexities}", flush=True)
        if perplexities["calibration"] < self.lowest:
            self.lowest = perplexities["calibration"]
            self.best = {name: weight.clone() for name, weight in self.model.state_dict().items()}


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Normal weights of standard deviation 0.02; what writes into the residual stream starts at zero."""
    family = families.of_model(model)
    last = (family.attention[-1], family.chosen("mlp")[-1])
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            zero = name.removesuffix(".weight").endswith(last)
            nn.init.zeros_(weight) if zero else nn.init.normal_(weight, std=0.02, generator=generator)


def _optimisers(model: nn.Module, p: BaseModelParams) -> list[torch.optim.Optimizer]:
    matrices = [linear.weight for linear in families.block_linears(model).values()]
    taken = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in taken]
    return [
        torch.optim.Muon(matrices, lr=p.muon_learning_rate, weight_decay=p.weight_decay, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=p.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _step(
    model: nn.Module, batch: Tensor, optimisers: list, schedules: list, p: BaseModelParams, generator: torch.Generator
) -> float:
    noise = torch.rand(batch.shape, generator=generator) < p.input_noise
    random = torch.randint(p.vocabulary, batch.shape, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=torch.where(noise, random, batch)).logits[:, :-1]
    loss = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch[:, 1:].flatten(), label_smoothing=p.label_smoothing
    )
    if not loss.isfinite():
        raise InputError("base_model: the loss is no longer finite; lower base_model.learning_rate")
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser, schedule in zip(optimisers, schedules, strict=True):
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return loss.item()


def _trapezoid(step: int, steps: int, p: BaseModelParams) -> float:
    rise, fall = max(1, int(p.warmup * steps)), max(1, int(p.decay * steps))
    return min(1.0, (step + 1) / rise, (steps - step) / fall)
