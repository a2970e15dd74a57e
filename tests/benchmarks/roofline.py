"""Is the bound of the roofline near what this machine reaches? Measured tokens per second by the bound, one thread.

    python -m tests.benchmarks.roofline                     all rows
    python -m tests.benchmarks.roofline --only float32      rows whose name it is found in

Models of random weights, Llama-shaped and larger than the last-level cache, in PyTorch (float32, bfloat16), and
exported to ONNX Runtime GenAI and llama.cpp; then the built-in model and its package, which fit into it. A row is a
process of its own, in which rounds of decoding and of `tasks.device_profiles.this_machine`'s reading passes take turns:
both figures are of the fastest of many short pieces, so that what else runs disturbs both alike. The bound is
`tasks.algorithms.device_fit.verdict`'s for the model's config, on a profile with the bandwidths so measured, those of
the fastest reading kernel; PyTorch's own matrix-vector product is told beside it. A ratio above 1 would refute the
bound.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.table import RESULTS, Table
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from tasks.algorithms.device_fit.footprint import Model

FETCHED, PACKAGE = ROOT / "data/fetch/model", ROOT / "data/package/model"
TOKENIZER = ROOT / "data/base_model/model"
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    **WIDE,
}
GROUP, PROMPT, NEW, ROUNDS = 64, 16, 32, 10
COLUMNS = (
    "model",
    "weights, MB",
    "read, GB/s",
    "matrix-vector, GB/s",
    "bound, tokens/s",
    "measured, tokens/s",
    "measured by bound",
    "median by bound",
)
ROWS: dict[str, dict[str, Any]] = {
    "random, PyTorch float32, 2 layers": {"layers": 2, "dtype": "float32"},
    "random, PyTorch float32, 6 layers": {"layers": 6, "dtype": "float32"},
    "random, PyTorch bfloat16, 4 layers": {"layers": 4, "dtype": "bfloat16"},
    "random, ONNX Runtime int4, 16 layers": {"layers": 16, "format": "onnx-int4"},
    "random, llama.cpp float32, 2 layers": {"layers": 2, "format": "gguf-f32"},
    "random, llama.cpp int4, 16 layers": {"layers": 16, "format": "gguf"},
    "built-in, PyTorch float32": {"folder": str(FETCHED), "dtype": "float32"},
    "built-in package, ONNX Runtime int4": {"folder": str(PACKAGE), "format": "onnx-int4"},
}


def random_folder(layers: int, dtype: str, folder: Path) -> Path:
    """A dense folder of random weights."""
    import torch
    import transformers

    config = transformers.LlamaConfig(**CONFIG, num_hidden_layers=layers)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def random_package(layers: int, folder: Path) -> Path:
    """A packed folder of random codes: int4 in groups of 64, the embedding in float16."""
    import torch

    from tasks.algorithms.model import families
    from tasks.algorithms.model.shape import shape_of_config
    from tasks.models.tokenizer_files import copy_tokenizer
    from tasks.packed import stored_model, writer

    generator = torch.Generator().manual_seed(0)
    config = CONFIG | {"num_hidden_layers": layers, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    prefix, hidden = families.family(config).blocks, config["hidden_size"]

    def linear(rows: int, cols: int) -> stored_model.Linear:
        codes = torch.randint(0, 16, (rows, cols), generator=generator, dtype=torch.uint8)
        scales = torch.full((rows, cols // GROUP), 0.25 / cols**0.5).half()
        return stored_model.Linear(codes=codes, scales=scales, bits=4, group_size=GROUP)

    shapes = shape_of_config(config).linears
    blocks = ({f"{prefix}.{block}.{name}": linear(*shape) for name, shape in shapes.items()} for block in range(layers))
    norms = [f"{prefix}.{b}.{name}.weight" for b in range(layers) for name in families.family(config).norms]
    rest = {name: torch.ones(hidden).half() for name in [*norms, f"{families.family(config).after[0]}.weight"]}
    words = torch.randn(config["vocab_size"], hidden, generator=generator).half()
    writer.save(stored_model.Model(config, blocks, words, None, rest), folder)
    copy_tokenizer(TOKENIZER, folder)
    return folder


def measure(row: dict[str, Any]) -> dict[str, float]:
    """What one process measures, in this one: the fastest and the median step, the bound, and what it is made of."""
    import numpy as np

    from tasks.algorithms.device_fit import verdict
    from tasks.algorithms.device_fit.footprint import Workload
    from tasks.device_profiles import profiles, this_machine
    from tasks.runners import engines

    with tempfile.TemporaryDirectory() as scratch:
        model, folder, settings = prepare(row, Path(scratch))
        engine = engines.load(folder, 1, **settings)
        ids = np.random.default_rng(0).integers(1, 512, (1, PROMPT))
        compute, steps, memory, cache = this_machine.arithmetic(0.5), [], [], []
        size = this_machine.cache_bytes() or 2**25
        for _ in range(ROUNDS):
            memory.append(this_machine.bandwidth(2**28, 0.3))
            cache.append(this_machine.bandwidth(size // 2, 0.1))
            times: list[float] = []
            engine.generate(ids, NEW, lambda times=times: times.append(time.perf_counter()))
            steps += list(np.diff(times)[1:])
    best = [{name: max(one[name] for one in some) for name in some[0]} for some in (memory, cache)]
    rates = this_machine.Rates(best[0], best[1], compute)
    device = profiles.Profile.model_validate(this_machine.profile(rates)).device()
    bits = 16 if settings.get("dtype") == "bfloat16" else 32
    found = verdict.judge(device, model, Workload(PROMPT + NEW // 2, 1, bits, bits))
    kernels = best[1 if found.tokens_per_second.tier == "llc" else 0]
    return {
        "weights": found.weights_bytes / 1e6,
        "read": this_machine.reading(kernels) / 1e9,
        "product": kernels["matrix-vector product"] / 1e9,
        "bound": found.tokens_per_second.bound,
        "fastest": 1 / min(steps),
        "median": 1 / float(np.median(steps)),
    }


def prepare(row: dict[str, Any], scratch: Path) -> tuple[Model, Path, dict[str, Any]]:
    """What the bound counts, the folder to run, and the settings of its engine."""
    from tasks.device_profiles import contents
    from tasks.device_profiles.planned_contents import planned
    from tasks.export import export
    from tasks.packed.plan import Plan

    dtype, kind = row.get("dtype"), row.get("format")
    folder = Path(row["folder"]) if "folder" in row else scratch / "model"
    if "folder" not in row:
        random_folder(row["layers"], dtype, folder) if dtype else random_package(row["layers"], folder)
    model = contents.read(folder)
    if not kind:
        return model, folder, {"dtype": dtype}
    export.export(folder, kind, scratch / "export")
    if kind == "gguf-f32":  # the package's values, each in 32 bits
        model = planned(CONFIG | {"num_hidden_layers": row["layers"]}, Plan(bits=None, dtype="F32"))
    return model, scratch / "export", {}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Measured tokens per second by the roofline's bound")
    parser.add_argument("--only", default="", help="regular expression that a row's name has to contain")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(ROWS[given.measure])))
        return
    table = Table(RESULTS / "roofline.csv", COLUMNS, fresh=not given.only)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for name, row in ROWS.items():
        if not re.search(given.only, name) or not Path(row.get("folder", ROOT)).exists():
            continue
        call = [sys.executable, "-m", "tests.benchmarks.roofline", "--measure", name]
        done = subprocess.run(call, cwd=ROOT, env=environment, text=True, capture_output=True)
        if done.returncode:
            table.add(model=name, note=done.stderr.strip().splitlines()[-1])
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        figures = [found[key] for key in ("weights", "read", "product", "bound", "fastest")]
        figures += [found["fastest"] / found["bound"], found["median"] / found["bound"]]
        table.add(model=name, **dict(zip(COLUMNS[1:], figures, strict=True)))


if __name__ == "__main__":
    main()
