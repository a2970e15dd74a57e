"""Does a model fit a device's memories, and how fast could it decode there at best: bytes and seconds by arithmetic.

A roofline (Williams, Waterman, Patterson, "Roofline", CACM 2009) for decoding one token at a time: every token reads
all weights and the whole KV cache once, so for small batches the memories limit, not the arithmetic.

What is counted
  weights      the tensor files as stored, and the metadata (tokenizer, configs, manifest): the device keeps both
  kv_cache     keys and values of every layer for `context` tokens of `batch` sequences
  activations  the largest set alive at once while one token per sequence goes through (prefill token by token as well)
  scratch      two weight rows being unpacked (one in use, one arriving) and the widest block linear's 32-bit sums
An item lives whole in one memory tier that may hold it; of all assignments the one with the fewest bytes over is taken,
then the one that uses the tiers listed first. Each tier's capacity is lowered by what is reserved and by the margin.

What it does not do: no schedule, no cache hierarchy, no splitting of an item over tiers, no power, no latency of
launches; code size is in a tier's `reserved`. The speed is an upper limit, never a forecast.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tasks.algorithms.errors import InputError

ITEMS = ("weights", "kv_cache", "activations", "scratch")
"""What a tier may hold; `weights` includes the metadata files."""


@dataclass(frozen=True)
class Tier:
    """One memory of a device. Bytes; bandwidth in bytes per second; `holds` is a subset of ITEMS."""

    name: str
    bytes: int
    reserved: int
    bandwidth: int
    holds: frozenset[str]

    def usable(self, margin: float) -> int:
        """Whole bytes left after the reserve and the safety margin (0.1 keeps a tenth of the rest free)."""
        return int((self.bytes - self.reserved) * (1 - Fraction(str(margin))))


@dataclass(frozen=True)
class Device:
    """What the verdict needs of a device profile.

    Attributes:
        tiers: memories in order of preference, the fastest first.
        operations_per_second: peak; a multiply-accumulate is two operations.
        weight_formats: "int4-group", "int8-channel", "fp16", … that the compute unit takes as they are.
        activation_bits: widths of activations at which the peak holds.
        time_saving: sparsity patterns (keep, of) that the compute unit skips.
        margin: share of each tier that stays free.
    """

    name: str
    tiers: tuple[Tier, ...]
    operations_per_second: int
    weight_formats: frozenset[str]
    activation_bits: frozenset[int]
    time_saving: frozenset[tuple[int, int]]
    margin: float


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama-like decoder; `context_limit` is the number of positions it was made for."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_limit: int


@dataclass(frozen=True)
class Files:
    """What lies in a model folder.

    Attributes:
        weights: bytes of the tensor files.
        metadata: bytes of all other files.
        streamed: bytes of tensors that each decoding step reads: all, but for an embedding that is only looked up in.
        adapter_parameters: of low-rank branches that run beside the linears.
        formats: weight formats in use, sorted.
        pattern: (keep, of) of the pruned linears, if they have an N:M pattern.
    """

    weights: int
    metadata: int
    streamed: int
    adapter_parameters: int = 0
    formats: tuple[str, ...] = ()
    pattern: tuple[int, int] | None = None


@dataclass(frozen=True)
class Workload:
    """Tokens per sequence in the KV cache, sequences, bits of a KV element and of an activation."""

    context: int
    batch: int
    kv_bits: int
    activation_bits: int


@dataclass(frozen=True)
class Place:
    """One tier and what was put there; bytes. `over` is how far `used` exceeds `usable`."""

    tier: str
    capacity: int
    usable: int
    items: dict[str, int]
    used: int
    over: int


@dataclass(frozen=True)
class Speed:
    """Upper limits in tokens per second over all sequences; `limited_by` says which of the two is `bound`."""

    bound: float
    bandwidth: float
    compute: float
    limited_by: str
    tier: str
    """The tier whose bandwidth limits."""


@dataclass(frozen=True)
class Fit:
    """The verdict. `bytes_over` and `headroom_bytes` are those of the tier in `limiting_term` ("tier: item")."""

    verdict: str
    limiting_term: str
    bytes_over: int
    headroom_bytes: int
    placement: list[Place]
    tokens_per_second: Speed
    notes: list[str]


def shape(config: dict[str, Any]) -> Shape:
    """The dimensions from a config.json.

    Raises:
        InputError: a key is missing.
    """
    try:
        heads = config["num_attention_heads"]
        return Shape(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            mlp=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            context_limit=config["max_position_embeddings"],
        )
    except KeyError as error:
        raise InputError(f"config.json has no {error}; hardware_fit needs a Llama-like decoder's dimensions") from error


def kv_cache_bytes(shape: Shape, workload: Workload) -> int:
    """Keys and values: 2 x layers x kv_heads x head_dim x context x batch elements of `kv_bits`."""
    elements = 2 * shape.layers * shape.kv_heads * shape.head_dim * workload.context * workload.batch
    return _bytes(elements, workload.kv_bits)


def activation_bytes(shape: Shape, workload: Workload) -> int:
    """The residual row and the widest step beside it, for one token of each sequence.

    Steps, in elements, with nothing reused in place but what says so:
      attention  normed row, queries, keys, values, scores of all heads over the context (softmax in place), mixed
                 values
      mlp        normed row, gate, up (their product in place)
      head       normed row, the row of logits
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.hidden + 2 * queries + 2 * keys + shape.heads * workload.context
    mlp = shape.hidden + 2 * shape.mlp
    head = shape.hidden + shape.vocabulary
    return _bytes(workload.batch * (shape.hidden + max(attention, mlp, head)), workload.activation_bits)


def scratch_bytes(shape: Shape, workload: Workload) -> int:
    """Two unpacked rows of the block linear with the most inputs, and 32-bit sums for the one with the most outputs."""
    queries = shape.heads * shape.head_dim
    widest = max(shape.hidden, shape.mlp, queries)
    return _bytes(2 * widest, workload.activation_bits) + 4 * widest * workload.batch


def operations_per_token(shape: Shape, files: Files, workload: Workload) -> int:
    """Two per parameter of every matrix a token is multiplied with, and four per query element and cached token."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    block = 2 * shape.hidden * (queries + keys) + 3 * shape.hidden * shape.mlp
    parameters = shape.layers * block + shape.vocabulary * shape.hidden + files.adapter_parameters
    return 2 * parameters + 4 * shape.layers * queries * workload.context


def place(device: Device, shape: Shape, files: Files, workload: Workload) -> Fit:
    """Put the model into the device's memories and say whether it fits.

    Raises:
        InputError: the context is longer than the model's positions, or no tier of the device holds an item.
    """
    if workload.context > shape.context_limit:
        raise InputError(
            f"hardware_fit.context = {workload.context} is above the model's max_position_embeddings = "
            f"{shape.context_limit}; lower it"
        )
    sizes = {
        "weights": files.weights + files.metadata,
        "kv_cache": kv_cache_bytes(shape, workload),
        "activations": activation_bytes(shape, workload),
        "scratch": scratch_bytes(shape, workload),
    }
    homes = _assign(device, sizes)
    placement = [_place(tier, index, device.margin, sizes, homes, files) for index, tier in enumerate(device.tiers)]
    limiting = _limiting(placement)
    return Fit(
        verdict="FITS" if not any(p.over for p in placement) else "DOES_NOT_FIT",
        limiting_term=f"{limiting.tier}: {max(limiting.items, key=lambda item: (limiting.items[item], item))}",
        bytes_over=limiting.over,
        headroom_bytes=max(0, limiting.usable - limiting.used),
        placement=placement,
        tokens_per_second=_speed(device, homes, sizes["kv_cache"], shape, files, workload),
        notes=_notes(device, files, workload),
    )


def _assign(device: Device, sizes: dict[str, int]) -> dict[str, int]:
    """The tier index of each item; a handful of items and tiers, so all assignments are tried."""
    choices = []
    for item in ITEMS:
        allowed = [index for index, tier in enumerate(device.tiers) if item in tier.holds]
        if not allowed:
            raise InputError(f"device {device.name}: no memory tier may hold {item}; add it to a tier's `holds`")
        choices.append(allowed)
    usable = [tier.usable(device.margin) for tier in device.tiers]

    def cost(homes: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        used = [0] * len(usable)
        for item, home in zip(ITEMS, homes, strict=True):
            used[home] += sizes[item]
        return sum(max(0, u - limit) for u, limit in zip(used, usable, strict=True)), homes

    return dict(zip(ITEMS, min(itertools.product(*choices), key=cost), strict=True))


def _place(tier: Tier, index: int, margin: float, sizes: dict[str, int], homes: dict[str, int], files: Files) -> Place:
    items = {item: sizes[item] for item in ITEMS if homes[item] == index}
    if "weights" in items:
        items |= {"weights": files.weights, "metadata": files.metadata}
    used, usable = sum(items.values()), tier.usable(margin)
    return Place(tier.name, tier.bytes, usable, items, used, max(0, used - usable))


def _limiting(placement: list[Place]) -> Place:
    """The tier with the most bytes over; when all fit, the one that is filled to the largest share."""
    taken = [place for place in placement if place.items]
    if any(place.over for place in taken):
        return max(taken, key=lambda place: place.over)
    return max(taken, key=lambda place: Fraction(place.used, max(1, place.usable)))


def _speed(
    device: Device, homes: dict[str, int], kv_bytes: int, shape: Shape, files: Files, workload: Workload
) -> Speed:
    """Reads from different tiers may overlap, so the slowest tier limits; reads from one tier add up."""
    reads = dict.fromkeys((homes["weights"], homes["kv_cache"]), 0)
    reads[homes["weights"]] += files.streamed
    reads[homes["kv_cache"]] += kv_bytes
    seconds = {index: read / device.tiers[index].bandwidth for index, read in reads.items()}
    slowest = max(seconds, key=lambda index: seconds[index])
    bandwidth = workload.batch / seconds[slowest]
    rate = float(device.operations_per_second)
    if files.pattern in device.time_saving and files.pattern is not None:
        keep, of = files.pattern
        rate *= of / keep
    compute = rate / operations_per_token(shape, files, workload)
    return Speed(
        bound=min(bandwidth, compute),
        bandwidth=bandwidth,
        compute=compute,
        limited_by="bandwidth" if bandwidth <= compute else "compute",
        tier=device.tiers[slowest].name,
    )


def _notes(device: Device, files: Files, workload: Workload) -> list[str]:
    """What the bytes alone don't show: formats the compute unit can't take, zeros it doesn't skip."""
    notes = [
        f"{device.name} has no compute unit for {name} weights: they are unpacked or run in software, "
        "so the speed limit can't be reached"
        for name in files.formats
        if not _takes(device.weight_formats, name)
    ]
    if workload.activation_bits not in device.activation_bits:
        stated = ", ".join(map(str, sorted(device.activation_bits)))
        notes.append(f"{device.name}'s peak holds for activations of {stated} bits, not {workload.activation_bits}")
    if files.pattern is not None and files.pattern not in device.time_saving:
        keep, of = files.pattern
        zeros = float(1 - Fraction(keep, of))
        notes.append(
            f"{device.name} skips no zeros of {keep} kept of {of} ({zeros:.0%} zeros): they save no time there"
        )
    return notes


def _takes(supported: frozenset[str], name: str) -> bool:
    """`int8` without a granularity is taken where any int8 is."""
    return name in supported or ("-" not in name and any(one.partition("-")[0] == name for one in supported))


def _bytes(elements: int, bits: int) -> int:
    return -(-elements * bits // 8)
