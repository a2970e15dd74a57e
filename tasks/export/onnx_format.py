"""Export to ONNX Runtime GenAI: its model builder draws the graph, the package's codes and scales replace the weights.

`int4` makes every quantised linear a MatMulNBits node, the embedding a GatherBlockQuantized node and the tied head a
MatMulNBits of the same codes: nothing is quantised again. An EoRA adapter is part of the model, so it becomes two more
MatMul beside its linear and no GenAI adapter, which would be there to be switched. Weights and scales whose values fit
float16 are stored so, with a Cast that the engine folds when it loads. `int8` is the other choice: ONNX Runtime's
dynamic quantisation of the float32 graph, adapters merged.

Pruned weights are stored as the code of zero: the operators know no sparsity. The builder draws what it has kernels
for (`onnx_families`). It computes in float32, as the PyTorch model does; no GPU formats are written.

https://onnxruntime.ai/docs/genai, and the operators' contract: docs/ContribOperators.md of ONNX Runtime
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from tasks.algorithms.errors import InputError
from tasks.export import onnx_families, source_model
from tasks.export.onnx_families import FUSED, PLACES, check  # noqa: F401  check: of every format
from tasks.export.source_model import Change, Source
from tasks.models.tokenizer_files import copy_tokenizer
from tasks.packed.stored_model import Linear
from tasks.runners import onnx_runtime  # noqa: F401  before ONNX Runtime
from tasks.runtime import refusals

MODEL = "model.onnx"
CONFIG = "genai_config.json"
CONTRIB = "com.microsoft"
_BLOCKS = 16, 256
"""Block sizes that MatMulNBits takes."""
_ONE_FILE = 2**30
"""Bytes of tensors beyond which they go into a file of their own: one of protobuf ends at 2 GiB."""
_ROTARY = {"rotary embedding": Change("tables of its cosines and sines for the whole context", "rotary")}


def int4(source: Source, folder: Path) -> dict[str, Change]:
    """Write model.onnx, genai_config.json and the tokenizer.

    Returns:
        What the format could not express -> what was done instead, to be said in export.json.

    Raises:
        InputError: the builder has no graph for the model.
    """
    fused = all(_alike(_beside(block)) for block in source.blocks)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        graph = _Graph(_draw(source, Path(scratch), fused, merged=False))
        for index, block in enumerate(source.blocks):
            for place, linears in _products(index, block, fused):
                graph.replace(place, linears)
        graph.replace_tables(source.embedding, source.head)
        graph.save(folder)
        _finish(source, graph.path.parent, folder)
    return source_model.densified(source) | graph.notes | _ROTARY


def int8(source: Source, folder: Path) -> dict[str, Change]:
    """The same by ONNX Runtime's dynamic quantisation: int8 weights per output, activations per call.

    Returns, raises: as `int4`.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        drawn = _draw(source, Path(scratch), fused=True, merged=True, shared=False)
        options = {"DefaultTensorType": TensorProto.FLOAT, "MatMulConstBOnly": True}
        quantize_dynamic(drawn, folder / MODEL, per_channel=True, weight_type=QuantType.QInt8, extra_options=options)
        _finish(source, drawn.parent, folder)
        copy_tokenizer(source.folder, folder)
    again = "quantised again to int8, one scale per output; activations per call"
    notes = {"codes and scales": Change(again, "values", exact=False)}
    if any(linear.adapter for linear in source.linears.values()):
        notes["adapter"] = Change("merged into its linears before they were quantised", "adapter", exact=False)
    if source.head is None:
        notes["tied head"] = Change("stored twice: as embedding, and transposed as head", "embedding")
    return source_model.densified(source) | notes | _ROTARY


def _finish(source: Source, drawn: Path, folder: Path) -> None:
    """What the engine reads beside the graph."""
    shutil.copyfile(drawn / CONFIG, folder / CONFIG)
    copy_tokenizer(source.folder, folder)


def codes(folder: Path) -> dict[str, np.ndarray]:
    """Name of a MatMulNBits product -> the unsigned codes [out_features, in_features] that the exported file holds."""
    model = onnx.load(folder / MODEL)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            words, bits = numpy_helper.to_array(tensors[node.input[1]]), _attribute(node, "bits")
            low_first = words if bits == 8 else np.stack([words & 15, words >> 4], axis=-1)
            found[node.name] = low_first.reshape(len(words), -1)
    return found


def component_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the graph's constants by what they are for, with the names of `layout.COMPONENTS`, and `rotary`."""
    found = dict.fromkeys(("values", "scales", "zeros", "embedding", "norms", "adapter", "rotary"), 0)
    graph = onnx.load(folder / MODEL).graph
    for tensor in graph.initializer:
        found[_component(tensor.name)] += len(tensor.raw_data)
    return found


def _component(name: str) -> str:
    last = name.rpartition(".")[2]
    if name.startswith(("cos_cache", "sin_cache")):
        return "rotary"
    if name.startswith(("embedding", "lm_head", "model.embed_tokens")):
        return "embedding"
    if "norm" in name or last == "bias":
        return "norms"
    if last in ("scales", "zeros"):
        return last
    if name.endswith("_scale"):  # of dynamic quantisation
        return "scales"
    if name.endswith("_zero_point"):
        return "zeros"
    return "adapter" if last in ("a", "b") else "values"


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == name)


def _draw(source: Source, scratch: Path, fused: bool, merged: bool, shared: bool = True) -> Path:
    """The builder's float32 graph in a folder below `scratch`; its genai_config.json is put beside it.

    Raises:
        InputError: the builder refuses the model.
    """
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    dense, drawn = scratch / "dense", scratch / "drawn"
    source_model.write_dense(source, dense, merged)
    options = [f"fuse_qkv={str(fused).lower()}", "hf_token=false"]
    options += ["shared_embeddings=true"] if shared and source.head is None else []
    names = ("", str(dense), str(drawn), "fp32", "cpu", str(scratch / "cache"))
    with _written_by_python(), contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            parsed = parse_extra_options(*names, options)
            onnx_families.as_the_builder_reads(parsed["hf_details"]["hf_config"])
            create_model(*names, **parsed)
        except Exception as error:  # it refuses a model with whatever its parts raise
            if refusals.number(error) in refusals.DISK:
                raise
            what = ", ".join(source.config.get("architectures", []))
            raise InputError(f"ONNX Runtime GenAI can't draw {what} ({str(error)[:200]}): export to gguf") from error
    return drawn / MODEL


@contextlib.contextmanager
def _written_by_python() -> Iterator[None]:
    """Let onnx_ir (1.1.0) write a tensor's bytes by Python, which says where the disk doesn't take them.

    Else it calls numpy's `tofile` (2.2.6), which says nothing of the last bytes and names no cause of the others.
    """
    before = onnx_ir._core._supports_fileno
    onnx_ir._core._supports_fileno = lambda _: False
    try:
        yield
    finally:
        onnx_ir._core._supports_fileno = before


def _products(index: int, block: dict[str, Linear], fused: bool) -> Iterator[tuple[str, list[Linear]]]:
    """(name of the builder's MatMul, the linears that it computes side by side)."""
    together = _beside(block)
    if fused and together:
        yield f"/model/layers.{index}/attn/qkv_proj/MatMul", together
    for name, linear in block.items():
        last = name.rpartition(".")[2]
        if last in FUSED:
            yield from () if fused else ((f"/model/layers.{index}/attn/{last}/MatMul", [linear]),)
            continue
        places = PLACES[last]
        rows = linear.shape[0] // len(places)
        for part, place in enumerate(places):
            cut = source_model.part(linear, slice(part * rows, (part + 1) * rows))
            yield f"/model/layers.{index}/{place}/MatMul", [cut]


def _beside(block: dict[str, Linear]) -> list[Linear]:
    """Query, key and value, where they are linears of their own."""
    return [linear for name, linear in block.items() if name.rpartition(".")[2] in FUSED]


def _alike(linears: list[Linear]) -> bool:
    """Whether the linears can be one product: the same widths and blocks, zero points and biases."""
    return len({(x.bits, x.group_size, x.zeros is None, x.group_index is None, x.bias is None) for x in linears}) <= 1


class _Graph:
    """The builder's graph, product by product rewritten.

    Args:
        path: of the drawn model.onnx; genai_config.json and tensors lie beside it until `save`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.load(path, load_external_data=False)
        self.graph = self.model.graph
        self.nodes = {node.name: node for node in self.graph.node}
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self.before: dict[str, list[onnx.NodeProto]] = {}
        self.after: dict[str, list[onnx.NodeProto]] = {}
        self.first: list[onnx.NodeProto] = []
        self.notes: dict[str, Change] = {}

    def replace(self, place: str, linears: list[Linear]) -> None:
        """Make a MatMul node one of the linears' codes, side by side, with their adapters beside it."""
        node, name = self.nodes[place], place.strip("/").replace("/", ".")
        if linears[0].codes is not None:
            size = source_model.block_size(linears[0], *_BLOCKS)
            if size is None:
                done = Change("their linears are dequantised to float32", "values")
                self.notes["groups that are no runs of 16 inputs or more"] = done
            else:
                self._nbits(node, name, linears, size)
        branches = [source_model.factors(linear) for linear in linears]
        if any(branches):
            self.notes["adapter"] = Change("two products beside each linear, factors dequantised", "adapter")
            self._branch(node, name, linears, branches)

    def replace_tables(self, embedding: Linear, head: Linear | None) -> None:
        """The same of the head; the embedding's Gather takes the codes of a tied head, or its own."""
        gather, last = self.nodes["/model/embed_tokens/Gather"], self.nodes["/lm_head/MatMul"]
        size = source_model.block_size(embedding, *_BLOCKS)
        if head is not None and source_model.block_size(head, *_BLOCKS):
            self._nbits(last, "lm_head", [head], source_model.block_size(head, *_BLOCKS))
        if size is None:
            return
        self._nbits(last if head is None else None, "embedding", [embedding], size)
        done = "scale times code in float32, where PyTorch rounds the product to float16"
        self.notes["head"] = Change(done, "embedding", exact=False)
        bits = _width(embedding)
        flat = np.array([embedding.shape[0], embedding.shape[1] * bits // 8], np.int64)
        self.add("embedding.shape", flat)
        reshape = helper.make_node("Reshape", ["embedding.codes", "embedding.shape"], ["embedding.rows"])
        output = gather.output[0]
        inputs, half = ["embedding.rows", gather.input[1], "embedding.scales"], f"{output}/half"
        gather.CopyFrom(
            helper.make_node(
                "GatherBlockQuantized", inputs, [half], gather.name, domain=CONTRIB,
                bits=bits, block_size=size, gather_axis=0, quantize_axis=1,
            )
        )  # fmt: skip
        self.before[gather.name] = [reshape]
        self.after[gather.name] = [helper.make_node("Cast", [half], [output], to=TensorProto.FLOAT)]

    def add(self, name: str, values: np.ndarray) -> None:
        """An initializer."""
        self.tensors[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)

    def constant(self, name: str, values: Tensor) -> str:
        """A float32 constant, stored in float16 where that is exact; its name in the graph."""
        half = values.half()
        if not torch.equal(half.float(), values.float()):
            self.add(name, values.float().numpy())
            return name
        self.add(name, half.numpy())
        self.first.append(helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT))
        return f"{name}.float"

    def _nbits(self, node: onnx.NodeProto | None, name: str, linears: list[Linear], size: int) -> None:
        """MatMulNBits of the codes, with the node's input and output; without a node the constants alone."""
        bits, (_, cols) = _width(linears[0]), linears[0].shape
        words = np.concatenate([_blob(linear, bits, size) for linear in linears])  # [out, blocks, bytes]
        scales = torch.cat([source_model.block_scales(linear, size) for linear in linears])
        self.add(f"{name}.codes", words)
        self.notes["scales"] = Change("float16 for each block of inputs, on no grid", "scales")
        if node is None:
            self.add(f"{name}.scales", scales.numpy())
            return
        inputs = [node.input[0], f"{name}.codes", self.constant(f"{name}.scales", scales.float())]
        if linears[0].zeros is not None:
            zeros = [linear.zeros.repeat_interleave(linear.group_size // size, dim=1) for linear in linears]
            self.add(f"{name}.zeros", _nibbles(torch.cat(zeros).numpy()) if bits == 4 else torch.cat(zeros).numpy())
            inputs.append(f"{name}.zeros")
        node.CopyFrom(
            helper.make_node(
                "MatMulNBits", inputs, list(node.output), node.name, domain=CONTRIB,
                K=cols, N=len(words), bits=bits, block_size=size, accuracy_level=1,
            )
        )  # fmt: skip

    def _branch(self, node: onnx.NodeProto, name: str, linears: list[Linear], branches: list) -> None:
        """Add x A^T B^T to the node's output; of linears side by side A is stacked and B has blocks on the diagonal."""
        x, output = node.input[0], node.output[0]
        a = torch.cat([branch[0] for branch in branches if branch])  # [ranks, in]
        b = torch.zeros(sum(linear.shape[0] for linear in linears), len(a))  # [out, ranks]
        row = column = 0
        for linear, branch in zip(linears, branches, strict=True):
            if branch:
                b[row : row + linear.shape[0], column : column + linear.rank] = branch[1]
            row, column = row + linear.shape[0], column + linear.rank
        node.output[0] = f"{output}/base"
        pairs = (("a", x, a.T, f"{name}.xa"), ("b", f"{name}.xa", b.T, f"{name}.xab"))
        self.after[node.name] = [
            helper.make_node("MatMul", [given, self.constant(f"{name}.{part}", factor.contiguous())], [made])
            for part, given, factor, made in pairs
        ] + [helper.make_node("Add", [f"{output}/base", f"{name}.xab"], [output])]

    def save(self, folder: Path) -> None:
        """Write the graph without what nothing reads; weights that are left of the builder's in float16 if exact."""
        nodes = [part for node in self.graph.node for part in self._around(node)]
        nodes = _alive(nodes, [output.name for output in self.graph.output])
        for name in dict.fromkeys(name for node in nodes for name in node.input):
            self._take(name, nodes)
        nodes = _alive(self.first + nodes, [output.name for output in self.graph.output])
        used = {name for node in nodes for name in node.input}
        tensors = [tensor for name, tensor in self.tensors.items() if name in used]
        for repeated, values in (("node", nodes), ("initializer", tensors), ("value_info", ())):
            del getattr(self.graph, repeated)[:]
            getattr(self.graph, repeated).extend(values)
        # the builder (0.18.0) adds the commit of the repository that it is installed in: this project's, say
        self.model.producer_version = importlib.metadata.version("onnxruntime-genai")
        large = sum(len(tensor.raw_data) for tensor in tensors) > _ONE_FILE
        onnx.save_model(
            self.model, folder / MODEL, save_as_external_data=large, location=f"{MODEL}.data", size_threshold=1024
        )

    def _around(self, node: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
        return [*self.before.get(node.name, ()), node, *self.after.get(node.name, ())]

    def _take(self, name: str, nodes: list[onnx.NodeProto]) -> None:
        """Read an initializer of the builder that is still used, and have it stored in float16 where that is exact."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.data_location != TensorProto.EXTERNAL:
            return
        values = torch.from_numpy(numpy_helper.to_array(tensor, str(self.path.parent)).copy())
        replaced = name if values.dtype != torch.float32 else self.constant(name, values)
        if values.dtype != torch.float32:
            self.add(name, values.numpy())
        for node in nodes if replaced != name else ():
            for place, given in enumerate(node.input):
                if given == name:
                    node.input[place] = replaced


def _alive(nodes: list[onnx.NodeProto], outputs: list[str]) -> list[onnx.NodeProto]:
    """The nodes, in their order, that an output depends on."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def _width(linear: Linear) -> int:
    """Of the operators' codes: 4 or 8."""
    return 4 if linear.bits <= 4 else 8


def _blob(linear: Linear, bits: int, size: int) -> np.ndarray:
    """uint8 [out_features, blocks, bytes]: codes around the middle one, or as they are where there are zero points."""
    centred = linear.zeros is None
    codes = (source_model.steps(linear) + 2 ** (bits - 1)).to(torch.uint8) if centred else linear.codes
    blocks = codes.numpy().reshape(len(codes), -1, size)
    return _nibbles(blocks) if bits == 4 else blocks


def _nibbles(values: np.ndarray) -> np.ndarray:
    """uint8 […, ceil(n / 2)] of uint8 […, n] below 16, the even ones in the low half."""
    padded = values if values.shape[-1] % 2 == 0 else np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    pairs = padded.reshape(*padded.shape[:-1], math.ceil(values.shape[-1] / 2), 2)
    return pairs[..., 0] | pairs[..., 1] << 4
