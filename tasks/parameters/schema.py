"""The schema of params.yaml: one field per parameter, its unit and range beside it.

No field has a default (a default in Python is a parameter DVC can't see) and unknown keys are refused.
What can't change a result (threads, verbosity) is no parameter; the device changes the last bits, so it is one.
Constraints that need the model's config are in `tasks.parameters.preflight`.
"""

from __future__ import annotations

import zoneinfo
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tasks.algorithms.errors import InputError

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
HubName = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]


class Section(BaseModel):
    """A section of params.yaml; strict about unknown keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Corpus(Section):
    """The built-in corpus: bytes of UTF-8 text per split."""

    seed: Seed
    train_bytes: Count
    calibration_bytes: Count
    test_bytes: Count


class BaseModelParams(Section):
    """The built-in model's shape and its training from scratch."""

    seed: Seed
    layers: Count
    hidden: Count
    mlp: Count
    heads: Count
    kv_heads: Count
    vocabulary: Annotated[int, Field(ge=300)]
    context: Count
    tokens: Count
    """Training tokens in all, repeats included."""
    batch: Count
    """Windows of `context` tokens per optimiser step."""
    learning_rate: Rate
    """Peak, AdamW: embedding and norms."""
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
    """The score that ranks the layers for depth_prune; all of them are written."""


class DepthPrune(Section):
    enabled: bool
    remove: CountOrZero
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
    keep: Count | None
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
            if self.keep >= self.of:
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
    steps: Count
    """Optimiser steps."""
    batch: Count
    """Windows per step."""
    length: Annotated[int, Field(ge=8)]
    """Tokens per window."""
    learning_rate: Rate
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
    budget_bytes: Count | None
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


class Package(Section):
    enabled: bool


class BaselineLora(Section):
    """The recovery of the plain model, with the parameters of `lora`."""

    enabled: bool


class Baseline(Section):
    """The plain model of the package's size, with the parameters of `gptq`."""

    enabled: bool


class Evaluate(Section):
    enabled: bool
    protocol: Literal["joined", "gptq-2048", "thesis-512", "sliding", "rolling"]
    """How documents become windows, and what is counted: tasks.algorithms.scoring.protocols."""
    length: Annotated[int, Field(ge=8)]
    """Tokens per window; gptq-2048 and thesis-512 have their own."""
    stride: Count
    """Tokens from one window's start to the next one's; of joined and sliding."""
    max_windows: Count | None
    """Only the first so many windows of a split; null: all."""
    batch: Count
    """Windows per forward pass; no effect on the result beyond rounding."""
    prompts: Annotated[list[str], Field(min_length=1)]
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


class TaskSource(Section):
    """Where a task's documents come from: a local file, or, where `path` is null, the hub's data set at a commit."""

    path: str | None
    """A .jsonl file, as seen from harness_data.folder."""
    hub: HubName
    revision: Revision
    config: str | None
    split: str


class TaskSources(Section):
    """Of every task but `corpus`, which is the fetched test split."""

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


class Upstream(Section):
    """Branches of the hub whose newest commit a night takes; null: it stays at the pinned revision."""

    model: str | None
    corpora: str | None


class Retention(Section):
    """What `edgepress retention` keeps; promoted models and the workspace's data always stay."""

    nights: Count
    """The newest so many nights."""
    days: Count
    """Prefect's runs and the stages' logs that ended within so many days."""


class Nightly(Section):
    """When a night starts (flows/schedule.py) and what it follows."""

    cron: Annotated[str, Field(pattern=r"^\S+( \S+){4}$")]
    """Minute, hour, day of month, month, day of week."""
    timezone: str
    """A name of the IANA data base, such as Europe/Zurich."""
    overlap: Literal["cancel", "queue"]
    """What happens to a night that is due while another one runs."""
    upstream: Upstream
    retention: Retention

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in zoneinfo.available_timezones():
            raise ValueError("not a time zone of the IANA data base, such as UTC or Europe/Zurich")
        return name


class BySplit(Section):
    """A limit for each test split."""

    test: Rate
    test_ood: Rate


class Leak(Section):
    """Largest share of the test text that may stand in the training text."""

    documents: Fraction
    """Of the documents, word for word."""
    ngrams: Fraction
    """Of the 13-grams of words."""


class Gate(Section):
    """Limits that a night's model has to hold to be promoted (tasks/algorithms/statistics/gate.py)."""

    perplexity_ratio: BySplit
    """Most that its perplexity may be of the promoted model's."""
    base_ratio: BySplit
    """Most that it may be of the fetched model's, which bounds what many small regressions add up to."""
    dense_ratio: BySplit
    """Least that it may be of the dense model with the same recovery: below it is too good to be true."""
    task_drop: Fraction
    """Most accuracy that a task may lose against the promoted model."""
    bytes_ratio: Rate
    """Most that its bytes may be of the promoted model's."""
    max_bytes: Count | None
    """Of the folder to ship; null: what fits the device."""
    latency_ratio: Rate
    """Most that its seconds per token may be of the promoted model's, measured on the same host."""
    streaming: bool
    """Whether a model that has to stream weights for every token counts as fitting."""
    overlap: Leak
    resamples: Annotated[int, Field(ge=100)]
    """Bootstrap samples of the documents: a limit is broken or held where the whole 95 % interval says so."""
    seed: Seed


class Sla(Section):
    """What a canary has to keep, and how surely that has to be known: tasks.algorithms.statistics.canary."""

    share: Annotated[float, Field(gt=0, lt=1)]
    """Of the requests, where `canary start` names none."""
    p95_latency_ms: Rate
    """The canary's 95th percentile, at most."""
    accuracy_drop: Fraction
    """So much less than the promoted version's its accuracy may be, at most."""
    min_samples: Count
    """Of each version before the first verdict."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    """Of the verdict, over all times that it is asked for."""


class Registry(Section):
    """Versions: tasks.registry.versions."""

    keep: Annotated[int, Field(ge=2)]
    """Promoted versions whose data stays, the one in use included."""
    canary: Sla


SHARED = ("device",)
"""Keys of params.yaml that are no section: several stages share them."""
OPERATIONS = ("nightly", "gate", "registry")
"""Sections that no stage reads: they say when a run starts and what becomes of its result, not what the result is."""


class Params(Section):
    """The whole of params.yaml: the device, one section per stage, then those of OPERATIONS."""

    device: Literal["cpu", "cuda"]
    """Where the stages that use a model compute; results of the two differ in their last bits and are cached apart."""

    corpus: Corpus
    base_model: BaseModelParams
    fetch: Fetch
    overlap: Overlap
    vocabulary: Vocabulary
    calibrate: Calibrate
    importance: Importance
    depth_prune: DepthPrune
    wanda: Wanda
    lora: Lora
    gptq: Gptq
    eora: Eora
    package: Package
    baseline_lora: BaselineLora
    baseline: Baseline
    evaluate: Evaluate
    measure: Measure
    kv_cache: KvCache
    harness_data: HarnessData
    harness: Harness
    hardware_fit: HardwareFit
    report: Report
    nightly: Nightly
    gate: Gate
    registry: Registry

    @model_validator(mode="after")
    def _across(self) -> Params:
        users = [s for s in ("importance", "wanda", "gptq", "eora") if getattr(self, s).enabled]
        if users and not self.calibrate.enabled:
            raise ValueError(f"calibrate is switched off, but {', '.join(users)} need its windows: switch them off too")
        if self.depth_prune.enabled and self.depth_prune.remove and not self.importance.enabled:
            raise ValueError("importance is switched off, but depth_prune needs its scores: switch depth_prune off too")
        if self.wanda.enforce and self.wanda.enabled and self.gptq.enabled and not self.gptq.masked:
            raise ValueError("gptq.masked = false breaks wanda's pattern: set wanda.enforce to false, too")
        if self.gptq.enabled and self.gptq.joint and self.wanda.enabled:
            raise ValueError("gptq.joint chooses the masks itself: switch wanda off")
        if self.eora.enabled and not self.gptq.enabled:
            raise ValueError("gptq is switched off, but eora compensates its error: switch eora off too")
        if self.harness.enabled and not self.harness_data.enabled:
            raise ValueError("harness_data is switched off, but harness needs its documents: switch harness off too")
        if self.importance.enabled and self.importance.windows > self.calibrate.windows:
            raise ValueError(
                f"importance.windows = {self.importance.windows} is above calibrate.windows = {self.calibrate.windows}"
            )
        return self


def parse(raw: Any, source: str) -> Params:
    """Validate parsed YAML.

    Raises:
        InputError: one line per problem, each with the key, the value and what was expected.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{source} holds {type(raw).__name__}, expected one section per stage")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise InputError("\n".join(_sentence(source, e) for e in error.errors())) from error


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and validate the parameter file.

    Raises:
        InputError: the file is missing, is no YAML, or breaks the schema.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; run from the project's folder") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return parse(raw, str(path))


def _sentence(source: str, error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{source}: unknown parameter `{key}`; check its spelling against tasks/parameters/schema.py"
    if error["type"] == "missing":
        return f"{source}: parameter `{key}` is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{source}: {key + ': ' if key else ''}{message}"
    return f"{source}: `{key}` = {error['input']!r}: {message[0].lower() + message[1:]}"
