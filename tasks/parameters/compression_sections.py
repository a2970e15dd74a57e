"""Sections of the stages that make a model smaller or give back what that cost, in their order."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.parameters.section import AUTO, Auto, Count, CountOrZero, Fraction, OrAuto, Rate, Section, Seed


class Vocabulary(Section):
    """Trimming of the vocabulary to the tokens that a corpus uses."""

    enabled: bool
    corpus: Literal["train", "calibration"]
    """The split whose tokens stay; single bytes and special tokens always do."""
    min_count: Count
    """A token stays that occurs at least this often."""


class Calibrate(Section):
    enabled: bool
    seed: Seed
    windows: Count
    length: Annotated[int, Field(ge=8)]
    """Tokens per window."""


class Importance(Section):
    enabled: bool
    windows: Count
    """Calibration windows used for scoring; the first ones of `calibrate`'s."""
    method: Literal["magnitude", "taylor", "perplexity", "block_influence", "compound"]
    """The score that ranks the layers for depth_prune; it alone is computed, and what a compound is made of."""


class DepthPrune(Section):
    enabled: bool
    remove: Annotated[CountOrZero | Auto, OrAuto]
    """Layers."""
    protect_first: CountOrZero
    protect_last: CountOrZero
    schedule: Literal["one_shot", "greedy"]
    """greedy scores again after each removal."""


class Wanda(Section):
    enabled: bool
    method: Literal["wanda", "wanda_alpha"]
    """wanda_alpha searches the share of each row's cumulative metric that is pruned, by bisection, per linear."""
    pattern: Literal["n_m", "unstructured"]
    keep: Annotated[Count | None | Auto, OrAuto]
    of: Annotated[int, Field(ge=2, le=32)] | None
    """n_m: `keep` weights stay of every `of` consecutive inputs of a row."""
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None
    """unstructured: fraction of zeros in each row."""
    enforce: bool
    """A later stage that breaks the pattern fails; if false the result is labelled dense and stored as dense."""

    @model_validator(mode="after")
    def _pattern(self) -> Wanda:
        if self.pattern == "n_m":
            if self.keep is None or self.of is None:
                raise ValueError("pattern n_m needs `keep` and `of`")
            if self.keep == AUTO and self.of != 4:
                raise ValueError(f"keep = auto is a choice of 4, and of = {self.of}: give a number, or set of to 4")
            if self.keep != AUTO and self.keep >= self.of:
                raise ValueError(f"keep = {self.keep} must be below of = {self.of}: otherwise nothing is pruned")
        elif self.sparsity is None:
            raise ValueError("pattern unstructured needs `sparsity`")
        if self.method == "wanda_alpha" and self.pattern != "unstructured":
            raise ValueError("method wanda_alpha searches for a sparsity, so it needs pattern unstructured")
        return self


class Distillation(Section):
    weight: Fraction
    """Share of the distillation loss on logits; the rest is the causal-LM loss."""
    temperature: Rate
    hidden: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Weight of the loss on the blocks' outputs (relative squared error), added to the others; 0 is without."""


class Lora(Section):
    enabled: bool
    method: Literal["masked", "remasked", "block_reconstruction"]
    """masked: the masks are part of every training step; remasked: plain LoRA, masks applied after the merge;
    block_reconstruction: each block is trained to its dense outputs, masks fixed, no backward pass through the model.
    """
    start: Literal["zeros", "eora"]
    """What the adapter is before training: nothing, or EoRA's compensation of the pruning."""
    seed: Seed
    rank: Count
    alpha: Rate
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: Literal["all-linear", "attention", "mlp"]
    steps: Annotated[Count | Auto, OrAuto]
    """Optimiser steps."""
    batch: Count
    """Windows per step."""
    length: Annotated[int, Field(ge=8)]
    """Tokens per window."""
    learning_rate: Annotated[Rate | Auto, OrAuto]
    warmup: Fraction
    distillation: Distillation


class Joint(Section):
    """SparseGPT's choice of an N:M mask inside the GPTQ sweep, instead of wanda's masks."""

    keep: Count
    of: Annotated[int, Field(ge=2, le=32)]

    @model_validator(mode="after")
    def _below(self) -> Joint:
        if self.keep >= self.of:
            raise ValueError(f"keep = {self.keep} must be below of = {self.of}: otherwise nothing is pruned")
        return self


class Embedding(Section):
    """Compression of the embedding and of the head (one stored copy where they are tied)."""

    bits: Literal[4, 8, 16]
    """16: float16, not quantised."""
    group_size: Literal[16, 32, 64, 128]
    """Consecutive values of a token's row that share a scale."""
    method: Literal["nearest", "gptq"]
    """gptq: rounding errors are compensated on the head's calibration inputs."""


class Gptq(Section):
    enabled: bool
    bits: Literal[2, 3, 4, 8]
    budget_bytes: Count | None
    """Bits per linear are chosen by measured sensitivity, so that the linears of all blocks pack into this many bytes;
    `bits` is then without effect."""
    group_size: Literal[-1, 16, 32, 64, 128]
    """Inputs that share a scale; -1 is the whole row."""
    scale_steps: Annotated[int, Field(ge=1, le=64)] | None
    """Scales are powers of 2 ** (1 / scale_steps), which pack into fewer bits; null: any float16."""
    symmetric: bool
    damp: Annotated[float, Field(gt=0, lt=1)]
    """Fraction of the Hessian's mean diagonal that is added to it."""
    act_order: Literal["none", "descending", "group_aware"]
    """Order of the columns: as they are, by falling Hessian diagonal, or so within and between groups only."""
    mse: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Norm of the error that a grid search of each scale minimises (2.4 in the GPTQ code); 0: no search."""
    descent_cycles: Annotated[int, Field(ge=0, le=100)]
    """Passes of coordinate descent over the codes after GPTQ (QuantEase); 0: none."""
    masked: bool
    """false: GPTQ as shipped, which moves pruned weights off zero; needs wanda.enforce = false."""
    joint: Joint | None
    embedding: Embedding

    @model_validator(mode="after")
    def _joint(self) -> Gptq:
        if self.joint and not self.masked:
            raise ValueError("joint chooses masks, so it needs masked: true")
        return self


class Eora(Section):
    enabled: bool
    rank: Count | None
    budget_bytes: Annotated[Count | None | Auto, OrAuto]
    """Instead of `rank`: ranks are chosen per linear under this sum, by the error removed per byte."""
    bits: Literal[4, 8, 16]
    """Of the stored factors; 16: float16."""
    teacher: Literal["lora", "fetch"]
    """The dense weights whose difference to the quantised ones is compensated."""

    @model_validator(mode="after")
    def _one(self) -> Eora:
        if (self.rank is None) == (self.budget_bytes is None):
            raise ValueError("give either `rank` or `budget_bytes`, and null for the other")
        return self


class Qad(Section):
    """Quantisation-aware distillation: the codes of GPTQ, of package and baseline alike, trained on their grids."""

    enabled: bool
    seed: Seed
    steps: Annotated[Count | Auto, OrAuto]
    """Optimiser steps."""
    batch: Count
    """Windows per step."""
    length: Annotated[int, Field(ge=8)]
    """Tokens per window."""
    learning_rate: Annotated[Rate | Auto, OrAuto]
    """In steps of the grid: of one that moves always the same way, so much per step of the optimiser."""
    warmup: Fraction
    distillation: Distillation


class Package(Section):
    enabled: bool
    coding: Literal["fixed", "entropy"]


class BaselineLora(Section):
    """The recovery of the plain model, with the parameters of `lora`."""

    enabled: bool


class Sensitivity(Section):
    """What each width of each of the plain model's linears costs, with the parameters of `gptq`."""

    enabled: bool


class Baseline(Section):
    """The plain model of the package's size, with the parameters of `gptq`."""

    enabled: bool
