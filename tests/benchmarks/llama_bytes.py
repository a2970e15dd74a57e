"""What Llama-3.2-1B takes when packed, by its config alone; and whether a file of that shape has as many bytes.

    python -m tests.benchmarks.llama_bytes                                      the table, in a second
    python -m tests.benchmarks.llama_bytes --check "2:4 + 4 bit" --embedding 4   packs random weights, too

The plan counts model.safetensors and model.json to the byte; `bound` is the information of their content. `--check`
writes a file of random codes, scales and masks of that shape, block by block, compares its size by `stat` with the plan
for as many distinct scales as the file has (the table assumes more than it pays to list), and reads it back block by
block. Peak memory is that of the whole process.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tasks.algorithms.model import families
from tasks.algorithms.model.shape import shape_of_config
from tasks.algorithms.quantisation import rounding
from tasks.packed import reader
from tasks.packed.description import DESCRIPTION, FILE
from tasks.packed.packed_folder import PackedFolder
from tasks.packed.plan import Plan, planned
from tasks.packed.stored_model import Linear, Model
from tasks.packed.writer import save

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 128256,
}
"""meta-llama/Llama-3.2-1B's config.json."""
GROUP, TABLE_GROUP = 128, 32
"""Inputs that share a scale; values of the embedding that do."""
CASES: dict[str, dict[str, Any]] = {
    "bf16": {"bits": None, "dtype": "BF16"},
    "4 bit": {"bits": 4},
    "3 bit": {"bits": 3},
    "2:4 + 4 bit": {"bits": 4, "pattern": "2:4"},
}
EMBEDDINGS = (16, 8, 4)


def plan(case: str, embedding: int, **more: Any) -> tuple[int, float]:
    """(bytes of model.safetensors and model.json, bytes of their information)."""
    settings = {"group_size": GROUP, "embedding_bits": embedding, "embedding_group": TABLE_GROUP, **CASES[case]}
    made = planned(CONFIG, Plan(**settings, **more))
    return made.total, sum(made.bound.values()) / 8


def show() -> None:
    """Print a row for every case and embedding."""
    dense, _ = plan("bf16", 16)
    print("| linears | embedding | bytes | MiB | bits per parameter | smaller than bf16 | over the bound |")
    print("|---|---|---|---|---|---|---|")
    parameters = dense / 2
    for case in CASES:
        for embedding in (16,) if case == "bf16" else EMBEDDINGS:
            size, bound = plan(case, embedding)
            kind = f"int{embedding}" if embedding < 16 else "bf16" if case == "bf16" else "fp16"
            print(
                f"| {case} | {kind} | {size:,} | {size / 2**20:,.1f} | {8 * size / parameters:.3f} "
                f"| {dense / size:.2f}x | {100 * (size / bound - 1):.3f} % |"
            )


def random_model(case: str, embedding: int, seed: int = 0) -> Model:
    """Random content of that shape, a block at a time."""
    generator = torch.Generator().manual_seed(seed)
    chosen, shapes = CASES[case], shape_of_config(CONFIG).linears
    table = (CONFIG["vocab_size"], CONFIG["hidden_size"])
    hidden, prefix = CONFIG["hidden_size"], families.family(CONFIG).blocks

    def blocks() -> Iterator[dict[str, Linear]]:
        for block in range(CONFIG["num_hidden_layers"]):
            yield {
                f"{prefix}.{block}.{name}": random_linear(
                    shape, chosen["bits"], chosen.get("pattern", "dense"), generator
                )
                for name, shape in shapes.items()
            }

    names = [name for name in families.family(CONFIG).norms]
    rest = {
        f"{prefix}.{block}.{name}.weight": torch.ones(hidden).half()
        for block in range(CONFIG["num_hidden_layers"])
        for name in names
    }
    rest[f"{families.family(CONFIG).after[0]}.weight"] = torch.ones(hidden).half()
    if embedding == 16:
        words = torch.randn(table, generator=generator).half()
    else:
        most = 2 ** (embedding - 1) - 1
        words = rounding.Coded(
            torch.randint(-most, most + 1, table, generator=generator, dtype=torch.int8),
            random_scales(table, TABLE_GROUP, generator),
            embedding,
            TABLE_GROUP,
        )
    return Model(CONFIG, blocks(), words, None, rest)


def random_linear(shape: tuple[int, int], bits: int | None, pattern: str, generator: torch.Generator) -> Linear:
    """Random codes and scales; of each group of the pattern, random places are kept."""
    linear = Linear(pattern=pattern)
    if bits is None:
        linear.weight = torch.randn(shape, generator=generator).bfloat16()
        return linear
    linear.bits, linear.group_size = bits, GROUP
    linear.codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    linear.scales = random_scales(shape, GROUP, generator)
    if pattern != "dense":
        keep, of = map(int, pattern.split(":"))
        order = torch.rand(shape[0] * shape[1] // of, of, generator=generator).argsort(1)
        linear.keep = (order < keep).view(shape)
        linear.codes[~linear.keep] = 2 ** (bits - 1)
    return linear


def random_scales(shape: tuple[int, int], group: int, generator: torch.Generator) -> torch.Tensor:
    """float16 around 1, as spread as a model's are."""
    return torch.randn(shape[0], shape[1] // group, generator=generator).exp().half()


def check(case: str, embedding: int) -> bool:
    """Pack random weights, read them back; whether the files have the planned size."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, started = Path(scratch), time.monotonic()
        save(random_model(case, embedding), folder)
        written = time.monotonic()
        size = sum((folder / name).stat().st_size for name in (FILE, DESCRIPTION))
        table = PackedFolder(folder).description.scales
        count = sum(linear.codes.numel() for _, block in reader.stream(folder) for linear in block.values())
        read = time.monotonic()
    shared = {"distinct_scales": table.values, "kinds": table.kinds} if table else {}
    expected, _ = plan(case, embedding, **shared)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    known = f" with {table.values:,} distinct scales" if table else ""
    print(f"{case}, embedding of {embedding} bits: planned{known} {expected:,}, stat {size:,} bytes")
    print(
        f"written (with the random numbers) in {written - started:.0f} s, {count:,} weights read back in "
        f"{read - written:.0f} s, peak memory {peak:.2f} GiB"
    )
    return size == expected


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Bytes of Llama-3.2-1B when packed")
    parser.add_argument("--check", choices=[case for case in CASES if case != "bf16"], help="pack random weights")
    parser.add_argument("--embedding", type=int, choices=EMBEDDINGS, default=4, help="bits, with --check")
    given = parser.parse_args()
    show()
    if given.check and not check(given.check, given.embedding):
        raise SystemExit("error: the file is not as large as planned")


if __name__ == "__main__":
    main()
