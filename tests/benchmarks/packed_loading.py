"""How long a packed folder takes to load, and how much memory, beside the folder that it was packed from.

    python -m tests.benchmarks.packed_loading                       data/eora/model, and it packed
    python -m tests.benchmarks.packed_loading UNPACKED PACKED       two folders
    python -m tests.benchmarks.packed_loading --random              a random Llama of 150 million parameters
    python -m tests.benchmarks.packed_loading --codings [PACKED]    data/package/model in both codings, and its bytes

Each load is a process of its own, one kind after the other in turn, because the first in a process pays for imports and
the peak of memory never falls. Seconds are those of the loading itself, once with the imports and once without; the
peak is that of the whole process, and what it is above the peak of the imports. Every process reads the files once
before its clock starts, so that the page cache is warm for all. A spread is from the least to the largest of the
repetitions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tasks.runtime.processes import peak
from tests.support.paths import ROOT

MIB = 2**20
DEFAULT = ROOT / "data/eora/model"
PARTS = tuple(ROOT / f"data/{name}.safetensors" for name in ("gptq/masks", "gptq/embedding", "eora/adapter"))
"""What belongs to it."""
PACKAGE = ROOT / "data/package/model"
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10, "vocab_size": 24576}
"""About 150 million parameters, with 16 heads of which 4 have keys and values of their own."""
FIGURES = {"load": "load, s", "all": "load with imports, s", "peak": "peak, MiB", "above": "peak above imports, MiB"}


def load(kind: str, folder: Path) -> dict[str, float]:
    """Load a folder in this process, "unpacked" or packed in some way; what it took, by the keys of `FIGURES`."""
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    started = time.perf_counter()
    loader = _loader(kind)
    imported, before = time.perf_counter(), peak()
    model = loader(folder)
    ended = time.perf_counter()
    del model
    most = max(before, peak())  # Linux counts per CPU: seen to fall by 120 KiB
    return {"load": ended - imported, "all": ended - started, "peak": most / MIB, "above": (most - before) / MIB}


def _loader(kind: str) -> Callable[[Path], Any]:
    if kind != "unpacked":
        from tasks.packed import reader

        return reader.load_model
    from tasks.models import gptq_folder

    return gptq_folder.load_quantised


def measure(folders: Mapping[str, Path], repetitions: int) -> dict[str, list[dict[str, float]]]:
    """Kind -> what each process measured; the kinds take turns."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in folders}
    for _ in range(repetitions):
        for kind, folder in folders.items():
            command = [sys.executable, "-m", __spec__.name, "--load", kind, str(folder)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            output = subprocess.run(
                command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ).stdout
            found[kind].append(json.loads(output.splitlines()[-1]))
    return found


def show(found: Mapping[str, list[dict[str, float]]], folders: Mapping[str, Path]) -> None:
    """A row per figure of two kinds: medians, their ratio, and the ratios of the repetitions that ran side by side."""
    size = {kind: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) for kind, folder in folders.items()}
    before, after = folders
    print(f"| {len(found[after])} repetitions | {before} | {after} | {after} / {before} |")
    print("|---|---|---|---|")
    print(f"| bytes | {size[before]:,} | {size[after]:,} | {size[after] / size[before]:.3f} |")
    for key, name in FIGURES.items():
        values = {kind: [one[key] for one in found[kind]] for kind in folders}
        ratios = [b / a for a, b in zip(values[before], values[after], strict=True)]
        cells = [f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in [*values.values(), ratios]]
        print(f"| {name} | {' | '.join(cells)} |")


def pack(unpacked: Path, folder: Path, *parts: Path) -> Path:
    """A packed folder of the model: masks and codes from the `parts`, as the stage package does it."""
    from tasks.models.tokenizer_files import copy_tokenizer
    from tasks.packed import source_folder, writer

    writer.save(source_folder.read(unpacked, *parts), folder)
    copy_tokenizer(unpacked, folder)
    return folder


def codings(packed: Path, scratch: Path) -> dict[str, Path]:
    """A packed folder in both codings, its tokenizer, too."""
    from tasks.models import tokenizer_archive
    from tasks.models.tokenizer_files import copy_tokenizer
    from tasks.packed import reader, writer

    folders = {coding: scratch / coding for coding in ("fixed", "entropy")}
    for coding, folder in folders.items():
        writer.save(reader.load(packed), folder, coding)
        copy_tokenizer(packed, folder)
    tokenizer_archive.pack(folders["entropy"])
    return folders


def show_bytes(folders: Mapping[str, Path]) -> None:
    """A row per component: its bytes in each folder, the bound of the last, and how far that is above it."""
    from tasks.packed import sizes

    found = {kind: sizes.component_bytes(folder) for kind, folder in folders.items()}
    least = {name: bits / 8 for name, bits in sizes.bound(folders["entropy"]).items()}
    rows = {name: ([found[kind][name] for kind in folders], least[name]) for name in least}
    content = [name for name in rows if name != "metadata"]
    rows["content"] = [sum(found[kind][name] for name in content) for kind in folders], sum(least.values())
    rows["all"] = [sum(found[kind].values()) for kind in folders], 0
    print(f"| bytes | {' | '.join(folders)} | entropy / fixed | order-0 bound | entropy / bound |")
    print("|---|---|---|---|---|---|")
    for name, (values, bound) in rows.items():
        if any(values):
            ratio = f"{values[-1] / values[0]:.4f}"
            cells = [f"{bound:,.1f}", f"{values[-1] / bound:.4f}"] if bound else ["", ""]
            print(f"| {name} | {' | '.join(f'{value:,}' for value in values)} | {ratio} | {' | '.join(cells)} |")
    print()


def write_random(folder: Path, bits: int = 4, group: int = 128) -> Path:
    """A Llama of `SHAPE` in gptqmodel's format, codes and scales at random, symmetric; the folder."""
    import torch
    from transformers import LlamaConfig

    from tasks.models import tensor_files
    from tasks.packed.model_config import clean
    from tasks.packed.shapes import shapes_of
    from tasks.runtime import files

    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(**SHAPE, num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True)
    described = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"]}
    described = clean(described)
    shapes = shapes_of(described)
    tensors = {name: torch.ones(shape, dtype=torch.float16) for name, shape in shapes.rest.items()}
    tensors["model.embed_tokens.weight"] = torch.randn(shapes.table, generator=generator).half()
    zero = sum(2 ** (bits - 1) - 1 << place for place in range(0, 32, bits))  # the format stores them less one
    for block in shapes.linears:
        for name, (rows, cols) in block.items():
            words = (cols * bits // 32, rows)
            tensors[f"{name}.qweight"] = torch.randint(-(2**31), 2**31, words, generator=generator, dtype=torch.int32)
            tensors[f"{name}.qzeros"] = torch.full((cols // group, rows * bits // 32), zero, dtype=torch.int32)
            tensors[f"{name}.scales"] = (torch.rand(cols // group, rows, generator=generator) / 100 + 1e-3).half()
            tensors[f"{name}.g_idx"] = (torch.arange(cols) // group).int()
    quantisation = {"bits": bits, "group_size": group, "desc_act": False, "sym": True, "lm_head": False}
    quantisation |= {"quant_method": "gptq", "checkpoint_format": "gptq", "pack_dtype": "int32"}
    folder.mkdir()
    tensor_files.save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    files.write_json(folder / "quantize_config.json", quantisation)
    files.write_json(folder / "config.json", described | {"quantization_config": quantisation})
    for name in ("tokenizer.json", "tokenizer_config.json"):  # gptqmodel loads no model without one
        shutil.copyfile(ROOT / "data/base_model/model" / name, folder / name)
    return folder


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Load time and peak memory of a packed folder and its source")
    parser.add_argument("unpacked", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("packed", type=Path, nargs="?", help="packed here if not given")
    parser.add_argument("--random", action="store_true", help="a random model instead of folders")
    parser.add_argument("--codings", action="store_true", help="the packed folder in both codings")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--load", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        print(json.dumps(load(given.load[0], Path(given.load[1]))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        unpacked = write_random(Path(scratch) / "unpacked") if given.random else given.unpacked
        parts = PARTS if unpacked == DEFAULT else ()
        if given.codings:
            given_packed = PACKAGE if unpacked == DEFAULT else unpacked
            packed = pack(unpacked, Path(scratch) / "packed") if given.random else given_packed
            folders = codings(packed, Path(scratch))
            show_bytes(folders)
        else:
            folders = {"unpacked": unpacked, "packed": given.packed or pack(unpacked, Path(scratch) / "packed", *parts)}
        show(measure(folders, given.repetitions), folders)


if __name__ == "__main__":
    main()
