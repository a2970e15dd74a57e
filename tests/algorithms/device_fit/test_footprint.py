"""Bytes in memory and operations of a two-layer model, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from tasks.algorithms.device_fit import footprint
from tasks.algorithms.device_fit.footprint import Matrix, Model, Part, Unit, Workload
from tasks.algorithms.model.shape import shape_of_config

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "max_position_embeddings": 64,
}
SHAPE = shape_of_config(CONFIG)
WORK = Workload(context=10, batch=1, kv_bits=16, activation_bits=16)
UNIT = Unit({"int4-group": "int8", "fp16": "fp16"}, {"int8": 1_000_000, "fp16": 500_000})
SPARSE = replace(UNIT, saves_bytes=frozenset({(2, 4)}), saves_time=frozenset({(2, 4)}))
BLOCK_WEIGHTS = 2 * 8 * 8 + 2 * 4 * 8 + 3 * 8 * 12


def two_layers(named: str = "int4-group", group: int = 4, pattern: tuple[int, int] | None = None) -> Model:
    """The config's model: linears in one format, an fp16 embedding that is the head, fp16 norms."""
    linears = tuple(Matrix("values", rows, cols, named, group, pattern) for rows, cols in SHAPE.linears.values())
    blocks = tuple(Part(f"layers.{index}", linears, 2 * 8 * 2) for index in range(2))
    table = Part("embedding", (Matrix("embedding", 20, 8, "fp16"),))
    stored = {"values": 2 * BLOCK_WEIGHTS // 4, "positions": 50}
    return Model(SHAPE, (*blocks, table, Part("norms", norms=16)), 100, 1000, stored)


def by_component(model: Model, unit: Unit) -> dict[str, int]:
    found: dict[str, int] = {}
    for held in footprint.hold(model, unit):
        found[held.component] = found.get(held.component, 0) + held.bytes
    return found


def test_cache_activations_and_scratch_by_hand() -> None:
    # KV: keys and values, 2 layers, 1 kv head of 4, 10 tokens, 2 bytes
    assert footprint.kv_cache_bytes(SHAPE, WORK) == 2 * 2 * 1 * 4 * 10 * 2 == 320
    # attention 8 + 8 + 4 + 4 + 2 * 10 + 8 = 52; mlp 8 + 12 + 12 = 32; head 8 + 20 = 28; residual 8
    assert footprint.activation_bytes(SHAPE, WORK) == (8 + 52) * 2
    # without a context the mlp is the widest: 8 + 32 against 8 + 34 at one token
    assert footprint.activation_bytes(SHAPE, replace(WORK, context=1)) == (8 + 34) * 2
    assert footprint.activation_bytes(replace(SHAPE, vocabulary=100), WORK) == (8 + 108) * 2
    # two rows of 12 inputs at 2 bytes, 12 sums at 4
    assert footprint.scratch_bytes(SHAPE, WORK) == 2 * 12 * 2 + 12 * 4 == 96


@pytest.mark.parametrize(("bits", "factor"), [(4, 0.25), (8, 0.5), (16, 1), (32, 2)])
def test_kv_bits_and_batch_scale_the_cache(bits: int, factor: float) -> None:
    assert footprint.kv_cache_bytes(SHAPE, replace(WORK, kv_bits=bits, batch=3)) == 320 * factor * 3


def test_bytes_in_memory_by_hand() -> None:
    assert by_component(two_layers(), UNIT) == {
        "values": 2 * BLOCK_WEIGHTS // 2,
        "scales": 2 * BLOCK_WEIGHTS // 4 * 2,
        "norms": 2 * 32 + 16,
        "embedding": 20 * 8 * 2,
        "metadata": 100,
    }


def test_zeros_save_bytes_only_where_the_unit_has_a_use_for_them() -> None:
    dense, pruned = two_layers(), two_layers(pattern=(2, 4))
    assert by_component(pruned, UNIT) == by_component(dense, UNIT)
    held = by_component(pruned, SPARSE)
    assert held["values"] == 2 * BLOCK_WEIGHTS // 2 // 2  # half of the codes
    assert held["positions"] == 2 * BLOCK_WEIGHTS // 2 * 2 // 8  # two bits for each that is kept
    other = replace(SPARSE, saves_bytes=frozenset({(1, 4)}))
    assert by_component(pruned, other) == by_component(dense, UNIT)


def test_zero_points_and_act_order_take_bytes() -> None:
    plain = Matrix("values", 4, 8, "int4-group", 4)
    assert footprint.matrix_bytes(plain, UNIT) == {"values": 16, "scales": 4 * 2 * 2}
    more = replace(plain, zero_points=True, ordered=True)
    assert footprint.matrix_bytes(more, UNIT) == {"values": 16, "scales": 16 + 8 * 4, "zeros": 4}
    adapter = replace(plain, component="adapter")
    assert footprint.matrix_bytes(adapter, UNIT) == {"adapter": 32}


@pytest.mark.parametrize(
    ("name", "supported", "held"),
    [
        ("int4-group", ("int4-group", "int8-group"), "int4-group"),
        ("int3-group", ("int4-group", "int8-group"), "int4-group"),
        ("int4-channel", ("int4-group", "int8-channel"), "int4-group"),
        ("int4-group", ("int2-channel", "int4-channel", "int8-channel"), "int8-channel"),
        ("int3-channel", ("int2-channel", "int4-channel", "int8-channel"), "int4-channel"),
        ("int8-group", ("int4-group", "fp16", "fp32"), "fp16"),
        ("bf16", ("fp32", "fp16", "int8-channel"), "fp16"),
        ("fp32", ("fp16", "int8-channel"), None),
        ("int8-group", ("int4-channel",), None),
    ],
)
def test_the_nearest_format(name: str, supported: tuple[str, ...], held: str | None) -> None:
    assert footprint.nearest(name, supported) == held


def test_an_unpacked_format_counts_at_its_width() -> None:
    channels = Unit({"int8-channel": "int8", "fp16": "int8"}, {"int8": 1})
    found = by_component(two_layers(), channels)
    rows = 2 * (8 + 4 + 4 + 8 + 12 + 12 + 8)
    assert (found["values"], found["scales"]) == (2 * BLOCK_WEIGHTS, 2 * rows)
    nothing = Unit({"int2-channel": "int8"}, {"int8": 1})
    assert by_component(two_layers("fp32", 0), nothing)["values"] == 2 * BLOCK_WEIGHTS * 4


def test_operations_equal_the_matrices_of_a_block() -> None:
    attention = 2 * (2 * 8 * 10 + 2 * 8 * 10)  # per layer: scores and mixing, a multiply and an add per query element
    found = footprint.operations(two_layers(), UNIT, WORK)
    assert found == {"int8": 2 * 2 * BLOCK_WEIGHTS, "fp16": 2 * 20 * 8 + attention}
    sparse = footprint.operations(two_layers(pattern=(2, 4)), SPARSE, WORK)
    assert sparse == {"int8": 2 * BLOCK_WEIGHTS, "fp16": 2 * 20 * 8 + attention}


def test_a_table_that_is_looked_up_in_costs_a_row() -> None:
    model = two_layers()
    embedding = Part("embedding", (Matrix("embedding", 20, 8, "fp16", looked_up=True),))
    untied = replace(model, parts=(*model.parts[:2], embedding, Part("head", model.parts[2].matrices), model.parts[3]))
    assert footprint.row_bytes(model, UNIT) == 0
    assert footprint.row_bytes(untied, UNIT) == 8 * 2
    assert footprint.operations(untied, UNIT, WORK) == footprint.operations(model, UNIT, WORK)
    unread = [held for held in footprint.hold(untied, UNIT) if not held.read]
    assert {held.component: held.bytes for held in unread} == {"embedding": 320, "metadata": 100}


def test_fewer_bits_are_counted_as_an_average() -> None:
    unit = replace(UNIT, formats={"int2-group": "int8", "int4-group": "int8", "fp16": "fp16"})
    found = by_component(footprint.with_bits(two_layers(), Fraction(31, 10), unit), unit)
    per_block = [rows * cols for rows, cols in SHAPE.linears.values()]
    assert found["values"] == 2 * sum(-(-n * 31 // 80) for n in per_block)
    assert found["scales"] == by_component(two_layers(), unit)["scales"]
    floats = footprint.with_bits(two_layers("fp16", 0), Fraction(4), unit)
    assert {m.group_size for m in floats.matrices() if m.component == "values"} == {footprint.NEW_GROUP}


def test_the_blocks_with_the_fewest_bits_go_first() -> None:
    model = two_layers()
    heavy = replace(model.parts[0], matrices=tuple(replace(m, format="fp16") for m in model.parts[0].matrices))
    uneven = replace(model, parts=(heavy, *model.parts[1:]))
    left = footprint.without_layers(uneven, 1)
    assert [part.name for part in left.parts] == ["layers.0", "embedding", "norms"]
    assert left.shape.layers == 1


def test_in_bf16() -> None:
    dense = footprint.in_bf16(two_layers(pattern=(2, 4)))
    assert {(m.format, m.pattern) for m in dense.matrices()} == {("bf16", None)}
