"""Layouts of descriptions: what a description says of each linear, and what doesn't fit its config."""

import math

import pytest

from tasks.algorithms.errors import InputError
from tasks.packed.description import HEAD, Coding, Description
from tasks.packed.layout import divisor, lay_out
from tests.support.packed_models import REALISTIC

LINEARS = 70  # ten blocks of seven


def described(**fields):
    """A description of the demo's shape."""
    settings = {"tied": True, "dtype": "F16", "bits": 4, "group_size": 32, "pattern": "2:4", "sha256": {}}
    return Description(**HEAD, config=REALISTIC, **settings | fields)


def no_code(*_):
    raise AssertionError("nothing is entropy coded here")


@pytest.mark.parametrize("length", [1, 7, 48, 97, 384, 2048])
def test_groups_have_the_largest_divisor(length):
    for group_size in range(1, length + 2):
        largest = max(size for size in range(1, length + 1) if length % size == 0 and size <= group_size)
        assert divisor(length, group_size) == largest


def test_one_value_is_the_same_as_one_for_each_linear():
    fields = {"bits": 3, "group_size": 16, "pattern": "4:8", "zeros": True, "order": True, "rank": 2}
    one, each = (lay_out(described(**chosen)) for chosen in (fields, {key: [fields[key]] * LINEARS for key in fields}))
    assert one.specs == each.specs
    assert {spec.group_size for block in one.specs for spec in block} == {16}


def test_a_linear_that_is_not_quantised_has_no_zero_points_and_no_order():
    layout = lay_out(described(bits=[None, *[4] * (LINEARS - 1)], zeros=True, order=True))
    specs = [spec for block in layout.specs for spec in block]
    assert [(spec.zeros, spec.order) for spec in specs] == [(False, False), *[(True, True)] * (LINEARS - 1)]


def test_sections_hold_their_information_and_little_more():
    coding = Coding(bits=4, group_size=64)
    layout = lay_out(described(rank=[0, 3] * (LINEARS // 2), adapter=(coding, coding), embedding=coding, zeros=True))
    assert layout.names == [*(f"layers.{block}" for block in range(10)), "embedding", "rest"]
    for blob in layout.names:
        for section in layout.sections(blob, no_code):
            assert section.bits / 8 - 1e-9 <= section.size < 1.06 * section.bits / 8 + 8
    embedding = list(layout.sections("embedding", no_code))
    assert [section.size for section in embedding] == [2048 * 128 // 2, 2048 * 2 * 2]
    norms = sum(section.size for section in layout.sections("rest", no_code))
    assert norms == 2 * sum(math.prod(shape) for shape in layout.rest.values()) == 2 * 21 * 128


def test_descriptions_that_do_not_fit_their_config_are_refused():
    for fields, message in (
        ({"bits": [4] * 3}, "has 3 entries in bits for 70 linears"),
        ({"tied": False}, "tied by the config or by the file"),
        ({"head": Coding(bits=4, group_size=32)}, "tied by the config or by the file"),
        ({"rank": 65}, "has rank 65, above the smaller side"),
        ({"pattern": "3:7"}, "128 inputs, not divisible by groups of 3:7"),
    ):
        with pytest.raises(InputError, match=message):
            lay_out(described(**fields))
