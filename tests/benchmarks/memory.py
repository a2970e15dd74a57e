"""Memory of stages on random models of Llama-3.2-1B's shape with few of its blocks, and calculated for all 16.

    python -m tests.benchmarks.memory FOLDER [--blocks 2 4] [--stages eora package …]

Each stage runs on each model in a process of its own, without DVC, after the same stage on a tiny model, which pays for
what is imported late. What is printed is the highest resident set above what was there before, mapped files included
(`tests.support.stage_memory`), and what a line through both gives for 16 blocks. The models stay in FOLDER.

Models are streamed however small they are, as one of 16 blocks is.

Quantised, adapted and packed models are made of random codes, 4 bits in groups of 128, 2:4, the embedding in 8 bits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks import random_models
from tests.support.paths import ROOT

if TYPE_CHECKING:
    import torch

    from tasks.algorithms.quantisation import rounding

STAGES = (
    *("vocabulary", "importance", "eora", "package", "kv_cache", "harness@fetch-corpus", "harness@package-corpus"),
    *("evaluate@fetch", "evaluate@gptq", "evaluate@package"),
)
TINY = random_models.LLAMA_1B | random_models.SMALL | {"head_dim": 64}
WHOLE = 16
VALUES = {
    "importance.method": "taylor",
    "importance.windows": 2,
    "eora.rank": 8,
    "eora.bits": 4,
    "evaluate.max_windows": 4,
    "harness.limit": 4,
    "kv_cache.tokens": 256,
    "wanda.enforce": True,
}
GROUP = 128


def make(root: Path, sizes: dict[str, Any]) -> None:
    """Every folder that a stage of `STAGES` reads, below root."""
    import torch

    from tasks.models import gptq_folder, tensor_files
    from tests.support import stage_memory

    random_models.make(root / "data/fetch/model", sizes, "cpu")
    texts = [{"text": "".join(f"The {n} pump stops. " for n in range(first, first + 40))} for first in range(40)]
    for name in ("calibration", "test", "test_ood", "train"):
        write(root / f"data/fetch/corpora/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in texts))
    write(root / "data/harness_data/corpus/documents.jsonl", "".join(json.dumps(row) + "\n" for row in texts))
    write(root / "data/fetch/source.json", "{}")
    write(root / "data/depth_prune/removed.json", json.dumps({"kept": list(range(sizes["num_hidden_layers"]))}))
    for name in ("vocabulary", "lora"):
        (root / f"data/{name}").mkdir()
        (root / f"data/{name}/model").symlink_to("../fetch/model")
    windows = torch.randint(1, 2000, (8, 256), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    (root / "data/calibrate").mkdir()
    tensor_files.save_tensors(root / "data/calibrate/windows.safetensors", {"input_ids": windows}, {})
    quantise(root)
    shutil.copytree(root / "data/gptq/model", root / "data/eora/model")
    factors = {name: (torch.full((8, cols), 1e-3), torch.full((rows, 8), 1e-3)) for name, (rows, cols) in linears(root)}
    gptq_folder.save_adapter(root / "data/eora/model", {name: (a.half(), b.half()) for name, (a, b) in factors.items()})
    tensor_files.save_tensors(root / "data/eora/adapter.safetensors", {}, {"bits": "16", "group_size": "64"})
    stage = stage_memory.MeasuredStage("package", root, stage_memory.parameters(VALUES))
    import_module("tasks.package").run(stage)


def linears(root: Path) -> list[tuple[str, tuple[int, int]]]:
    """Full name and shape of every linear."""
    from tasks.algorithms.model.shape import shape_of_config

    shape = shape_of_config(json.loads((root / "data/fetch/model/config.json").read_text()))
    return [(f"model.layers.{at}.{name}", sides) for at in range(shape.layers) for name, sides in shape.linears.items()]


def _embedding(root: Path, shape: tuple[int, int], generator: torch.Generator) -> rounding.Coded:
    """Random codes of an embedding [vocabulary, hidden], in their file."""
    import torch

    from tasks.algorithms.quantisation import rounding
    from tasks.models import tensor_files

    words = torch.randint(-127, 128, tuple(shape), generator=generator, dtype=torch.int8)
    coded = rounding.Coded(words, torch.full((shape[0], shape[1] // 32), 3e-4, dtype=torch.float16), 8, 32)
    codes = {"embedding.codes": coded.codes, "embedding.scales": coded.scales}
    tensor_files.save_tensors(root / "data/gptq/embedding.safetensors", codes, {"bits": "8", "group_size": "32"})
    return coded


def quantise(root: Path) -> None:
    """data/gptq of random codes, as gptqmodel stores them, one matrix in memory."""
    import torch

    from tasks.algorithms.quantisation import rounding
    from tasks.models import mask_files, tensor_files
    from tasks.models.stored_tensors import StoredTensors
    from tasks.models.tensor_headers import Entry

    source, folder = root / "data/fetch/model", root / "data/gptq/model"
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if not path.name.endswith(".safetensors"):
            shutil.copyfile(path, folder / path.name)
    stored, all_linears = StoredTensors(source), dict(linears(root))
    table = "model.embed_tokens.weight"
    generator = torch.Generator().manual_seed(0)
    coded, entries = _embedding(root, stored.shapes[table], generator), {}
    for name, entry in stored.entries.items():
        if name.removesuffix(".weight") not in all_linears:
            entries[name] = Entry("F16", entry.shape, entry.size)
    for name, (rows, cols) in all_linears.items():
        groups = max(1, cols // GROUP)
        for part, dtype, sides in (
            ("qweight", "I32", [cols // 8, rows]),
            ("qzeros", "I32", [groups, rows // 8]),
            ("scales", "F16", [groups, rows]),
            ("g_idx", "I32", [cols]),
        ):
            size = (2 if dtype == "F16" else 4) * sides[0] * (sides[1] if len(sides) > 1 else 1)
            entries[f"{name}.{part}"] = Entry(dtype, sides, size)
    with (
        tensor_files.writing(folder / "model.safetensors", entries, {"format": "pt"}) as write_tensor,
        mask_files.writing(root / "data/gptq/masks.safetensors", all_linears, "2:4") as write_mask,
    ):
        for name in stored.entries:
            if name == table:
                write_tensor(name, rounding.values(coded).half())
            elif name in entries:
                write_tensor(name, stored.read(name).half())
        for name, (rows, cols) in all_linears.items():
            keep = torch.tensor([True, False, False, True]).repeat(rows, cols // 4)
            write_mask(name, keep)
            codes = torch.randint(0, 16, (rows, cols), generator=generator, dtype=torch.int32)
            codes = torch.where(keep, codes, 8).T.reshape(cols // 8, 8, rows)
            words = (codes << (4 * torch.arange(8, dtype=torch.int32))[:, None]).sum(dim=1, dtype=torch.int32)
            groups = max(1, cols // GROUP)
            write_tensor(f"{name}.qweight", words)
            # every zero point is 8; gptq_v2 stores them as they are
            write_tensor(f"{name}.qzeros", torch.full((groups, rows // 8), -2004318072, dtype=torch.int32))
            write_tensor(f"{name}.scales", torch.full((groups, rows), 0.004, dtype=torch.float16))
            write_tensor(f"{name}.g_idx", (torch.arange(cols) // (cols // groups)).int())
    settings = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "quant_method": "gptq"}
    settings |= {"checkpoint_format": "gptq_v2", "format": "gptq_v2", "pack_dtype": "int32", "lm_head": False}
    write(folder / "quantize_config.json", json.dumps(settings))
    described = json.loads((source / "config.json").read_text())
    write(folder / "config.json", json.dumps(described | {"dtype": "float16", "quantization_config": settings}))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def measure(address: str, root: Path, tiny: Path) -> dict[str, float]:
    """What a stage takes, in this process: bytes above what was there, and seconds."""
    import torch

    from tasks.algorithms.model import streaming
    from tasks.runtime import processes, spilling
    from tests.support import stage_memory

    torch.set_num_threads(1)
    streaming.WHOLE = 0  # as for all blocks
    found = {}
    for folder in (tiny, root):
        stage = stage_memory.MeasuredStage(address, folder, stage_memory.parameters(VALUES))
        module = import_module(f"tasks.{stage.name}")
        stage.folder = folder / "out" / address
        shutil.rmtree(stage.folder, ignore_errors=True)
        with contextlib.chdir(folder), spilling.spilling(folder / "scratch"):
            began, before = time.process_time(), stage_memory.fresh()
            module.run(stage)
            found = {"bytes": processes.peak() - before, "seconds": time.process_time() - began, "before": before}
        shutil.rmtree(stage.folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--stages", nargs="+", default=list(STAGES))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    if asked.one:
        print(json.dumps(measure(asked.one[0], folder / asked.one[1], folder / "tiny")))
        return
    for name, sizes in {
        "tiny": TINY,
        **{str(n): random_models.LLAMA_1B | {"num_hidden_layers": n} for n in asked.blocks},
    }.items():
        if not (folder / name / "data/package/model").exists():
            shutil.rmtree(folder / name, ignore_errors=True)
            make(folder / name, sizes)
    for address in asked.stages:
        row = {}
        for blocks in asked.blocks:
            call = [sys.executable, "-m", "tests.benchmarks.memory", str(folder), "--one", address, str(blocks)]
            done = subprocess.run(call, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            row[blocks] = json.loads(done.stdout.splitlines()[-1])
        few, many = asked.blocks[0], asked.blocks[-1]
        per_block = (row[many]["bytes"] - row[few]["bytes"]) / (many - few) if many > few else 0
        row["calculated"] = row[many]["bytes"] + per_block * (WHOLE - many)
        print(address, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
