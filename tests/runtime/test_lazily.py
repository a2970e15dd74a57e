"""A stage that is switched off loads neither torch nor pandas."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SKIP = """
import importlib, sys
from pathlib import Path
from types import SimpleNamespace
from tasks.parameters import schema
from tasks.runtime import lazily

class Stage:
    item = "package-corpus"
    params = schema.load()
    model_in = Path(sys.argv[2]) / "wanda/model"

    def inputs_named(self, name):
        return [self.model_in]

    def output(self, name):
        path = Path(sys.argv[2]) / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def pass_on(self, source, target):
        target.mkdir(exist_ok=True)

with lazily.imported():
    importlib.import_module(f"tasks.{sys.argv[1]}").skip(Stage())
heavy = ("torch", "pandas", "transformers", "numpy", "vl_convert")
print([name for name in heavy if name in sys.modules])
"""
LIGHT = (
    "depth_prune",
    "evaluate",
    "hardware_fit",
    "harness",
    "harness_data",
    "kv_cache",
    "measure",
    "overlap",
    "package",
    "vocabulary",
)
"""Not those that write tensors, count the zeros of the model that they pass on, or draw."""


def skip(name: str, folder: Path) -> list[str]:
    model = folder / "wanda/model"
    model.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4, "vocab_size": 2}
    config |= {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (model / "tokenizer.json").write_text("{}", encoding="utf-8")
    header = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "U8", "shape": [2, 1], "data_offsets": [0, 2]}}
    ).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"ab")
    command = [sys.executable, "-c", SKIP, name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", LIGHT)
def test_a_switched_off_stage_loads_no_heavy_library(name: str, tmp_path: Path) -> None:
    assert skip(name, tmp_path)[-1] == "[]"


def test_a_room_that_needs_torch_loads_it_and_what_waits_stays_whole(tmp_path: Path) -> None:
    code = (
        "from tasks.runtime import lazily\n"
        "with lazily.imported():\n"
        "    from tasks.runners import any_folder\n"
        "    from tasks.algorithms.model import checkpoints, masks\n"
        "    print(masks.parse('2:4'), checkpoints.NOTHING, any_folder.component_bytes.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("(2, 4)") and done.stdout.endswith(" component_bytes\n"), done.stderr


def test_a_table_without_rows_has_the_bytes_of_pandas(tmp_path: Path) -> None:
    import pandas as pd

    from tasks.runtime import files

    files.write_header(tmp_path / "a.csv", ("x", "y"))
    files.write_csv(tmp_path / "b.csv", pd.DataFrame(columns=["x", "y"]), "%.9g")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
