"""Tell whether a model fits a device's memories, how fast it could decode there at best, and what would make it fit.

A roofline (Williams, Waterman, Patterson, "Roofline", CACM 2009) for decoding one token at a time. Every token reads
all weights and the whole KV cache once, so for small batches the memories limit, not the arithmetic:

  bandwidth  bytes by the bandwidth of the memory they lie in, one memory after another, as each step of a token needs
             the one before. Weights that lie where they can't be read in place are streamed into a buffer ahead of
             their use, so their time runs beside the rest; it counts where it is longer. Where all that a token reads
             fits into the cache, it is read from there.
  compute    operations by the peak of the precision that they run in.

The longer of the two is the least time of a step. `FITS`: everything lies in memories that the unit reads in place.
`FITS_STREAMING`: weights that find no room there are read from storage for every token. `DOES_NOT_FIT`: neither.

What it does not do: no schedule, no cache but the last level's, no power, no latency of launches; code size is in a
tier's `reserved`. The speed is an upper limit, never a forecast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from tasks.algorithms.device_fit import footprint
from tasks.algorithms.device_fit.footprint import Held, Model, Unit, Workload
from tasks.algorithms.device_fit.placement import Placement, Tier, place
from tasks.algorithms.errors import InputError

FITS, STREAMS, FAILS = VERDICTS = ("FITS", "FITS_STREAMING", "DOES_NOT_FIT")
"""The verdicts, the best first."""
_KV_BITS = (16, 8, 4)
"""These widths of the KV cache are tried as ways to fit, the widest first."""


@dataclass(frozen=True)
class Storage:
    """A memory that the compute unit can't read in place; `buffer`: bytes of a read at full bandwidth."""

    tier: Tier
    buffer: int


@dataclass(frozen=True)
class Cache:
    """The last-level cache: it holds all that a token reads, whatever memory that lies in, if all of it fits."""

    name: str
    bytes: int
    bandwidth: int


@dataclass(frozen=True)
class Device:
    """The part of a device profile that the verdict needs; `margin` is the share of each tier that stays free."""

    name: str
    tiers: tuple[Tier, ...]
    unit: Unit
    margin: float
    storage: Storage | None = None
    cache: Cache | None = None


@dataclass(frozen=True)
class Place:
    """One memory and what was put there, in bytes; `over` is how far `used` exceeds `usable`.

    Attributes:
        items: weights, metadata, kv_cache, activations, scratch -> bytes.
        components: bytes of weights and metadata, by `footprint.COMPONENTS`.
        parts: which parts of the model lie there, as text.
    """

    tier: str
    capacity: int
    usable: int
    items: dict[str, int]
    components: dict[str, int]
    parts: str
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
    """The memory that takes most of the time of `bandwidth`."""


@dataclass(frozen=True)
class Way:
    """A single change that makes the model fit without streaming, all else being equal."""

    text: str
    parameter: str
    value: float


@dataclass(frozen=True)
class Fit:
    """The verdict, and the figures behind it.

    Attributes:
        limiting_term: "memories: item" that exceeds its room by most, or fills it to the largest share.
        bytes_over: bytes that found no room.
        headroom_bytes: bytes by which that item may still grow.
        weights_bytes: bytes of them in the device's memory, which is not what the file has; without `metadata_bytes`.
        activation_bytes: activations and scratch.
        capacity_bytes: usable in all memories that are read in place.
        streamed_bytes_per_token: read from storage in each step.
        seconds: "bandwidth" and "compute" of one step, a token of each sequence.
        components: bytes in memory by what they are for.
        ways_to_fit: each enough alone; empty where it fits, or where none is.
    """

    verdict: str
    limiting_term: str
    bytes_over: int
    headroom_bytes: int
    weights_bytes: int
    metadata_bytes: int
    kv_bytes: int
    activation_bytes: int
    total_bytes: int
    capacity_bytes: int
    streamed_bytes_per_token: int
    placement: list[Place]
    seconds: dict[str, float]
    tokens_per_second: Speed
    components: dict[str, int]
    notes: list[str]
    ways_to_fit: list[Way] = field(default_factory=list)


def judge(device: Device, model: Model, workload: Workload) -> Fit:
    """Put the model into the device's memories; where it doesn't fit, look for changes after which it does.

    Raises:
        InputError: the context is longer than the model's positions.
    """
    result = _judge(device, model, workload)
    return result if result.verdict == FITS else replace(result, ways_to_fit=ways(device, model, workload))


def ways(device: Device, model: Model, workload: Workload) -> list[Way]:
    """List single changes, the smallest of their kind, each tried: the model with it `FITS`."""

    def fits(changed: Model = model, **values: int) -> bool:
        return _judge(device, changed, replace(workload, **values)).verdict == FITS

    changes = []
    layers = _smallest(1, model.shape.layers - 1, lambda n: fits(footprint.without_layers(model, n)))
    if layers:
        changes.append(Way(f"-{layers} layer{'s' if layers > 1 else ''}", "layers", -layers))
    tenths = _fewer_bits(model, device.unit, fits)
    if tenths:
        changes.append(Way(f"{tenths / 10:.1f} bits per weight", "bits", tenths / 10))
    for name in ("context", "batch"):
        most = getattr(workload, name) - 1  # n less than now, for n from 1 on
        less = _smallest(1, most, lambda n, name=name, most=most: fits(**{name: most + 1 - n}))
        if less:
            changes.append(Way(f"{name} <= {most + 1 - less}", name, most + 1 - less))
    bits = next((bits for bits in _KV_BITS if bits < workload.kv_bits and fits(kv_bits=bits)), None)
    if bits:
        changes.append(Way(f"KV cache in {bits} bits", "kv_bits", bits))
    return changes


def _fewer_bits(model: Model, unit: Unit, fits: Callable[[Model], bool]) -> int | None:
    """Find the most tenths of a bit per weight of the blocks' linears with which it fits, fewer than it takes now."""
    widths = footprint.widths(unit)
    if not widths:
        return None
    linears = [matrix for matrix in model.matrices() if matrix.component == "values"]
    held = sum(footprint.held_bits(matrix, unit) * matrix.rows * matrix.cols for matrix in linears)
    now = Fraction(held, sum(matrix.rows * matrix.cols for matrix in linears))  # bits per weight
    # in tenths: the largest number below `now`, within the unit's narrowest and widest codes
    least, most = 10 * widths[0], min(10 * widths[-1], int(-(-now * 10 // 1)) - 1)
    less = _smallest(0, most - least, lambda n: fits(footprint.with_bits(model, Fraction(most - n, 10), unit)))
    return None if less is None else most - less


def _smallest(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """Find by bisection the smallest number from low to high for which it holds, as for all above; None: for none."""
    if high < low or not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def _judge(device: Device, model: Model, workload: Workload) -> Fit:
    if model.shape.context is not None and workload.context > model.shape.context:
        limit = f"{model.shape.family.keys.context} = {model.shape.context}"
        raise InputError(f"context = {workload.context} is above the model's {limit}; lower it")
    held = footprint.hold(model, device.unit)
    sizes = _sizes(held, model, workload)
    tiers, verdict = device.tiers, FITS
    placement = place(tiers, sizes, device.margin)
    if placement.over and device.storage:
        tiers, verdict = (*tiers, device.storage.tier), STREAMS
        sizes["scratch"] += 2 * device.storage.buffer  # one is computed with while the next is read
        placement = place(tiers, sizes, device.margin)
    places = _places(tiers, placement, held, device.margin)
    if device.storage and len(places) == len(device.tiers):
        tier = device.storage.tier
        places.append(Place(tier.name, tier.bytes, tier.usable(device.margin), {}, {}, "", 0, 0))
    seconds, tier = _bandwidth(device, tiers, placement, model, workload)
    operations = footprint.operations(model, device.unit, workload)
    # the compute roof: operations by the peak of their precision, one precision after the other
    compute = workload.batch * sum(float(n) / device.unit.rates[precision] for precision, n in operations.items())
    components = {name: sum(h.bytes for h in held if h.component == name) for name in footprint.COMPONENTS}
    return Fit(
        verdict=FAILS if placement.over else verdict,
        limiting_term=_term(tiers, placement),
        bytes_over=placement.over,
        headroom_bytes=placement.headroom,
        weights_bytes=sum(components.values()) - components["metadata"],
        metadata_bytes=components["metadata"],
        kv_bytes=sizes["kv_cache"],
        activation_bytes=sizes["activations"] + sizes["scratch"],
        total_bytes=sum(sizes.values()),
        capacity_bytes=sum(tier.usable(device.margin) for tier in device.tiers),
        streamed_bytes_per_token=_streamed(device, tiers, placement, model, workload),
        placement=places,
        seconds={"bandwidth": seconds, "compute": compute},
        tokens_per_second=_speed(workload.batch, seconds, compute, tier),
        components=components,
        notes=notes(device, model, workload, components),
    )


def _sizes(held: Sequence[Held], model: Model, workload: Workload) -> dict[str, int]:
    return {
        "scratch": footprint.scratch_bytes(model.shape, workload),
        "activations": footprint.activation_bytes(model.shape, workload),
        "kv_cache": footprint.kv_cache_bytes(model.shape, workload),
        "weights": sum(entry.bytes for entry in held if entry.read),
        "lookup": sum(entry.bytes for entry in held if not entry.read),
    }


def _term(tiers: Sequence[Tier], placement: Placement) -> str:
    item = placement.limiting[0]
    return f"{'+'.join(tiers[index].name for index in placement.tiers)}: {'metadata' if item == 'lookup' else item}"


def _places(tiers: Sequence[Tier], placement: Placement, held: Sequence[Held], margin: float) -> list[Place]:
    """Put the model's parts into the room that the placement gives its weights, in the order of the model."""
    waiting = {"weights": [part for part in held if part.read], "lookup": [part for part in held if not part.read]}
    places = []
    for tier, items in zip(tiers, placement.held, strict=True):
        taken = [part for item in waiting for part in _take(waiting[item], items.get(item, 0))]
        components = {
            name: sum(part.bytes for part in taken if part.component == name) for name in footprint.COMPONENTS
        }
        shown = {item: size for item, size in items.items() if item not in waiting}
        weights = sum(components.values()) - components["metadata"]
        shown |= {name: n for name, n in (("weights", weights), ("metadata", components["metadata"])) if n}
        used, usable = sum(items.values()), tier.usable(margin)
        components = {name: size for name, size in components.items() if size}
        over = max(0, used - usable)
        places.append(Place(tier.name, tier.bytes, usable, shown, components, _parts(taken, held), used, over))
    return places


def _take(waiting: list[Held], size: int) -> list[Held]:
    """Take the first `size` bytes out of the list; the entry at the border is split."""
    taken = []
    while size:
        first = waiting.pop(0)
        if first.bytes > size:
            waiting.insert(0, replace(first, bytes=first.bytes - size))
            first = replace(first, bytes=size)
        taken.append(first)
        size -= first.bytes
    return taken


def _parts(taken: Sequence[Held], held: Sequence[Held]) -> str:
    """Write "layers.0 to layers.4, layers.5 (38%), norms": whole parts, and shares of those that are split."""
    whole, here = ({}, {})
    for sizes, entries in ((whole, held), (here, taken)):
        for entry in entries:
            sizes[entry.part] = sizes.get(entry.part, 0) + entry.bytes
    texts: list[str] = []
    first = last = None
    for name in here:
        complete = here[name] == whole[name]
        index = int(name.partition(".")[2]) if name.startswith("layers.") and complete else None
        if index is not None and last is not None and index == last + 1:
            texts[-1] = f"layers.{first} to layers.{index}"
        else:
            first = index
            texts.append(name if complete else f"{name} ({here[name] / whole[name]:.0%})")
        last = index
    return ", ".join(texts)


def _streamed(device: Device, tiers: Sequence[Tier], placement: Placement, model: Model, workload: Workload) -> int:
    """Count the bytes that a step reads from storage."""
    if len(tiers) == len(device.tiers):
        return 0
    last = placement.held[-1]
    rows = workload.batch * footprint.row_bytes(model, device.unit) if "lookup" in last else 0  # a row per sequence
    return last.get("weights", 0) + min(rows, last.get("lookup", 0))


def _bandwidth(
    device: Device, tiers: Sequence[Tier], placement: Placement, model: Model, workload: Workload
) -> tuple[float, str]:
    """Return the seconds that a step's reads take, and the memory that takes most of them."""
    rows = workload.batch * footprint.row_bytes(model, device.unit)
    reads = [items.get("weights", 0) + items.get("kv_cache", 0) for items in placement.held]  # bytes per tier
    # rows are looked up in the last memory that has any of the tables
    home = max((index for index, items in enumerate(placement.held) if "lookup" in items), default=0)
    reads[home] += min(rows, placement.held[home].get("lookup", 0))
    streamed = reads.pop() if len(tiers) > len(device.tiers) else 0
    if streamed:  # what comes from storage is read once more, out of the buffer
        buffer = next(index for index, items in enumerate(placement.held) if "scratch" in items)
        reads[buffer] += streamed
    working = sum(reads) + sum(items.get(i, 0) for items in placement.held for i in ("activations", "scratch"))
    if device.cache and working <= device.cache.bytes and not streamed:
        return sum(reads) / device.cache.bandwidth, device.cache.name
    # the bandwidth roof: bytes by bandwidth, one memory after the other; storage runs beside them
    seconds = {tier.name: read / tier.bandwidth for tier, read in zip(device.tiers, reads, strict=True)}
    in_place = sum(seconds.values())
    if streamed and streamed / device.storage.tier.bandwidth > in_place:
        return streamed / device.storage.tier.bandwidth, device.storage.tier.name
    return in_place, max(seconds, key=lambda name: seconds[name])


def _speed(batch: int, bandwidth: float, compute: float, tier: str) -> Speed:
    # the roofline: the longer of the two is the least time of a step of `batch` tokens
    limited_by = "bandwidth" if bandwidth >= compute else "compute"
    return Speed(batch / max(bandwidth, compute), batch / bandwidth, batch / compute, limited_by, tier)


def notes(device: Device, model: Model, workload: Workload, components: Mapping[str, int]) -> list[str]:
    """Say what the bytes alone don't show: formats the unit can't take, zeros it has no use for."""
    unit, matrices = device.unit, list(model.matrices())
    texts = _format_notes(device, sorted({matrix.format for matrix in matrices}))
    patterns = {matrix.pattern for matrix in matrices if matrix.pattern}
    texts += [_pattern_note(device, pattern, model, components) for pattern in sorted(patterns)]
    if any(matrix.unstructured for matrix in matrices):
        texts.append(f"zeros without an N:M pattern save neither bytes nor time on {device.name}")
    precisions = {footprint.precision_of(matrix, unit) for matrix in matrices}
    if "int8" in precisions and workload.activation_bits > 8:
        texts.append(
            f"{device.name} multiplies these weights in int8: activations of {workload.activation_bits} bits are "
            "rounded to 8 on the way"
        )
    return [note for note in texts if note]


def _format_notes(device: Device, names: Sequence[str]) -> list[str]:
    """Write one note for all formats that are held in the same other one, and one for those that nothing holds."""
    homes: dict[tuple[str | None, bool], list[str]] = {}  # (held in, scales merged per row) -> formats
    for name in names:
        held = footprint.nearest(name, device.unit.formats)
        merged = name.endswith("-group") and held is not None and held.endswith("-channel")
        if held != name:
            homes.setdefault((held, merged), []).append(name)
    texts = []
    for (held, merged), some in homes.items():
        formats = " and ".join(some)
        if held is None:
            texts.append(
                f"{device.name} computes with nothing as wide as {formats}: those weights are counted as they are, and "
                "would have to be quantised to run"
            )
            continue
        lost = "; the scales of groups become one per row, which quantises again and is in no perplexity here"
        texts.append(
            f"{device.name} doesn't compute with {formats}: those weights are unpacked to {held} in memory"
            f"{lost if merged else ''}"
        )
    return texts


def _pattern_note(device: Device, pattern: tuple[int, int], model: Model, components: Mapping[str, int]) -> str | None:
    """Say where a pattern saves nothing, or only one of time and bytes."""
    bytes_, time = (pattern in saved for saved in (device.unit.saves_bytes, device.unit.saves_time))
    keep, of = pattern
    named = f"{keep} kept of {of} ({float(1 - Fraction(keep, of)):.0%} zeros)"
    stored = model.stored_components.get("values", 0) + model.stored_components.get("positions", 0)
    if bytes_ and time:
        return None
    if bytes_:
        return f"{device.name} skips no zeros of {named}: they save bytes, but no time"
    kept = f"in memory are all {components['values']:,} bytes of codes, where the file has {stored:,} with positions"
    if time:
        return f"{device.name} skips the zeros of {named}, but holds them: {kept}"
    return f"{device.name} has no use for the zeros of {named}: they save neither bytes nor time; {kept}"
