"""Sections of where models and texts come from: the built-in corpus and model, fetch, overlap, harness_data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.parameters.section import Count, Fraction, HubName, Rate, Revision, Section, Seed


class Corpus(Section):
    """The built-in corpus: bytes of UTF-8 text per split."""

    seed: Seed
    train_bytes: Count
    calibration_bytes: Count
    test_bytes: Count


class BaseModelParams(Section):
    """The built-in model's shape and its training from scratch."""

    seed: Seed
    architecture: Literal["llama", "gpt2"]
    layers: Count
    hidden: Count
    mlp: Count
    heads: Count
    kv_heads: Count
    """GPT-2 has as many as heads."""
    vocabulary: Annotated[int, Field(ge=300)]
    context: Count
    tokens: Count
    """Training tokens in all, repeats included."""
    batch: Count
    """Windows of `context` tokens per optimiser step."""
    learning_rate: Rate
    """Peak, AdamW: embeddings, norms and biases."""
    muon_learning_rate: Rate
    """Peak, Muon: the matrices of the blocks."""
    weight_decay: Fraction
    """Muon's; per unit of learning rate."""
    input_noise: Fraction
    """Share of the input tokens that are replaced by random ones."""
    label_smoothing: Fraction
    warmup: Fraction
    """Share of the steps with a rising learning rate."""
    decay: Fraction
    """Share of the steps, at the end, with a falling learning rate."""

    @model_validator(mode="after")
    def _heads(self) -> BaseModelParams:
        if self.architecture == "gpt2" and self.kv_heads != self.heads:
            raise ValueError(f"`kv_heads` = {self.kv_heads}: gpt2 has as many as `heads` ({self.heads})")
        return self


class ModelSource(Section):
    """Where the model comes from: a local folder, or a hub repository at a pinned commit."""

    path: str
    hub: HubName | None
    revision: Revision | None

    @model_validator(mode="after")
    def _pinned(self) -> ModelSource:
        if (self.hub is None) != (self.revision is None):
            raise ValueError("`hub` and `revision` go together: name both, or leave both null")
        return self


class CorpusSource(ModelSource):
    """Where a corpus comes from: a local file, or a hub data set at a pinned commit."""

    field: str
    """The column that holds the text."""
    config: str | None
    """The hub data set's configuration name."""
    split: str | None
    """The hub data set's split."""

    @model_validator(mode="after")
    def _split(self) -> CorpusSource:
        if (self.hub is None) != (self.split is None):
            raise ValueError("a hub data set needs its `split`, a local file has none")
        return self


class Corpora(Section):
    """The four texts of the pipeline."""

    train: CorpusSource
    """LoRA recovery is trained on it."""
    calibration: CorpusSource
    test: CorpusSource
    """In-domain test split."""
    test_ood: CorpusSource
    """Out-of-domain test split."""


class Fetch(Section):
    model: ModelSource
    corpora: Corpora


class Overlap(Section):
    """What of the other texts stands in train."""

    enabled: bool
    words: Count
    """Of a run that counts as copied."""
    domain_words: Count
    """Of a run that tells the domain."""
    sample: Count
    """Documents of train, evenly spread, on which its own share of common runs is measured."""
    in_domain: Fraction
    """A split is in-domain from this share on, relative to train's own."""


class TaskSource(Section):
    """Where a task's documents come from: a local file, or, where `path` is null, the hub's data set at a commit."""

    path: str | None
    """A .jsonl file, as seen from harness_data.folder."""
    hub: HubName
    revision: Revision
    config: str | None
    split: str


class TaskSources(Section):
    corpus: Literal["test"]
    """The fetched split."""
    hellaswag: TaskSource
    arc_easy: TaskSource
    arc_challenge: TaskSource
    piqa: TaskSource
    winogrande: TaskSource
    triviaqa_closed: TaskSource
    triviaqa_open: TaskSource
    wikitext: TaskSource


class HarnessData(Section):
    """The documents of the tasks that `harness.tasks` names."""

    enabled: bool
    folder: str
    """Where local files are looked for; the stage depends on all of it."""
    sources: TaskSources
