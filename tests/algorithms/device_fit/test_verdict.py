"""The verdict against closed forms: the roofline by hand, streaming, and ways to fit that are judged again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest

from tasks.algorithms.device_fit import footprint, verdict
from tasks.algorithms.device_fit.footprint import Matrix, Model, Part, Workload
from tasks.algorithms.device_fit.placement import Tier
from tasks.algorithms.device_fit.verdict import Cache, Device, Fit, Storage, judge
from tasks.algorithms.errors import InputError
from tests.algorithms.device_fit.test_footprint import BLOCK_WEIGHTS, SHAPE, SPARSE, UNIT, WORK, two_layers

ROM = Tier("rom", 4000, 0, 1000, frozenset({"weights", "lookup"}))
RAM = Tier("ram", 10000, 0, 500, frozenset({"kv_cache", "activations", "scratch"}))
DEVICE = Device("toy", (ROM, RAM), UNIT, 0.1)
WEIGHTS = BLOCK_WEIGHTS * 2 // 2 + BLOCK_WEIGHTS * 2 // 2 + 80 + 320
"""Codes, scales, norms and embedding of `two_layers` in memory."""
EVERYWHERE = frozenset(ROM.holds | RAM.holds)


def with_rom(size: int, margin: float = 0.1, **changes: object) -> Device:
    return replace(DEVICE, tiers=(replace(ROM, bytes=size), RAM), margin=margin, **changes)


def text(result: Fit) -> str:
    return " | ".join(result.notes)


@pytest.mark.parametrize(("over", "verdict"), [(0, "FITS"), (1, "DOES_NOT_FIT")])
def test_the_margins_exact_byte(over: int, verdict: str) -> None:
    size = (WEIGHTS + 100 - over) * 10 // 9
    device = with_rom(size + 1 if (size * 9) // 10 < WEIGHTS + 100 - over else size)
    result = judge(device, two_layers(), WORK)
    assert (result.verdict, result.bytes_over, result.headroom_bytes) == (verdict, over, 0)
    assert result.limiting_term == "rom: weights"
    assert (result.weights_bytes, result.metadata_bytes) == (WEIGHTS, 100)
    assert result.placement[0].items == {"weights": WEIGHTS, "metadata": 100}
    assert result.placement[0].components == {name: n for name, n in result.components.items() if n}
    assert result.placement[0].parts == "layers.0 to layers.1, embedding, norms, metadata"


def test_what_is_said_adds_up() -> None:
    result = judge(DEVICE, two_layers(), WORK)
    assert result.total_bytes == WEIGHTS + 100 + 320 + 120 + 96
    assert (result.kv_bytes, result.activation_bytes, result.capacity_bytes) == (320, 120 + 96, 3600 + 9000)
    assert result.total_bytes == sum(place.used for place in result.placement)
    assert result.limiting_term == "rom: weights" and result.headroom_bytes == 3600 - WEIGHTS - 100
    assert result.ways_to_fit == []


def test_the_kv_cache_can_be_what_does_not_fit() -> None:
    result = judge(DEVICE, two_layers(), replace(WORK, batch=30))
    used = 30 * 320 + 30 * 120 + 48 + 30 * 48
    assert (result.verdict, result.limiting_term, result.bytes_over) == ("DOES_NOT_FIT", "ram: kv_cache", used - 9000)


def test_more_context_never_helps() -> None:
    results = [judge(DEVICE, two_layers(), replace(WORK, context=context)) for context in range(1, 65)]
    used = [result.total_bytes for result in results]
    speed = [result.tokens_per_second.bound for result in results]
    assert used == sorted(used) and used[0] < used[-1]
    assert speed == sorted(speed, reverse=True)


def test_bandwidth_bound_by_hand() -> None:
    # weights at 1000 bytes/s, then 320 of KV at 500: one memory after another
    result = judge(DEVICE, two_layers(), WORK)
    assert result.seconds["bandwidth"] == pytest.approx(WEIGHTS / 1000 + 320 / 500)
    speed = result.tokens_per_second
    assert (speed.bound, speed.limited_by, speed.tier) == (speed.bandwidth, "bandwidth", "rom")
    assert speed.bound == pytest.approx(1 / result.seconds["bandwidth"])
    # two sequences share one read of the weights
    twice = judge(DEVICE, two_layers(), replace(WORK, batch=2))
    assert twice.tokens_per_second.bandwidth == pytest.approx(2 / (WEIGHTS / 1000 + 640 / 500))


def test_compute_bound_per_precision_and_skipped_zeros() -> None:
    rates = {"int8": 100, "fp16": 50}
    slow = replace(DEVICE, unit=replace(UNIT, rates=rates))
    floats = (2 * 160 + 640) / 50
    assert judge(slow, two_layers(), WORK).seconds["compute"] == pytest.approx(4 * BLOCK_WEIGHTS / 100 + floats)
    dense = judge(slow, two_layers(), WORK).tokens_per_second
    assert dense.limited_by == "compute" and dense.bound == dense.compute
    pruned = two_layers(pattern=(2, 4))
    assert judge(slow, pruned, WORK).tokens_per_second == dense
    sparse = judge(replace(slow, unit=replace(SPARSE, rates=rates)), pruned, WORK)
    assert sparse.seconds["compute"] == pytest.approx(2 * BLOCK_WEIGHTS / 100 + floats)


def test_rooflines_are_monotone() -> None:
    model, before = two_layers(), judge(DEVICE, two_layers(), WORK).tokens_per_second
    for index in range(2):
        tiers = [replace(t, bandwidth=2 * t.bandwidth) if i == index else t for i, t in enumerate(DEVICE.tiers)]
        assert judge(replace(DEVICE, tiers=tuple(tiers)), model, WORK).tokens_per_second.bandwidth > before.bandwidth
    for precision, rate in UNIT.rates.items():
        faster = replace(UNIT, rates=UNIT.rates | {precision: 2 * rate})
        assert judge(replace(DEVICE, unit=faster), model, WORK).tokens_per_second.compute > before.compute
    larger = judge(with_rom(10**6), two_layers("fp16", 0), WORK).tokens_per_second
    assert larger.bandwidth < before.bandwidth


def test_the_cache_is_read_from_when_all_fits() -> None:
    working = WEIGHTS + 320 + 120 + 96
    for size, name in ((working, "l3"), (working - 1, "rom")):
        result = judge(replace(DEVICE, cache=Cache("l3", size, 8000)), two_layers(), WORK)
        assert result.tokens_per_second.tier == name
        assert (result.seconds["bandwidth"] == pytest.approx((WEIGHTS + 320) / 8000)) == (name == "l3")
        assert result.capacity_bytes == 12600


FLASH = Storage(Tier("flash", 10**6, 0, 10, frozenset({"weights", "lookup"})), 50)


def test_what_finds_no_room_is_streamed() -> None:
    small = Device("toy", (Tier("ram", 1500, 0, 500, EVERYWHERE),), UNIT, 0.0, FLASH)
    result = judge(small, two_layers(), WORK)
    other = 320 + 120 + 96 + 2 * 50
    assert result.verdict == "FITS_STREAMING" and result.bytes_over == 0
    assert result.streamed_bytes_per_token == WEIGHTS - (1500 - other)
    assert result.placement[1].items["weights"] == result.streamed_bytes_per_token
    assert result.placement[1].items["metadata"] == 100
    assert result.seconds["bandwidth"] == pytest.approx(result.streamed_bytes_per_token / 10)
    assert result.tokens_per_second.tier == "flash"
    fast = replace(small, storage=replace(FLASH, tier=replace(FLASH.tier, bandwidth=10**9)))
    # all weights are read from the memory, those that are streamed after they were copied there
    assert judge(fast, two_layers(), WORK).seconds["bandwidth"] == pytest.approx((WEIGHTS + 320) / 500)
    assert judge(replace(small, storage=None), two_layers(), WORK).verdict == "DOES_NOT_FIT"


def test_only_a_row_of_a_streamed_lookup_table_is_read() -> None:
    model = two_layers()
    embedding = Part("embedding", (Matrix("embedding", 20, 8, "fp16", looked_up=True),))
    model = replace(model, parts=(*model.parts[:2], embedding, Part("head", model.parts[2].matrices), model.parts[3]))
    room = WEIGHTS + 320 + 120 + 96 + 100
    device = Device("toy", (Tier("ram", room, 0, 500, EVERYWHERE),), UNIT, 0.0, FLASH)
    result = judge(device, model, WORK)
    assert (result.verdict, result.streamed_bytes_per_token) == ("FITS_STREAMING", 8 * 2)
    assert result.placement[1].parts == "embedding, metadata"


def test_storage_holds_no_cache() -> None:
    device = Device("toy", (Tier("ram", 500, 0, 500, EVERYWHERE),), UNIT, 0.0, FLASH)
    result = judge(device, two_layers(), WORK)
    assert result.verdict == "DOES_NOT_FIT" and result.limiting_term == "ram: kv_cache"
    assert result.bytes_over == 320 + 120 + 96 + 100 - 500


def test_more_memory_never_worsens_a_verdict() -> None:
    ranks = []
    for size in range(300, 6000, 150):
        device = Device("toy", (Tier("ram", size, 0, 500, EVERYWHERE),), UNIT, 0.1, FLASH)
        ranks.append(verdict.VERDICTS.index(judge(device, two_layers(), WORK).verdict))
    assert ranks == sorted(ranks, reverse=True) and set(ranks) == {0, 1, 2}
    with_storage = [judge(with_rom(n, storage=FLASH), two_layers(), WORK).verdict for n in (100, 4000)]
    assert with_storage == ["FITS_STREAMING", "FITS"]


def changed(parameter: str, value: float, model: Model, workload: Workload, device: Device) -> tuple[Model, Workload]:
    """The model and workload with a way's change."""
    changes: dict[str, Callable[[], tuple[Model, Workload]]] = {
        "layers": lambda: (footprint.without_layers(model, int(-value)), workload),
        "bits": lambda: (footprint.with_bits(model, Fraction(str(value)), device.unit), workload),
    }
    return changes.get(parameter, lambda: (model, replace(workload, **{parameter: int(value)})))()


STEPS = {"layers": -1, "bits": 0.1, "context": 1, "batch": 1}
WAYS = {
    "a layer less": (with_rom(1200), WORK, {"layers": -1}),
    "fewer bits": (with_rom(1400), WORK, {"layers": -1, "bits": 2.2}),
    "a shorter context": (
        replace(DEVICE, tiers=(ROM, replace(RAM, bytes=1200))),
        replace(WORK, context=40),
        {"layers": -1, "context": 25, "kv_bits": 8},
    ),
    "fewer sequences": (replace(DEVICE, tiers=(ROM, replace(RAM, bytes=2000))), replace(WORK, batch=4), {"batch": 3}),
}


@pytest.mark.parametrize("name", WAYS)
def test_each_way_to_fit_is_enough_alone_and_the_smallest(name: str) -> None:
    device, workload, expected = WAYS[name]
    formats = {f"int{bits}-group": "int8" for bits in (2, 4)} | {"fp16": "fp16"}
    device = replace(device, unit=replace(UNIT, formats=formats))
    model = two_layers()
    result = judge(device, model, workload)
    assert result.verdict == "DOES_NOT_FIT"
    found = {way.parameter: way.value for way in result.ways_to_fit}
    assert expected.items() <= found.items()
    for parameter, value in found.items():
        assert judge(device, *changed(parameter, value, model, workload, device)).verdict == "FITS"
        less = round(value + {"layers": 1}.get(parameter, STEPS.get(parameter, 0)), 1)
        if parameter in STEPS and (parameter != "layers" or less < 0):
            assert judge(device, *changed(parameter, less, model, workload, device)).verdict == "DOES_NOT_FIT"


def test_ways_are_told_in_words_and_there_may_be_none() -> None:
    device = with_rom(1400, unit=replace(UNIT, formats={"int2-group": "int8", "int4-group": "int8", "fp16": "fp16"}))
    assert [way.text for way in judge(device, two_layers(), WORK).ways_to_fit] == ["-1 layer", "2.2 bits per weight"]
    assert judge(with_rom(100), two_layers(), WORK).ways_to_fit == []
    # where the unit takes no narrower codes, fewer bits save nothing
    assert [way.parameter for way in judge(with_rom(1400), two_layers(), WORK).ways_to_fit] == ["layers"]


def test_a_model_that_streams_is_told_what_would_fit_without() -> None:
    result = judge(with_rom(1400, storage=FLASH), two_layers(), WORK)
    assert result.verdict == "FITS_STREAMING"
    assert [way.text for way in result.ways_to_fit] == ["-1 layer"]


def test_notes_on_formats_zeros_and_activations() -> None:
    assert "use for the zeros of 2 kept of 4 (50% zeros)" in text(judge(DEVICE, two_layers(pattern=(2, 4)), WORK))
    codes = BLOCK_WEIGHTS * 2 // 2
    assert f"all {codes:,} bytes of codes, where the file has {codes // 2 + 50:,}" in text(
        judge(DEVICE, two_layers(pattern=(2, 4)), WORK)
    )
    assert "zeros" not in text(judge(replace(DEVICE, unit=SPARSE), two_layers(pattern=(2, 4)), WORK))
    for kind, said in (("saves_time", "save bytes, but no time"), ("saves_bytes", "skips the zeros")):
        half = replace(SPARSE, **{kind: frozenset()})
        assert said in text(judge(replace(DEVICE, unit=half), two_layers(pattern=(2, 4)), WORK))
    channels = replace(UNIT, formats={"int8-channel": "int8", "fp16": "fp16"})
    found = text(judge(replace(DEVICE, unit=channels), two_layers(), WORK))
    assert "int4-group: those weights are unpacked to int8-channel in memory; the scales of groups" in found
    integers = replace(UNIT, formats={"int4-group": "int8"})
    assert "nothing as wide as fp16" in text(judge(replace(DEVICE, unit=integers), two_layers(), WORK))
    assert "rounded to 8" in text(judge(DEVICE, two_layers(), WORK))
    assert "rounded to 8" not in text(judge(DEVICE, two_layers(), replace(WORK, activation_bits=8)))
    unstructured = replace(
        two_layers(), parts=(Part("layers.0", (Matrix("values", 8, 8, "fp16", unstructured=True),)),)
    )
    assert "without an N:M pattern" in text(judge(DEVICE, unstructured, WORK))


def test_context_above_the_models_positions() -> None:
    with pytest.raises(InputError, match="65 .*max_position_embeddings = 64"):
        judge(DEVICE, two_layers(), replace(WORK, context=SHAPE.context + 1))


def test_parts_that_are_split_say_how_much() -> None:
    tiers = (replace(ROM, bytes=1000), replace(ROM, name="slow", bandwidth=10), RAM)
    result = judge(replace(DEVICE, tiers=tiers), two_layers(), WORK)
    layer = BLOCK_WEIGHTS + 32
    assert result.placement[0].parts == f"layers.0, layers.1 ({(900 - layer) / layer:.0%})" or result.placement[
        0
    ].parts.startswith("layers.0 (")
    assert sum(place.components.get("values", 0) for place in result.placement) == result.components["values"]
