"""Does a model of this config survive what the pipeline does to models? Tried on two blocks of it with random weights.

A family is found by inspection (`tasks.algorithms.model.inspection`), and what inspection took wrongly would ruin a
result in silence. So before its weights are read: blocks that are run alone give what the model gives; a removed block
leaves what the model says without it; what is written is what stock transformers loads; packed and read back, every
weight has its bits. Sizes are cut down, too, where the config allows it. Families known by heart are left out: tests
hold them to all of that.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import device, families, head, inspection, layers, masks, matrices
from tasks.algorithms.model.shape import ModelShape, shape_of_config
from tasks.algorithms.pruning import depth_prune
from tasks.models import dense_folder, generations, skeleton, streamed_folder, tensor_files
from tasks.packed import reader, source_folder, writer

VOCABULARY, WIDE, HEAD, KEPT = 64, 256, 32, 2
"""Of the small model: tokens; values of the hidden states up to which they aren't cut; values of a head; blocks."""
LARGEST = 2**28
"""Weights of what is tried: the config is untrusted."""
TOLERANCE = 1e-4
"""Of the largest logit: other orders of sums."""
INNER = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""What configs call the MLP's width."""


def check(config: Mapping[str, Any]) -> None:
    """Try a config.

    Raises:
        InputError: a step fails; it is named.
    """
    if families.known(config) is not None:
        return
    name = inspection.inspect(config).family.architecture
    with tempfile.TemporaryDirectory() as scratch, device.seeded(0):
        small = None
        for step, tried in STEPS.items():
            try:
                small = small or _small(config)
                problem = tried(copy.deepcopy(small), Path(scratch))
            except Exception as error:  # any family can break any step in its own way
                problem = " ".join(str(error).split())[:200]
            if problem:
                raise InputError(f"{name} is not supported: the check `{step}` fails ({problem})")


def _small(config: Mapping[str, Any]) -> PreTrainedModel:
    """A random model of the first and the last block of a config, as transformers makes it."""
    kind, own = inspection.read(config)
    shape = shape_of_config(config)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(own, key, None) is not None:
            setattr(own, key, 0)
    own.vocab_size = VOCABULARY
    if shape.layers > KEPT:
        with torch.device("meta"):
            whole = kind._from_config(copy.deepcopy(own))
        own = depth_prune.without(whole, range(1, shape.layers - 1)).config
    sides = shape.linears.values()
    for each in (_narrow(own, shape, HEAD), _narrow(own, shape, None), own):
        try:
            found = inspection.inspect({**each.to_dict(), "architectures": [kind.__name__]})
        except InputError:
            continue
        if found.family.linears == shape.family.linears:
            own, sides = each, found.linears.values()
            break
    if KEPT * sum(rows * columns for rows, columns in sides) > LARGEST:
        raise InputError(f"two blocks have more than {LARGEST} weights, and can't be cut down")
    model = kind._from_config(own, dtype=torch.float32)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight) if weight.ndim == 1 else 0.02 * torch.randn_like(weight)
    model.tie_weights()
    return model.eval()


def _narrow(config: Any, shape: ModelShape, head_dim: int | None) -> Any:
    """The config with fewer heads, of another size or of their own, and less wide; not every family allows it."""
    found = copy.deepcopy(config)
    if shape.hidden <= WIDE:
        return found
    kv_heads = min(shape.kv_heads, 2)
    heads = kv_heads * min(shape.heads // shape.kv_heads, 2)
    hidden = heads * head_dim if head_dim else shape.hidden * heads // shape.heads
    sizes = {"num_attention_heads": heads, "hidden_size": hidden, "word_embed_proj_dim": hidden}
    sizes |= dict.fromkeys(("num_key_value_heads", "num_kv_heads"), kv_heads)
    sizes |= {key: 2 * hidden for key in INNER}
    sizes |= {"head_dim": head_dim} if head_dim else {}
    for key, value in sizes.items():
        if getattr(found, key, None):
            with contextlib.suppress(AttributeError):  # Falcon's head_dim follows from the others
                setattr(found, key, value)
    return found


def _tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _said(model: PreTrainedModel) -> Tensor:
    return model(input_ids=_tokens()).logits.float()


def _differ(found: Tensor, expected: Tensor) -> str | None:
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if difference <= TOLERANCE * largest:
        return None
    return f"logits differ by {difference:.3g}, the largest is {largest:.3g}"


@torch.no_grad()
def _causal(model: PreTrainedModel, _: Path) -> str | None:
    """What a model says of a token doesn't depend on those behind it."""
    changed = _tokens()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    return _differ(model(input_ids=changed).logits[:, :-1].float(), _said(model)[:, :-1])


@torch.no_grad()
def _alone(model: PreTrainedModel, _: Path) -> str | None:
    expected = _said(model)
    skeleton.with_linears(model)
    if problem := _differ(_said(model), expected):
        return problem
    last = layers.walk(model, _tokens(), lambda *_: None)
    return _differ(head.of(model)(head.finished(model, last)), expected)


def _removed(model: PreTrainedModel, scratch: Path) -> str | None:
    whole, smaller = scratch / "whole", scratch / "smaller"
    _write(model, whole)
    with streamed_folder.writing(depth_prune.without(streamed_folder.open_dense(whole), [0]), _None(), smaller) as file:
        file.copy()
    outputs = families.of_model(model).outputs
    families.blocks(model)[0].forward = lambda hidden, *_, **__: (
        (hidden, *(None,) * (outputs - 1)) if outputs else hidden
    )
    return _differ(_said(_stock(smaller)), _said(model))


def _tied(model: PreTrainedModel, scratch: Path) -> str | None:
    expected = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for each in (_stock(scratch / "smaller"), streamed_folder.open_dense(scratch / "smaller")):
        if (each.get_output_embeddings().weight is each.get_input_embeddings().weight) != expected:
            return "embedding and head were " + ("tied, and are no longer" if expected else "two, and are tied")
    return None


def _packed(model: PreTrainedModel, scratch: Path) -> str | None:
    """Pruned to half, written, packed and read back."""
    pruned, folder, keep = streamed_folder.open_dense(scratch / "whole"), scratch / "pruned", {}
    with streamed_folder.writing(pruned, _None(), folder) as file:
        for index, (block, inside) in enumerate(zip(families.blocks(pruned), matrices.by_block(pruned), strict=True)):
            with layers.opened(block):
                for name, matrix in inside.items():
                    keep[name] = torch.rand(matrix.shape) < 0.5
                    matrix.weight.masked_fill_(~keep[name], 0.0)
                file.block(index)
    shapes = {name: ",".join(map(str, mask.shape)) for name, mask in keep.items()}
    packed_masks = {name: masks.pack(mask) for name, mask in keep.items()}
    tensor_files.save_tensors(scratch / "masks.safetensors", packed_masks, {"pattern": "unstructured", **shapes})
    writer.save(source_folder.read(folder, scratch / "masks.safetensors"), scratch / "packed")
    found, expected = reader.load_model(scratch / "packed"), dense_folder.load_dense(folder)
    theirs = expected.state_dict()
    for name, weight in found.state_dict().items():
        if not torch.equal(weight, theirs[name]):
            return f"{name} is another one after packing"
    return _differ(_said(found), _said(_stock(folder)))


def _write(model: PreTrainedModel, folder: Path) -> None:
    """The model in the names that its modules have."""
    state = model.state_dict()
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        state.pop(f"{families.of_model(model).head}.weight")
    folder.mkdir()
    tensor_files.save_tensors(folder / "model.safetensors", state, {"format": "pt"})
    model.save_pretrained(folder, state_dict={})
    generations.rewrite(folder)


def _stock(folder: Path) -> PreTrainedModel:
    """The model that transformers loads, nothing changed."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()


class _None:
    """No tokenizer."""

    def save_pretrained(self, folder: Path) -> None:
        pass


STEPS: dict[str, Callable[[PreTrainedModel, Path], str | None]] = {
    "a token doesn't depend on those behind it": _causal,
    "its blocks run alone give what the model gives": _alone,
    "without a block it says what it says where that does nothing": _removed,
    "tied stays tied, and untied untied": _tied,
    "pruned, packed and read back it is the same": _packed,
}
"""Each gets a copy of the small model and a folder that all share, in this order; what it returns is what is wrong."""
