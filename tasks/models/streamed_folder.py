"""A model folder as a dense model whose blocks stay on disk until they are asked for, and the same written.

Embedding, head, final norm and what else is outside of the blocks are in memory. A block's weights are read
from safetensors within `layers.opened(block)` and dropped afterwards: memory is that of one block, however many there
are. What is written is an ordinary checkpoint, block by block, in the types that the folder's tensors have. A model may
also be held whole in the types of its file (`load_stored`), and is written in the same way.

accelerate's hooks don't serve here: they bring weights for a forward pass and drop them with all changes, and
algorithms read and change weights between passes. from_pretrained's own offloading copies to disk what isn't float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, heap, layers, matrices, stored_type
from tasks.models import dense_folder, generations, model_files, skeleton, stored_tensors, tensor_files
from tasks.models.stored_tensors import StoredTensors
from tasks.runtime import files

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class StoredBlock:
    """A block's weights in a folder; within a call they are in the block, in float32.

    Changes are gone afterwards: what is to stay is written within the call.

    Attributes:
        tensors: those of the folder.
        prefix: the block's full name there, such as "model.layers.3".
        device: where the weights are put.
    """

    def __init__(self, tensors: StoredTensors, prefix: str, device: torch.device | str) -> None:
        self.tensors, self.prefix, self.device = tensors, prefix, device

    @contextlib.contextmanager
    def __call__(self, block: nn.Module) -> Iterator[None]:
        if not skeleton.missing(block):  # opened already, further out
            yield
            return
        self.load(block, torch.float32)
        try:
            yield
        finally:
            skeleton.empty(block)
            heap.return_freed()

    def load(self, block: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Give the block its weights for good, in this type; None: in those that they are stored in."""
        names = list(block.state_dict())
        found = {name: self.tensors.read(f"{self.prefix}.{name}", dtype).to(self.device) for name in names}
        block.load_state_dict(found, assign=True)


def load_stored(folder: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model of a dense folder, in evaluation mode, whole and in the types of its file; it computes in float32.

    Raises:
        InputError: as `open_dense`.
    """
    model = open_dense(folder, device, stored=True)
    for block in families.blocks(model):
        getattr(block, layers.STORED).load(block)
    stored_type.compute_in_float32(model)
    return model


def open_dense(
    folder: Path,
    device: torch.device | str = "cpu",
    tensors: StoredTensors | None = None,
    outside: bool = True,
    stored: bool = False,
) -> PreTrainedModel:
    """The model of a folder, in evaluation mode, with its blocks on disk; it computes as `load_dense`'s does.

    Args:
        tensors: the model's; None: the folder's as they are stored.
        outside: bring what is outside of the blocks, too; without it the model's weights can be read, and no more.
        stored: what is outside of the blocks stays in memory in the types of the file.

    Raises:
        InputError: tensors are missing, unexpected or of another shape than the config calls for, a file is damaged, a
            text is larger than any model's, or the folder holds two sets of weights.
    """
    from transformers import AutoConfig

    model_files.check_sizes(folder)
    model_files.check_unambiguous(folder)
    model = skeleton.build(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    tensors = tensors or StoredTensors(folder, skeleton.turned(model))
    skeleton.compute_buffers(model, device)
    stored_tensors.compare(tensors.shapes, skeleton.shapes(model), skeleton.tied(model))
    inside = f"{families.of_model(model).blocks}."
    for index, block in enumerate(families.blocks(model)):
        setattr(block, layers.STORED, StoredBlock(tensors, f"{inside}{index}", device))
    if not outside:
        return model.eval()
    found = {}
    for name, (_, source) in _sources(model).items():
        if not name.startswith(inside):
            found[name] = tensors.read(source, None if stored else torch.float32).to(device)
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    if stored:
        stored_type.compute_in_float32(model)
    model.generation_config = generation(folder)
    left = [name for name in skeleton.missing(model) if not name.startswith(inside)]
    if left:
        raise RuntimeError(f"the streamed model has no {left[0]}: its family isn't described fully")
    return model.eval()


class Weights(Mapping[str, Tensor]):
    """The dense weights of the blocks `kept`, under the names that they have in a model of these blocks alone.

    A block is read when one of its weights is asked for, and is held until another one's is.

    Attributes:
        shapes: name -> (out_features, in_features).

    Raises:
        InputError: the model has no such block.
    """

    def __init__(self, folder: Path, kept: Sequence[int]) -> None:
        self._model = open_dense(folder, outside=False)
        blocks = matrices.by_block(self._model)
        if max(kept) >= len(blocks):
            raise InputError(
                f"block {max(kept)} is wanted of a teacher with {len(blocks)}: run stage depth_prune again"
            )
        self._matrices = {
            name: (block, matrix)
            for place, block in enumerate(kept)
            for name, matrix in zip(blocks[place], blocks[block].values(), strict=True)
        }
        self.shapes = {name: matrix.shape for name, (_, matrix) in self._matrices.items()}
        self._held: tuple[int | None, dict[str, Tensor]] = None, {}

    def __getitem__(self, name: str) -> Tensor:
        block, matrix = self._matrices[name]
        if self._held[0] != block:
            self._held = None, {}
            with layers.opened(families.blocks(self._model)[block]):
                inside = {each.name: each.weight for other, each in self._matrices.values() if other == block}
            self._held = block, inside
        return self._held[1][matrix.name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


def drop_outside(model: PreTrainedModel) -> None:
    """Drop embedding, head and final norm: the model's blocks can be opened, and it can't run any more."""
    inside = {id(weight) for block in families.blocks(model) for weight in block.parameters()}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) not in inside:
                module._parameters[name] = nn.Parameter(weight.detach().to("meta"), requires_grad=False)
    heap.return_freed()


class Writer:
    """Writes the blocks of a model into a file that has all else already, in any order."""

    def __init__(self, model: PreTrainedModel, write: Callable[[str, Tensor], None]) -> None:
        self._model, self._write, self._sources = model, write, _sources(model)

    def block(self, index: int) -> None:
        """Write an open block's weights as they are now."""
        prefix = f"{families.of_model(self._model).blocks}.{index}."
        for name, weight in families.blocks(self._model)[index].state_dict(prefix=prefix).items():
            tensors, source = self._sources[name]
            self._write(name, weight.to(tensor_files.DTYPES[tensors.entries[source].dtype]))

    def copy(self) -> None:
        """Write all blocks as they are stored; one tensor is in memory at a time."""
        inside = f"{families.of_model(self._model).blocks}."
        for name, (tensors, source) in self._sources.items():
            if name.startswith(inside):
                self._write(name, tensors.read(source))


@contextlib.contextmanager
def writing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Iterator[Writer]:
    """Write an ordinary checkpoint, as `dense_folder.save_dense`; within this context its blocks are written.

    All of it is in one file, and each weight in the type that it had in the folder that the model was opened from.

    Args:
        model: from `open_dense`, or that with blocks left out.

    Raises:
        RuntimeError: a block has not been written; then the file isn't there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inside, sources = f"{families.of_model(model).blocks}.", _sources(model)
    entries = {name: tensors.entries[source] for name, (tensors, source) in sources.items()}
    turned = set(skeleton.turned(model))
    laid_out = {name: stored_tensors.turn(entry) if name in turned else entry for name, entry in entries.items()}
    with tensor_files.writing(folder / model_files.SINGLE, laid_out, {"format": "pt"}) as put:

        def write(name: str, tensor: Tensor) -> None:
            put(name, tensor.T if name in turned else tensor)

        for name, (tensors, source) in sources.items():
            if not name.startswith(inside):
                write(name, tensors.read(source))
        yield Writer(model, write)
    model.save_pretrained(folder, state_dict={})  # its texts, as the library writes them, and no weights
    tokenizer.save_pretrained(folder)
    stored = tensor_files.DTYPES[entries[f"{families.of_model(model).embedding}.weight"].dtype]
    files.write_json(folder / model_files.CONFIG, dense_folder.config(folder) | {"dtype": str(stored).split(".")[1]})
    generations.rewrite(folder)


def rest(model: PreTrainedModel, matrices: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Name -> dimensions of all weights but these matrices', in the model's order; a tied head is the embedding.

    Args:
        model: from `open_dense`.
        matrices: full names of modules.
    """
    found = {name: tuple(tensors.entries[source].shape) for name, (tensors, source) in _sources(model).items()}
    return {name: shape for name, shape in found.items() if name.removesuffix(".weight") not in matrices}


def value(model: PreTrainedModel, name: str) -> Tensor:
    """A weight of the model in float32: as it is in memory, or else in the folder."""
    held = model.get_parameter(name)
    if not held.is_meta:
        return held.detach()
    tensors, source = _sources(model)[name]
    return tensors.read(source, torch.float32)


def _sources(model: PreTrainedModel) -> Mapping[str, tuple[StoredTensors, str]]:
    """Name of each weight -> the folder's tensors, and its name there. A tied matrix is listed as the embedding."""
    blocks, inside = families.blocks(model), f"{families.of_model(model).blocks}."
    tensors, tied = getattr(blocks[0], layers.STORED).tensors, skeleton.tied(model)
    found = {}
    for name in skeleton.shapes(model):
        if name in tied[1:]:
            continue
        source = name
        if name.startswith(inside):
            index, _, rest = name.removeprefix(inside).partition(".")
            source = f"{getattr(blocks[int(index)], layers.STORED).prefix}.{rest}"
        elif name in tied and name not in tensors.entries:
            source = tied[1]
        found[name] = tensors, source
    return found


def generation(folder: Path) -> GenerationConfig:
    """The folder's settings for generation as `from_pretrained` finds them: in their own file, or in the config."""
    from transformers import GenerationConfig

    if (folder / model_files.GENERATION).exists():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_pretrained(
        folder, config_file_name=model_files.CONFIG, local_files_only=True, _from_model_config=True
    )
