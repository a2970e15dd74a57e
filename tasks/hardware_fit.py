"""Stage hardware_fit: the packaged model against the device profiles of data/devices.

Sizes are those of the files to ship, by `stat`: every tensor file is weights, every other file (tokenizer, configs,
manifest) is metadata and counted with them. The fetched model is judged beside it as if stored in bf16, which is what
compression has to beat. "Does not fit" is a result. It loads no weights: the headers of the tensor files are enough.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import checkpoint, devices, models, packed, tensor_files
from tasks.algorithms import families, fit, masks
from tasks.algorithms.errors import InputError

if TYPE_CHECKING:
    from tasks.stage import Stage

BF16_BYTES = 2
GPTQ_TENSORS = (".qweight", ".qzeros", ".scales", ".g_idx")
"""Tensors of a GPTQ linear: one format together."""
DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "I8": "int8", "U8": "uint8"}


def run(stage: Stage) -> None:
    """Judge the packaged (and the fetched) model on the chosen device, and on every other one for comparison."""
    params = stage.params.hardware_fit
    profiles = devices.load_all(stage.input("devices"))
    chosen = devices.pick(profiles, params.device)
    workload = fit.Workload(params.context, params.batch, params.kv_bits, params.activation_bits)
    folder = stage.input("package/model")
    shape, files = fit.shape(models.config(folder)), measure(folder)
    result = judge(chosen, shape, files, workload)
    rows = [_row(profile, fit.place(profile.device(), shape, files, workload)) for profile in profiles.values()]
    if stage.has_input("fetch/model"):
        folder = stage.input("fetch/model")
        base_shape, base = fit.shape(checkpoint.config(folder)), in_bf16(folder)
        result["fetched"] = judge(chosen, base_shape, base, workload)
        result["fetched"]["stored_bytes"] = tensor_files.stored_bytes(folder)
        for row, profile in zip(rows, profiles.values(), strict=True):
            row["fetched_verdict"] = fit.place(profile.device(), base_shape, base, workload).verdict
    result |= {
        "all_devices": rows,
        "description": chosen.description,
        "safety_margin": chosen.safety_margin,
        "sources": chosen.sources(),
        "stored_bytes": files.weights + files.metadata,
        "workload": asdict(workload),
    }
    stage.output("fit.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print("\n".join(summary(result)))


def skip(stage: Stage) -> None:
    """Nothing was checked."""
    result = {"verdict": "NOT_CHECKED"}
    stage.output("fit.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def judge(profile: devices.Profile, shape: fit.Shape, files: fit.Files, workload: fit.Workload) -> dict[str, Any]:
    """The verdict as plain data."""
    return {"device": profile.name, **asdict(fit.place(profile.device(), shape, files, workload))}


def measure(folder: Path) -> fit.Files:
    """Sizes, weight formats and N:M pattern of a model folder, from its files and their headers.

    Args:
        folder: packed, or of a Hugging Face model; every file in it counts.

    Raises:
        InputError: it has no tensor file, or a damaged one.
    """
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    metadata = tensor_files.stored_bytes(folder) - weights
    if packed.is_packed(folder):
        return fit.Files(weights, metadata, *_measure_packed(folder))
    return fit.Files(weights, metadata, *_measure_tensors(folder))


def _measure_packed(folder: Path) -> tuple[int, int, tuple[str, ...], tuple[int, int] | None]:
    """(bytes read per step, parameters of adapters, formats, pattern); a matrix that isn't pruned has none."""
    layout, blobs = packed.layout(folder), packed.blob_bytes(folder)
    streamed = sum(blobs.values()) - (blobs["embedding"] if "head" in blobs else 0)  # looked up in: one row is read
    specs = [spec for block in layout.specs for spec in block]
    adapter = sum(spec.rank * (spec.rows + spec.cols) for spec in specs)
    formats = {
        _coded_format(spec.bits, spec.group_size, spec.cols) if spec.bits else _dtype(layout, f"{spec.name}.weight")
        for spec in specs
    }
    for blob in blobs.keys() & {"embedding", "head"}:
        coding = getattr(layout.description, blob)
        hidden = layout.table_shape[1]
        formats.add(_coded_format(coding.bits, coding.group_size, hidden) if coding else _dtype(layout, blob))
    patterns = {masks.parse(spec.pattern) for spec in specs}
    return streamed, adapter, tuple(sorted(formats)), patterns.pop() if len(patterns) == 1 else None


def _measure_tensors(folder: Path) -> tuple[int, int, tuple[str, ...]]:
    """(bytes read per step, parameters of adapters, formats) of a folder with a tensor per matrix."""
    config = checkpoint.config(folder)
    tensors, family = tensor_files.entries(folder), families.family(config)
    streamed, adapter, formats = 0, 0, set()
    untied = any(name.startswith(family.head + ".") for name in tensors)
    for name, (dtype, dimensions, size) in tensors.items():
        if not (untied and name.startswith(family.embedding + ".")):
            streamed += size
        if "lora_" in name:
            adapter += math.prod(dimensions)
        if name.endswith(GPTQ_TENSORS):
            formats.add(_quantised_format(config))
        elif len(dimensions) > 1:
            formats.add(DTYPES.get(dtype, dtype.lower()))
    return streamed, adapter, tuple(sorted(formats))


def in_bf16(folder: Path) -> fit.Files:
    """A dense model's sizes as if its tensors were stored in bf16: two bytes per parameter, headers left out."""
    stored = measure(folder)
    sizes = {
        name: math.prod(dimensions) * BF16_BYTES for name, (_, dimensions, _) in tensor_files.entries(folder).items()
    }
    family = families.family(checkpoint.config(folder))
    untied = any(name.startswith(family.head + ".") for name in sizes)
    looked_up = sum(size for name, size in sizes.items() if untied and name.startswith(family.embedding + "."))
    total = sum(sizes.values())
    return fit.Files(total, stored.metadata, total - looked_up, 0, ("bf16",), None)


def summary(result: dict[str, Any]) -> list[str]:
    """Five lines for the log."""
    speed, workload = result["tokens_per_second"], result["workload"]
    margin = (
        f"{result['bytes_over']:,} bytes over" if result["bytes_over"] else f"{result['headroom_bytes']:,} bytes free"
    )
    placed = "; ".join(
        f"{place['tier']} {place['used']:,} of {place['usable']:,}" for place in result["placement"] if place["items"]
    )
    others = ", ".join(f"{row['device']} {row['verdict']}" for row in result["all_devices"])
    base = result.get("fetched")
    return [
        f"{result['device']}: {result['verdict']}, limited by {result['limiting_term']} ({margin}), "
        f"context {workload['context']} x {workload['batch']}",
        f"bytes used of usable ({result['safety_margin']:.0%} margin): {placed}",
        f"at most {speed['bound']:,.0f} tokens/s (limited by {speed['limited_by']}; {speed['tier']} "
        f"{speed['bandwidth']:,.0f}, compute {speed['compute']:,.0f})",
        f"fetched model in bf16: {base['verdict']}, {base['bytes_over']:,} bytes over in {base['limiting_term']}"
        if base
        else "fetched model: not compared",
        f"all devices: {others}",
    ]


def _row(profile: devices.Profile, result: fit.Fit) -> dict[str, Any]:
    return {
        "device": profile.name,
        "verdict": result.verdict,
        "limiting_term": result.limiting_term,
        "bytes_over": result.bytes_over,
        "headroom_bytes": result.headroom_bytes,
        "tokens_per_second": asdict(result.tokens_per_second),
        "notes": result.notes,
    }


def _quantised_format(config: dict[str, Any]) -> str:
    quantisation = config.get("quantization_config") or {}
    if "bits" not in quantisation:
        raise InputError("the model has packed GPTQ tensors, but its config.json no `quantization_config.bits`")
    return _coded_format(quantisation["bits"], quantisation.get("group_size", -1))


def _coded_format(bits: int, group_size: int, columns: int = -1) -> str:
    """group_size: inputs that share a scale; that of a whole row is `columns`."""
    return f"int{bits}-{'channel' if group_size in (-1, columns) else 'group'}"


def _dtype(layout: packed.Layout, name: str) -> str:
    return DTYPES[layout.dtype(name)]
