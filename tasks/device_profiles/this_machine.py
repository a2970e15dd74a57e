"""Measure this machine as a device profile, data/devices/host.yaml, for `edgepress fit --device host`.

    edgepress profile [--threads N] [--out FILE]

Memory and last-level cache: bytes per second of reading arrays (a sum, a product of two, a matrix times a vector), the
fastest of all passes, as a limit has to be; decoding reads. STREAM's triad (McCalpin, "Memory Bandwidth and Machine
Balance", 1995), which writes too, is told beside it. Arithmetic: a square matrix product per precision. Sizes are the
system's own. git and DVC ignore the file, and no stage reads it: the DAG's results are the same on every machine.

What it does not do: it ends no other program, which takes bandwidth while this measures; it measures no storage, no
other NUMA node and no accelerator.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from tasks.algorithms.errors import InputError
from tasks.device_profiles import profiles
from tasks.parameters import machine
from tasks.runtime import files

SECONDS = 1.0
"""How long each kernel is repeated."""
TRIAD = "triad"
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_LEAST, _MOST = 2**28, 2**30
"""Bytes of the array read from memory: eight last-level caches, within these limits."""
_SIZE = 1024
"""Rows and columns of the matrices multiplied."""


@dataclass(frozen=True)
class Rates:
    """What was measured: bytes per second of memory and cache (None where its size isn't known), operations per second.

    Attributes:
        memory, cache: kernel -> bytes per second.
        compute: precision -> operations per second.
    """

    memory: dict[str, float]
    cache: dict[str, float] | None
    compute: dict[str, float]


def measure(seconds: float = SECONDS, least: int = _LEAST) -> Rates:
    """Measure with as many threads as torch has now; each kernel for so many seconds.

    Args:
        least: bytes of the array that is read from memory, at least.
    """
    size = cache_bytes()
    array = min(max(least, 8 * (size or 0)), max(least, _MOST))
    return Rates(
        memory=bandwidth(array, seconds),
        cache=bandwidth(size // 2, seconds) if size else None,
        compute=arithmetic(seconds),
    )


def bandwidth(size: int, seconds: float) -> dict[str, float]:
    """Kernel -> bytes per second of its fastest pass over `size` bytes in all; written bytes count as read ones do."""
    whole, half, third = (size // 4 // n // 1024 * 1024 for n in (1, 2, 3))
    a = torch.ones(whole)
    matrix, vector = a.view(-1, 1024), torch.ones(1024)
    x, y = a[:half], a[half : 2 * half]
    u, v, w = a[:third], a[third : 2 * third], torch.empty(third)
    kernels: dict[str, tuple[Callable[[], Any], int]] = {
        "sum": (lambda: a.sum(), 4 * whole),
        "dot": (lambda: torch.dot(x, y), 8 * half),
        "matrix-vector product": (lambda: torch.mv(matrix, vector), 4 * whole),
        TRIAD: (lambda: torch.add(u, v, alpha=3.0, out=w), 12 * third),
    }
    return {name: count / _fastest(kernel, seconds) for name, (kernel, count) in kernels.items()}


def reading(kernels: dict[str, float]) -> float:
    """Bytes per second of the fastest kernel that only reads."""
    return max(rate for name, rate in kernels.items() if name != TRIAD)


def arithmetic(seconds: float) -> dict[str, float]:
    """Precision -> operations per second of a matrix product; one that is no faster than fp32 is left out."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        matrix = torch.randn(_SIZE, _SIZE, generator=generator).to(dtype)
        found[precision] = 2 * _SIZE**3 / _fastest(lambda matrix=matrix: matrix @ matrix, seconds)
    codes = torch.randint(-127, 128, (_SIZE, _SIZE), dtype=torch.int8, generator=generator)
    found["int8"] = 2 * _SIZE**3 / _fastest(lambda: torch._int_mm(codes, codes), seconds)
    return {name: rate for name, rate in found.items() if name == "fp32" or rate > found["fp32"]}


def _fastest(kernel: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest pass among those that fit into `seconds`, and at least three."""
    kernel()
    best, count, end = float("inf"), 0, time.perf_counter() + seconds
    while count < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        kernel()
        best, count = min(best, time.perf_counter() - started), count + 1
    return best


def cache_bytes() -> int | None:
    """Size of the last-level cache; None where the system doesn't tell."""
    found = {}
    for index in _CACHES.glob("index*"):
        try:
            level, size = ((index / name).read_text(encoding="utf-8").strip() for name in ("level", "size"))
            found[int(level)] = int(size.removesuffix("K")) * 2**10
        except (OSError, ValueError):
            continue
    return found[max(found)] if found else None


def memory_bytes() -> tuple[int, int]:
    """(bytes of memory, bytes of it that others use now); the machine's, or the control group's limit if lower."""
    memory, limit = psutil.virtual_memory(), machine.memory_limit()
    total = memory.total if limit is None else min(memory.total, limit)
    return total, min(memory.total - memory.available, total - 1)


def profile(rates: Rates) -> dict[str, Any]:
    """The content of host.yaml."""
    total, used = memory_bytes()
    processor = machine.processor() or platform.machine()
    command, threads = "measured by edgepress profile", torch.get_num_threads()
    by = f"{threads} thread{'s' if threads > 1 else ''}"

    def fastest(kernels: dict[str, float]) -> dict[str, Any]:
        told = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in kernels.items())
        return _figure(reading(kernels), f"{command}: the fastest reading pass by {by}; GB/s: {told}")

    floats = {name: name if name in rates.compute else "fp32" for name in ("fp32", "bf16", "fp16")}
    integers = "int8" if "int8" in rates.compute else "fp32"
    formats = floats | {f"int{bits}-{kind}": integers for bits in (4, 8) for kind in ("group", "channel")}
    cache = rates.cache and {
        "name": "llc",
        "bytes": _figure(cache_bytes() or 0, f"{_CACHES}: the last level"),
        "bandwidth": fastest(rates.cache),
    }
    product = f"{command}: a product of {_SIZE} x {_SIZE} matrices by {by}"
    return {
        "name": profiles.HOST,
        "description": f"This machine ({processor}), {by}, as it was when it was measured.",
        "tiers": [
            {
                "name": "dram",
                "bytes": _figure(total, "the system's memory, or the control group's limit"),
                "reserved": _figure(used, "what other programs used when it was measured"),
                "bandwidth": fastest(rates.memory),
                "holds": ["weights", "kv_cache", "activations", "scratch"],
            }
        ],
        "storage": None,
        "cache": cache,
        "compute": [{"precision": name, **_figure(rate, product)} for name, rate in rates.compute.items()],
        "weight_formats": {
            "values": formats,
            "source": "PyTorch: floats; ONNX Runtime (MatMulNBits), llama.cpp: 4- and 8-bit integers by int8 products",
        },
        "sparsity": [],
        "safety_margin": {"value": 0.1, "source": "estimate: a tenth, as in the profiles of data/devices"},
    }


def _figure(value: float, source: str) -> dict[str, Any]:
    return {"value": int(value), "source": source}


def write(content: dict[str, Any], path: Path) -> profiles.Profile:
    """Write the profile, whole or not at all.

    Raises:
        InputError: the folder isn't there or can't be written.
    """
    parsed = profiles.Profile.model_validate(content)
    try:
        files.write_text(path, yaml.safe_dump(content, sort_keys=False, width=120))
    except OSError as error:
        raise InputError(f"{path} can't be written ({error.strerror}): name a file with --out") from error
    return parsed
