"""The bytes of safetensors files: by their content alone, and read by the library as it writes them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tasks.models import tensor_files


def test_bytes_depend_on_content_alone_and_the_library_reads_them(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.zeros(0, dtype=torch.int32)}
    metadata = {name: f"ä {name}" for name in "zyxwvutsrq"}
    for run in range(5):
        tensor_files.save_tensors(tmp_path / str(run), tensors, metadata)
    assert len({(tmp_path / str(run)).read_bytes() for run in range(5)}) == 1
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("b"), tensors["b"]) and file.get_tensor("a").dtype == torch.int32
    content = (tmp_path / "0").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(metadata)


def every_type():
    return {
        f"ü{place}.{name}": torch.arange(24, dtype=torch.float32).view(4, 6).to(dtype)[:, : 1 + place % 6]
        for place, (name, dtype) in enumerate(sorted(tensor_files.DTYPES.items()))
    }


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_the_bytes_are_the_library_s(metadata, tmp_path):
    tensors = every_type() | {"scalar": torch.tensor(3.0), "none": torch.zeros(0, 4), "odd": torch.ones(3).bool()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata)
    tensor_files.save_tensors(tmp_path / "ours", tensors, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_may_come_in_any_order(tmp_path):
    tensors = every_type()
    tensor_files.save_tensors(tmp_path / "at once", tensors, {})
    entries = {name: tensor_files.entry(tensor.to("meta")) for name, tensor in tensors.items()}
    with tensor_files.writing(tmp_path / "one by one", entries, {}) as write:
        for name in sorted(tensors, key=hash):
            write(name, tensors[name])
    assert (tmp_path / "one by one").read_bytes() == (tmp_path / "at once").read_bytes()


@pytest.mark.parametrize("given", [{}, {"a": torch.ones(3)}, {"a": torch.ones(2).half()}])
def test_what_was_not_announced_leaves_no_file(given, tmp_path):
    with (
        pytest.raises(RuntimeError, match="lacks a|is to be"),
        tensor_files.writing(tmp_path / "a", {"a": tensor_files.entry(torch.ones(2))}, {}) as write,
    ):
        for name, tensor in given.items():
            write(name, tensor)
    assert not list(tmp_path.iterdir())
