"""A model folder is untrusted: what is far too large or doesn't describe its own bytes is refused before it is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tasks import fetch
from tasks.algorithms.errors import InputError
from tasks.models import dense_folder, tensor_headers
from tasks.parameters import preflight
from tasks.sources import model_source


def enlarge(path: Path, size: int) -> None:
    """A file of that size which takes no disk."""
    with path.open("ab") as file:
        file.truncate(size)


LOADERS = {
    "fetch": fetch.check_folder,
    "preflight": preflight.read_config,
    "config": dense_folder.config,
    "tokenizer": dense_folder.load_tokenizer,
    "weights": dense_folder.load_dense,
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_huge_config_is_refused_before_it_is_read(model_folder, monkeypatch, name):
    LOADERS[name](model_folder)
    enlarge(model_folder / "config.json", 2**30)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(InputError, match="config.json has 1073741824 bytes"):
        LOADERS[name](model_folder)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja", model_source.INDEX]
)
def test_a_huge_file_beside_it_is_refused(model_folder, name):
    enlarge(model_folder / name, 2**30)
    with pytest.raises(InputError, match=f"{name} has 1073741824 bytes, at most"):
        fetch.check_folder(model_folder)


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "overlap": {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])},
    "a gap": {"a": entry(0, 4, [1]), "b": entry(8, 12, [1])},
    "past the end": {"a": entry(0, 4000, [1000])},
    "before the beginning": {"a": entry(-8, 12, [5])},
    "shape and bytes differ": {"a": entry(0, 12, [2])},
    "a negative side": {"a": entry(0, 12, [-3, -1])},
    "a side that overflows": {"a": entry(0, 12, [2**62, 4])},
    "no known dtype": {"a": entry(0, 12, [3], "F31")},
    "no offsets": {"a": {"dtype": "F32", "shape": [3]}},
    "less than the file": {"a": entry(0, 8, [2])},
    "no object": [1],
    "words for numbers": {"a": entry("0", "12", [3])},
    "deeply nested": None,
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_does_not_describe_the_file_is_refused_by_us_and_by_safetensors(tmp_path, name):
    path = tmp_path / "model.safetensors"
    text = b"[" * 200_000 if HEADERS[name] is None else json.dumps(HEADERS[name]).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with pytest.raises(InputError, match="is no safetensors file or is cut off"):
        tensor_headers.header(path)
    with pytest.raises(Exception, match=".") as caught, safe_open(path, framework="pt"):
        pass
    assert type(caught.value).__name__ == "SafetensorError"


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**32))
    enlarge(path, 2**33)
    with pytest.raises(InputError, match="the header is longer than"):
        tensor_headers.header(path)


def test_files_of_every_dtype_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
    save_file({str(dtype): torch.zeros(3, 5).to(dtype) for dtype in dtypes} | {"none": torch.zeros(0, 2)}, path)
    assert len(tensor_headers.header(path)[1]) == len(dtypes) + 1
