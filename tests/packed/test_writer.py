"""Writing: the same bytes for the same content, and nothing where the content doesn't fit."""

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.packed import reader, source_folder
from tasks.packed.description import DESCRIPTION, FILE
from tasks.packed.digits import CODERS
from tasks.packed.stored_model import Linear
from tasks.packed.writer import save
from tests.support.packed_models import CASES, realistic


@pytest.mark.parametrize("coding", CODERS)
@pytest.mark.parametrize("case", CASES)
def test_saving_what_was_streamed_gives_the_same_bytes(build, tmp_path, case, coding):
    made = build(case)
    packed = made.packed if coding == "fixed" else made.coded
    save(source_folder.read(made.model, *made.parts), tmp_path / "again", coding)
    again = source_folder.read(made.model, *made.parts)
    again.blocks = (linears for _, linears in reader.stream(packed))
    save(again, tmp_path / "streamed", coding)
    for name in (FILE, DESCRIPTION):
        written = (packed / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes() == written
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [DESCRIPTION, FILE]


def replaced(**changed):
    """The demo's model with a change to its first linear."""
    model = realistic()
    name, linear = next(iter(model.blocks[0].items()))
    for key, value in changed.items():
        setattr(linear, key, value(linear) if callable(value) else value)
    return model, name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codes": lambda one: one.codes.fill_(3)}, "pruned weights of .* are not zero"),
        ({"keep": lambda one: one.keep.fill_(True)}, "don't keep exactly 2"),
        ({"keep": None}, "has the pattern 2:4 and no mask"),
        ({"pattern": "dense"}, "has the pattern dense and a mask"),
        ({"scales": lambda one: one.scales[:, :2]}, "the scales of .* are"),
        ({"scales": lambda one: one.scales.float()}, "float32, not float16"),
        ({"bias": torch.zeros(128)}, "has a bias where its config has none"),
        ({"adapter": (torch.zeros(2, 128), torch.zeros(2, 128))}, "has factors"),
        ({"codes": lambda one: one.codes[:, :64]}, "linears of block 0 are not those of the config"),
    ],
)
def test_linears_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path, changed, message):
    model, _ = replaced(**changed)
    with pytest.raises(InputError, match=message):
        save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_the_config_ties_and_one_that_is_missing_are_refused(tmp_path):
    model = realistic()
    model.head = model.embedding
    with pytest.raises(InputError, match="ties the head"):
        save(model, tmp_path / "out")
    model = realistic(tied=False)
    model.head = None
    with pytest.raises(InputError, match="ties the head"):
        save(model, tmp_path / "out")


def test_blobs_that_unpack_to_a_multiple_of_their_bytes_are_refused(tmp_path):
    model = realistic(embedding_bits=16)
    for block in model.blocks:
        for name, linear in block.items():
            empty = torch.zeros(linear.shape)
            block[name] = Linear(weight=empty.half(), keep=empty.bool(), pattern="unstructured")
    with pytest.raises(InputError, match="layers.0 in .* has 56 bytes for 196608 weights"):
        save(model, tmp_path)
