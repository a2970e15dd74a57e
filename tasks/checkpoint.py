"""Read and write model folders: dense ones with transformers, quantised ones with gptqmodel.

Only safetensors are read or written, never a pickle, and no code of a model folder is run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tasks.algorithms import families, masks
from tasks.algorithms.errors import InputError

QUANTISED = "quantize_config.json"
"""gptqmodel writes this file beside the weights; a folder without it is dense."""

ADAPTER = "eora"
"""Folder of the low-rank adapter inside a quantised model's folder."""


def is_quantised(folder: Path) -> bool:
    """Whether the folder holds a gptqmodel checkpoint."""
    return (folder / QUANTISED).exists()


def config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_dense(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A dense checkpoint on the CPU, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    return model.eval()


def save_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary checkpoint that stock `from_pretrained` loads."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its content alone."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    sort_header(path)


def sort_header(path: Path) -> None:
    """Sort a safetensors file's metadata in place: the library writes it in an order that changes from run to run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"the header of {path} does not fit its {size} bytes when sorted")
        file.seek(8)
        file.write(text.ljust(size))


def save_masks(path: Path, keep: dict[str, Tensor], pattern: str) -> None:
    """Write keep masks as packed bits.

    Args:
        keep: module name -> bool [rows, cols], True where the weight is kept. May be empty: nothing is pruned.
        pattern: "2:4" (kept : of), "unstructured" or "dense".
    """
    shapes = {name: f"{mask.shape[0]},{mask.shape[1]}" for name, mask in keep.items()}
    save_tensors(path, {name: masks.pack(mask) for name, mask in keep.items()}, shapes | {"pattern": pattern})


def load_masks(path: Path) -> tuple[dict[str, Tensor], str]:
    """The masks of `save_masks` (module name -> bool [rows, cols], True = kept) and their pattern.

    Raises:
        InputError: the file has no pattern, or a mask's bytes don't fit its shape.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "pattern" not in metadata:
            raise InputError(f"{path} is no mask file: its metadata has no `pattern`; run the stage wanda again")
        shapes = {name: tuple(map(int, metadata[name].split(","))) for name in sorted(file.keys())}
        keep = {name: masks.unpack(file.get_tensor(name), *shape) for name, shape in shapes.items()}
    return keep, metadata["pattern"]


def load_model(folder: Path) -> PreTrainedModel:
    """Any model folder of the pipeline, on the CPU, in float32, to be evaluated: dense, or quantised with adapter."""
    return load_quantised(folder) if is_quantised(folder) else load_dense(folder)


def load_quantised(folder: Path, adapter: bool = True) -> PreTrainedModel:
    """A gptqmodel checkpoint with gptqmodel's torch kernel, on the CPU, computing in float32.

    The kernel's weights are unpacked once, so it takes the memory of the dense model and is as fast.

    Args:
        adapter: load the adapter of the folder too, where it has one.
    """
    from tasks.algorithms import masked_gptq  # its import of gptqmodel takes seconds, and dense folders don't need it

    library = masked_gptq.gptqmodel
    branch = folder / ADAPTER
    with masked_gptq.loading_in_float32():
        model = library.GPTQModel.load(
            str(folder),
            backend=library.BACKEND.GPTQ_TORCH,
            device="cpu",
            dtype=torch.float32,
            adapter=masked_gptq.Lora(rank=None, path=str(branch)) if adapter and branch.exists() else None,
        ).model
    masked_gptq.unpack_once(model)
    return model.eval()


def load_dequantised(folder: Path) -> PreTrainedModel:
    """A gptqmodel checkpoint as an ordinary dense float32 model, without its adapter."""
    from tasks.algorithms import masked_gptq

    model = load_quantised(folder, adapter=False)
    masked_gptq.densify(model)
    return model


def load_for_quantisation(folder: Path, quantisation: Any) -> Any:
    """gptqmodel's wrapper of a dense checkpoint in float32, to be quantised by `masked_gptq.quantise`.

    Args:
        quantisation: of `masked_gptq.config`.
    """
    from tasks.algorithms import masked_gptq

    with masked_gptq.contained():
        return masked_gptq.gptqmodel.GPTQModel.load(str(folder), quantisation, dtype=torch.float32)


def save_quantised(model: Any, dense: Path, folder: Path) -> None:
    """Write a quantised model as a folder that stock gptqmodel loads; what isn't quantised is stored in float16.

    gptqmodel's own files hold times, settings of this machine and a changed tokenizer. So only its tensors and its
    description of the quantisation are kept; all else comes from the dense folder.

    Args:
        model: what `masked_gptq.quantise` quantised.
        dense: the folder it was loaded from.

    Raises:
        InputError: a value is too large for float16.
    """
    from tasks.algorithms import masked_gptq

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, masked_gptq.contained():
        model.save(scratch, max_shard_size=None)
        tensors = load_file(Path(scratch) / "model.safetensors")
        quantisation = json.loads((Path(scratch) / QUANTISED).read_text(encoding="utf-8"))
    tensors = {name: _half(name, tensor) for name, tensor in tensors.items()}
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    quantisation["meta"] = {key: quantisation["meta"][key] for key in _META}
    write_json(folder / QUANTISED, quantisation)
    described = {key: value for key, value in config(dense).items() if key != "torch_dtype"}
    write_json(folder / "config.json", described | {"dtype": "float16", "quantization_config": quantisation})
    for path in sorted(dense.iterdir()):
        if path.is_file() and not path.name.startswith("model.safetensors") and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)


def save_adapter(folder: Path, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Add a low-rank adapter to a quantised model's folder, in the format of gptqmodel's `Lora` (that of PEFT).

    Args:
        factors: full module name -> (A [rank, in_features], B [out_features, rank]), added as B A.
    """
    branch = folder / ADAPTER
    branch.mkdir()
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_tensors(branch / "adapter_model.safetensors", tensors, {"format": "pt"})
    rank = len(next(iter(factors.values()))[0])
    targets = sorted({name.rpartition(".")[2] for name in factors})
    described = {"r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    write_json(branch / "adapter_config.json", described | {"peft_type": "LORA", "task_type": "CAUSAL_LM"})


_META = (
    "quantizer",
    "uri",
    "damp_percent",
    "damp_auto_increment",
    "true_sequential",
    "static_groups",
    "act_group_aware",
    "mse",
)
"""Of what gptqmodel notes about the quantisation: what had an effect on the weights."""


def _half(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        return tensor
    half = tensor.half()
    if not half.isfinite().all():
        raise InputError(f"{name} has values up to {tensor.abs().max():.3g}, float16 ends at 65504: it can't be stored")
    return half


def block_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Full module name -> float32 [out_features, in_features] of every matrix of the blocks, dequantised, without adapter."""
    found = {}
    for name, linear in families.block_linears(model).items():
        if isinstance(linear, nn.Linear):
            found[name] = linear.weight.detach().float()
        else:
            from tasks.algorithms import masked_gptq

            found[name] = masked_gptq.dequantised(linear)
    return found


def parameter_count(model: PreTrainedModel) -> int:
    """Weights of the model: those of its matrices count alike whether quantised or not; a low-rank adapter doesn't count."""
    matrices = families.block_linears(model)
    inside = tuple(f"{name}." for name in matrices)
    rest = sum(w.numel() for name, w in model.named_parameters() if not name.startswith(inside))
    biases = sum(linear.bias.numel() for linear in matrices.values() if linear.bias is not None)
    return rest + biases + sum(linear.in_features * linear.out_features for linear in matrices.values())


def write_json(path: Path, content: Any) -> None:
    """Write JSON whose bytes depend on its content alone."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
