"""The bytes of safetensors files: by their content alone, and read by the library as it writes them."""

import json

import pytest
import torch
from safetensors import safe_open

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


def test_a_header_that_grows_when_sorted_is_refused(tmp_path):
    header = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'  # as other writers do: no room for metadata
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="does not fit its 53 bytes when sorted"):
        tensor_files.sort_header(tmp_path / "a")
