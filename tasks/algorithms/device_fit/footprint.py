"""Count what a model takes of a device's memory and what a token costs: bytes and operations by arithmetic.

A file and a memory hold the same matrix differently. A packed file stores the positions of kept weights and their
codes; a compute unit that has no use for zeros needs every code of the matrix, zeros too. A file may store scales as
indices of a table; kernels take them in 16 bits. A format that the unit cannot compute with is held in the nearest that
it can (`nearest`). So bytes in memory are counted here from what the model is, never taken from its file.

What a token needs besides
  kv_cache     keys and values of every layer for `context` tokens of `batch` sequences
  activations  the largest set alive at once while one token per sequence goes through (prefill token by token as well)
  scratch      two weight rows being unpacked (one in use, one arriving) and the widest block linear's 32-bit sums

What it does not do: it reads no files, knows no memories (tasks.algorithms.device_fit.placement) and no alignment or
padding of kernels; norms and biases count as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from tasks.algorithms.model.shape import ModelShape

COMPONENTS = ("values", "positions", "scales", "zeros", "embedding", "norms", "adapter", "metadata")
"""Bytes in memory are for one of these. `scales` has each input's group (act order) too, `embedding` an untied head."""
SCALE_BITS, ORDER_BITS = 16, 32
"""A scale, and the index of an input's group, have so many bits, as kernels take them."""
NEW_GROUP = 64
"""So many inputs share a scale where a model that isn't quantised is imagined with few bits."""
FLOATS = {"fp32": 32, "fp16": 16, "bf16": 16}


@dataclass(frozen=True)
class Workload:
    """The use of a model: tokens per sequence in the KV cache, sequences, bits of a KV element and of an activation."""

    context: int
    batch: int
    kv_bits: int
    activation_bits: int


@dataclass(frozen=True)
class Matrix:
    """A matrix of the model.

    Attributes:
        component: "values" for a linear of a block, "embedding", "adapter".
        format: "fp32", "fp16", "bf16", or "int4-group" (scales per group of inputs), "int8-channel" (per output row).
        group_size: inputs that share a scale; 0 for a float.
        pattern: (keep, of) of an N:M pattern; None without.
        unstructured: pruned without such a pattern.
        zero_points: stored per scale, in the bits of a code.
        ordered: each input names its group (act order).
        looked_up: a token reads one row only.
        average_bits: mean width of its codes, where several are mixed; None: that of `format`.
    """

    component: str
    rows: int
    cols: int
    format: str
    group_size: int = 0
    pattern: tuple[int, int] | None = None
    unstructured: bool = False
    zero_points: bool = False
    ordered: bool = False
    looked_up: bool = False
    average_bits: Fraction | None = None


@dataclass(frozen=True)
class Part:
    """A block, or one of "embedding", "head", "norms" (the final one): its matrices, and bytes of norms and biases."""

    name: str
    matrices: tuple[Matrix, ...] = ()
    norms: int = 0

    @property
    def is_block(self) -> bool:
        return self.name.startswith("layers.")


@dataclass(frozen=True)
class Model:
    """A model as hardware fit sees it.

    Attributes:
        parts: blocks in order, then the rest.
        metadata: bytes of what isn't tensors (tokenizer, configs, headers), which the device keeps, too.
        stored: bytes of the files; for a model that is only planned, what they would be.
        stored_components: component -> bytes in the files.
    """

    shape: ModelShape
    parts: tuple[Part, ...]
    metadata: int
    stored: int
    stored_components: Mapping[str, int]

    def matrices(self) -> Iterable[Matrix]:
        """Go through the matrices of all parts."""
        return (matrix for part in self.parts for matrix in part.matrices)


@dataclass(frozen=True)
class Unit:
    """A compute unit: the formats that it computes with, its peaks, the zeros that it has a use for.

    Attributes:
        formats: weight format -> the precision of the arithmetic it runs in.
        rates: precision -> peak operations per second; a multiply-accumulate is two.
        saves_bytes, saves_time: N:M patterns whose zeros it doesn't hold, or skips.
    """

    formats: Mapping[str, str]
    rates: Mapping[str, int]
    saves_bytes: frozenset[tuple[int, int]] = frozenset()
    saves_time: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Held:
    """Bytes of one component of one part in memory; `read`: every token reads them, as a whole."""

    part: str
    component: str
    bytes: int
    read: bool = True


def kv_cache_bytes(shape: ModelShape, workload: Workload) -> int:
    """Count keys and values: 2 x layers x kv_heads x head_dim x context x batch elements of `kv_bits`."""
    elements = 2 * shape.layers * shape.kv_heads * shape.head_dim * workload.context * workload.batch
    return _bytes(elements, workload.kv_bits)


def activation_bytes(shape: ModelShape, workload: Workload) -> int:
    """Count the residual row and the widest step beside it, for one token of each sequence.

    Steps, in elements, with nothing reused in place but what says so:
      attention  normed row, queries, keys, values, scores of all heads over the context (softmax in place), mixed
                 values
      mlp        normed row, gate, up (their product in place)
      head       normed row, the row of logits
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # normed, then q and the mixed values, k and v, the scores [heads, context]
    attention = shape.hidden + 2 * queries + 2 * keys + shape.heads * workload.context
    mlp = shape.hidden + 2 * shape.mlp  # normed, then gate and up
    head = shape.hidden + shape.vocabulary
    return _bytes(workload.batch * (shape.hidden + max(attention, mlp, head)), workload.activation_bits)


def scratch_bytes(shape: ModelShape, workload: Workload) -> int:
    """Count two unpacked rows of the block linear with the most inputs, 32-bit sums of the one with most outputs."""
    queries = shape.heads * shape.head_dim
    widest = max(shape.hidden, shape.mlp, queries)  # the largest side of any linear, as input and as output
    return _bytes(2 * widest, workload.activation_bits) + 4 * widest * workload.batch


def nearest(name: str, supported: Iterable[str]) -> str | None:
    """Choose the format in which a device holds weights of format `name`; None where it has nothing as wide.

    The same one; else the narrowest integers that hold the same codes with the same or finer scales; else, as scales
    per group become one per row, the widest integers; else the narrowest floats that are as wide.
    """
    supported = list(supported)
    if name in supported:
        return name
    integers = sorted((_width(kind), kind) for kind in supported if kind not in FLOATS and _width(kind) >= _width(name))
    if name not in FLOATS:
        # a row's one scale can stand for each of its groups, the groups' scales not for a row
        same = [kind for _, kind in integers if kind.endswith("-group") or name.endswith("-channel")]
        if same:
            return same[0]
        if integers:
            return integers[-1][1]  # quantised anew per row: the widest loses least
    floats = sorted((_width(kind), kind) for kind in supported if kind in FLOATS and _width(kind) >= _width(name))
    return floats[0][1] if floats else None


def hold(model: Model, unit: Unit) -> list[Held]:
    """List every component of every part as the device's memory holds it, in the order of the model."""
    entries = []
    for part in model.parts:
        sizes: dict[tuple[str, bool], int] = {}  # (component, read as a whole) -> bytes
        for matrix in part.matrices:
            for component, size in matrix_bytes(matrix, unit).items():
                key = component, not matrix.looked_up
                sizes[key] = sizes.get(key, 0) + size
        if part.norms:
            sizes["norms", True] = part.norms
        entries += [Held(part.name, component, size, read) for (component, size), read in _flat(sizes)]
    return entries + [Held("metadata", "metadata", model.metadata, read=False)]


def matrix_bytes(matrix: Matrix, unit: Unit) -> dict[str, int]:
    """Count component -> bytes of one matrix in memory; the scales of an embedding or adapter count with it.

    Where the unit has a use for the zeros of an N:M pattern, it holds the kept codes and for each the bits of an index
    within its group; everywhere else all codes.
    """
    count, held = matrix.rows * matrix.cols, nearest(matrix.format, unit.formats) or matrix.format
    bits = matrix.average_bits or _width(held)
    sizes, kept = {}, count
    if matrix.pattern in unit.saves_bytes:
        keep, of = matrix.pattern
        kept = count * keep // of
        sizes["positions"] = _bytes(kept, (of - 1).bit_length())  # an index 0 to of - 1 per kept weight
    sizes["values"] = _bytes(kept, bits)
    if held not in FLOATS:
        # a scale per group of inputs and row, or per row
        groups = matrix.rows * (_groups(matrix) if held.endswith("-group") else 1)
        sizes["scales"] = _bytes(groups, SCALE_BITS)
        if matrix.zero_points:
            sizes["zeros"] = _bytes(groups, bits)
        if matrix.ordered and held.endswith("-group"):
            sizes["scales"] += _bytes(matrix.cols, ORDER_BITS)
    return sizes if matrix.component == "values" else {matrix.component: sum(sizes.values())}


def row_bytes(model: Model, unit: Unit) -> int:
    """Count the bytes that a token reads of the tables that it looks up in: a row of each."""
    looked_up = (matrix for matrix in model.matrices() if matrix.looked_up)
    return sum(-(-sum(matrix_bytes(matrix, unit).values()) // matrix.rows) for matrix in looked_up)


def operations(model: Model, unit: Unit, workload: Workload) -> dict[str, int | Fraction]:
    """Count precision -> operations per token: two per weight, four per query element and cached token.

    Zeros that the unit skips are left out. Attention runs in the floats of the activations' width, or in integers where
    they have 8 bits; where the unit has none such, at its fastest precision.
    """
    counts: dict[str, int | Fraction] = {}
    for matrix in model.matrices():
        if matrix.looked_up:
            continue
        precision = precision_of(matrix, unit)
        share = Fraction(*matrix.pattern) if matrix.pattern in unit.saves_time else 1  # keep / of
        counts[precision] = counts.get(precision, 0) + 2 * matrix.rows * matrix.cols * share
    wanted = {8: ("int8",), 16: ("fp16", "bf16"), 32: ("fp32",)}[workload.activation_bits]
    precision = next((name for name in wanted if name in unit.rates), fastest(unit))
    # Q K^T and its product with V: a multiply and an add each per query element and cached token
    attention = 4 * model.shape.layers * model.shape.heads * model.shape.head_dim * workload.context
    counts[precision] = counts.get(precision, 0) + attention
    return counts


def precision_of(matrix: Matrix, unit: Unit) -> str:
    """Return the precision of the unit's arithmetic with the matrix.

    It is the unit's fastest where it takes nothing like the matrix, so that an upper bound of the speed holds.
    """
    held = nearest(matrix.format, unit.formats)
    return unit.formats[held] if held else fastest(unit)


def fastest(unit: Unit) -> str:
    """Return the precision of the highest peak."""
    return max(unit.rates, key=lambda precision: unit.rates[precision])


def with_bits(model: Model, bits: Fraction, unit: Unit) -> Model:
    """Return the model with `bits` bits per weight in its blocks' linears, on average over `widths` of the unit.

    Scales stay as they are; for a model in floats they are per group of `NEW_GROUP`, or per row where the unit takes no
    groups.
    """
    kind = _granularity(unit)
    width = next(wide for wide in widths(unit) if wide >= bits)  # names the format; bytes go by `bits`

    def change(matrix: Matrix) -> Matrix:
        if matrix.component != "values":
            return matrix
        group = matrix.group_size or NEW_GROUP
        return replace(matrix, format=f"int{width}{kind}", group_size=group, average_bits=bits)

    parts = tuple(replace(part, matrices=tuple(map(change, part.matrices))) for part in model.parts)
    return replace(model, parts=parts)


def without_layers(model: Model, count: int) -> Model:
    """Return the model without its `count` smallest blocks: what then fits, fits without any other `count` too."""

    def weights(part: Part) -> tuple[int, int]:  # bits, and the block's number for blocks of one size
        return sum(m.rows * m.cols * _width(m.format) for m in part.matrices), int(part.name.partition(".")[2])

    blocks = sorted((part for part in model.parts if part.is_block), key=weights)
    gone = {part.name for part in blocks[:count]}
    shape = replace(model.shape, layers=model.shape.layers - count)
    return replace(model, shape=shape, parts=tuple(part for part in model.parts if part.name not in gone))


def in_bf16(model: Model) -> Model:
    """Return the model as if it were stored in bf16, nothing quantised or pruned, without adapters."""

    def change(matrix: Matrix) -> Matrix:
        return Matrix(matrix.component, matrix.rows, matrix.cols, "bf16", looked_up=matrix.looked_up)

    def matrices(part: Part) -> tuple[Matrix, ...]:
        return tuple(change(matrix) for matrix in part.matrices if matrix.component != "adapter")

    return replace(model, parts=tuple(replace(part, matrices=matrices(part)) for part in model.parts))


def widths(unit: Unit) -> list[int]:
    """List the widths of the unit's integer codes, ascending: of those with scales per group, if it takes any."""
    return sorted(_width(name) for name in unit.formats if name.endswith(_granularity(unit)))


def held_bits(matrix: Matrix, unit: Unit) -> int:
    """Return the bits of one of the matrix's weights in memory."""
    return _width(nearest(matrix.format, unit.formats) or matrix.format)


def _granularity(unit: Unit) -> str:
    return "-group" if any(name.endswith("-group") for name in unit.formats) else "-channel"


def _groups(matrix: Matrix) -> int:
    return -(-matrix.cols // matrix.group_size) if matrix.group_size else 1


def _width(name: str) -> int:
    return FLOATS[name] if name in FLOATS else int(name.removeprefix("int").partition("-")[0])


def _flat(sizes: Mapping[tuple[str, bool], int]) -> Iterable[tuple[tuple[str, int], bool]]:
    return (((component, size), read) for (component, read), size in sizes.items())


def _bytes(elements: int, bits: int | Fraction) -> int:
    return -(-elements * bits // 8)  # rounded up, exactly for fractions of bits too
