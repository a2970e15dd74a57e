"""Which matrices can be stored: asked of gptqmodel's own packers, a single linear at a time."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.quantisation import gptqmodel_library as library
from tasks.algorithms.quantisation import gptqmodel_settings, packable, unpacking

IN_USE, DEFAULT = "pack_original", "pack_block"
NAME = "model.layers.0.mlp.up_proj"


def comes_back(packer, shape, bits):
    """Pack a matrix of random codes, one group per row: whether the same values are unpacked."""
    rows, columns = shape
    kernel = library.torch_linear.TorchLinear(
        in_features=columns,
        out_features=rows,
        group_size=columns,
        bits=bits,
        sym=True,
        desc_act=False,
        bias=False,
        pack_dtype=torch.int32,
        adapter=None,
        register_buffers=True,
    )
    middle = 2 ** (bits - 1)
    linear = torch.nn.Linear(columns, rows, bias=False)
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(0))
    linear.weight.data = (codes - middle) * 0.5
    given = linear.weight.detach().clone()
    scales, zeros = torch.full((rows, 1), 0.5), torch.full((rows, 1), float(middle))
    getattr(kernel, packer)(linear=linear, scales=scales, zeros=zeros, g_idx=torch.zeros(columns, dtype=torch.int32))
    kernel.post_init()
    return torch.equal(unpacking.dequantised(kernel), given)


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """gptqmodel's default packer has a path in Python, too, after the same checks."""
    monkeypatch.setenv("GPTQMODEL_DISABLE_PACK_EXT", "1")


def test_the_packer_in_use_is_the_one_that_is_asked_here():
    chosen = gptqmodel_settings.config(4, 32, symmetric=True, damp=0.05, act_order="none")
    assert chosen.pack_impl == IN_USE.removeprefix("pack_")


@pytest.mark.parametrize("packer", [IN_USE, DEFAULT])
@pytest.mark.parametrize("bits", packable.WIDTHS)
@pytest.mark.parametrize("shape", [(32, 32), (32, 96), (64, 32)])
def test_what_is_admitted_comes_back_from_both_packers(packer, bits, shape):
    assert packable.refusal({NAME: shape}) is None
    assert comes_back(packer, shape, bits)


@pytest.mark.parametrize(("packer", "bits"), [(IN_USE, 3), *((DEFAULT, bits) for bits in packable.WIDTHS)])
@pytest.mark.parametrize("turned", [False, True])
def test_every_side_that_is_refused_is_refused_by_a_packer(packer, bits, turned):
    """No stricter than gptqmodel: all sides up to two blocks, as outputs and as inputs."""
    for side in range(1, 65):
        shape = (side, 64) if turned else (64, side)
        if packable.refusal({NAME: shape}):
            with pytest.raises((ValueError, IndexError), match="divisible by 32|out of bounds"):
                comes_back(packer, shape, bits)
        else:
            assert comes_back(packer, shape, bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_packer_in_use_would_take_more_at_other_widths_than_3(bits):
    """What is given up for one rule: gptqmodel's default packer, and its fixed blocks, are not in use."""
    assert packable.refusal({NAME: (48, 40)}) and comes_back(IN_USE, (48, 40), bits)


@pytest.mark.parametrize(
    ("shape", "group_size", "message"),
    [
        ((64, 96), 64, "96 inputs, not divisible by gptq.group_size = 64: choose a divisor or -1"),
        ((64, 40), -1, "packs 32 rows and columns at a time, but .*up_proj is 64 x 40; switch gptq and eora off"),
        ((20, 64), -1, "packs 32 rows and columns at a time, but .*up_proj is 20 x 64"),
    ],
)
def test_matrices_that_do_not_pack_are_refused(shape, group_size, message):
    with pytest.raises(InputError, match=message):
        packable.check({"other": (32, 64), NAME: shape}, group_size)


def test_it_needs_no_torch():
    found = "[name for name in ('torch', 'numpy') if name in sys.modules]"
    code = f"import sys, tasks.algorithms.quantisation.packable; print({found})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
