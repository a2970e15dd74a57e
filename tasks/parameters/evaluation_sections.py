"""Sections of the stages that ask models something, fit them to a device and report; none of them changes a model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.parameters.section import Auto, Count, OrAuto, Section


class Evaluate(Section):
    enabled: bool
    protocol: Literal["joined", "gptq-2048", "thesis-512", "sliding", "rolling"]
    """How documents become windows, and what is counted: tasks.algorithms.scoring.protocols."""
    length: Annotated[int, Field(ge=8)]
    """Tokens per window; gptq-2048 and thesis-512 have their own."""
    stride: Count
    """Tokens from one window's start to the next one's; of joined and sliding."""
    max_windows: Annotated[Count | None | Auto, OrAuto]
    """Only the first so many windows of a split; null: all."""
    batch: Count
    """Windows per forward pass; no effect on the result beyond rounding."""
    prompts: str
    """A text file with a prompt per line; blank lines don't count."""
    new_tokens: Count

    @model_validator(mode="after")
    def _stride(self) -> Evaluate:
        if self.stride > self.length:
            raise ValueError(f"stride = {self.stride} above length = {self.length} would skip tokens")
        return self


class KvCache(Section):
    enabled: bool
    bits: Annotated[list[Literal[2, 4, 8]], Field(min_length=1)]
    """Of a cached value; each is compared with 16 (float16)."""
    contexts: Annotated[list[Count], Field(min_length=1)]
    """Tokens per window: how much the cache holds in the end."""
    tokens: Count
    """Of the test split, the first ones; the same for every context."""
    group_size: Count | None
    """Values of one head of one token that share a scale and a zero point; null: the whole head."""
    residual: Annotated[int, Field(ge=4, multiple_of=4)]
    """The newest tokens, up to so many less one, are not quantised yet; the cache is filled by so many at once."""

    @model_validator(mode="after")
    def _windows(self) -> KvCache:
        if max(self.contexts) > self.tokens:
            raise ValueError(f"tokens = {self.tokens} is less than one window of {max(self.contexts)} of `contexts`")
        if min(self.contexts) <= self.residual:
            raise ValueError(
                f"contexts has {min(self.contexts)}, of which residual = {self.residual} leaves nothing to be read"
                " from a quantised cache: lower residual"
            )
        return self


class Measure(Section):
    """What the models are asked on this machine."""

    enabled: bool
    threads: Count
    prompt_tokens: Count
    new_tokens: Count
    """Tokens that follow the prompt."""
    generations: Count
    """Timed ones per process, after one that warms up."""
    rounds: Count
    """Processes per model; the models take turns."""


TaskName = Literal[
    "corpus",
    "hellaswag",
    "arc_easy",
    "arc_challenge",
    "piqa",
    "winogrande",
    "triviaqa_closed",
    "triviaqa_open",
    "wikitext",
]
"""The files of data/harness_tasks."""


class Harness(Section):
    """Evaluation tasks by lm-evaluation-harness."""

    enabled: bool
    tasks: Annotated[list[TaskName], Field(min_length=1)]
    limit: Count | None
    """Only the first so many documents of a task; null: all."""
    batch: Count
    """Requests per forward pass; no effect on the result beyond rounding."""

    @model_validator(mode="after")
    def _once(self) -> Harness:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks = {self.tasks} names a task twice")
        return self


class HardwareFit(Section):
    enabled: bool
    device: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    """Name of a profile, data/devices/<device>.yaml."""
    context: Count
    """Tokens held in the KV cache, per sequence."""
    batch: Count
    kv_bits: Literal[4, 8, 16, 32]
    activation_bits: Literal[8, 16, 32]


class Report(Section):
    enabled: bool
