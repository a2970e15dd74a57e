"""Make the one folder to ship: the final model packed without loss, and a manifest of what each file is and whence.

Nothing is rounded here: what the shipped file gives back is compared with what went in, block by block, and the
sparsity ledger is taken from it. A model that broke its pattern is packed as a dense one where `wanda.enforce` allows
that at all. The folder is read by `tasks.packed.reader.load_model`; stock libraries load the stage eora's.

The manifest's lineage holds what this stage's declared inputs and parameters fix, so that the same inputs give the same
bytes: source, parameters of every stage, hashes. When, where and by which packages is in data/lineage
(`edgepress lineage show`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.algorithms.model.shape import shape_of_config
from tasks.models import dense_folder, mask_files, sparsity_ledger, tokenizer_archive
from tasks.models.tokenizer_files import copy_tokenizer
from tasks.packed import reader, sizes, source_folder, writer
from tasks.parameters import rules
from tasks.parameters.section import AUTO, Section
from tasks.runtime import files

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from tasks.packed.stored_model import Linear
    from tasks.parameters.schema import Gptq, Wanda
    from tasks.runtime.stage import Stage

MANIFEST = "manifest.json"


def run(stage: Stage) -> None:
    """Pack the model and its tokenizer, read the file back, write manifest and sparsity.csv.

    Raises:
        InputError: a pruned weight is no longer zero, and wanda.enforce is true; the codes of embedding or adapter
            aren't those of the model.
    """
    source, folder = stage.model_in, stage.output("package/model")
    keep = mask_files.StoredMasks(stage.input("masks.safetensors"))
    pattern = keep.pattern
    codes = stage.input("embedding.safetensors"), stage.input("adapter.safetensors")
    holds = sparsity_ledger.check(
        _ledger(source_folder.read(source).blocks, keep, pattern), "package", stage.params.wanda.enforce
    )
    model = source_folder.read(source, stage.input("masks.safetensors") if holds else None, *codes)
    coding = stage.params.package.coding
    writer.save(model, folder, coding)
    copy_tokenizer(source, folder)
    if coding == "entropy":
        tokenizer_archive.pack(folder)
    table = _ledger(lossless(folder, model.blocks), keep, pattern)
    sparsity_ledger.write(table, stage.output("sparsity.csv"))
    manifest = _manifest(stage, folder, pattern if holds else "dense", len(keep) if holds else 0)
    write_manifest(folder, manifest)
    total, bound = sum(entry["bytes"] for entry in manifest["files"].values()), sum(manifest["bound"].values())
    print(
        f"{len(manifest['files'])} files, {total} bytes (their content is at least {bound:.0f}); pattern "
        f"{manifest['pattern']}: {int(table['violations'].sum() + table['revived'].sum())} violations as shipped"
    )


def skip(stage: Stage) -> None:
    """Pass the model on, with a manifest that names no file."""
    folder = stage.output("package/model")
    stage.pass_on(stage.model_in, folder)
    write_manifest(folder, {"files": {}, "pattern": None, "pruned_matrices": 0, "lineage": {}})
    sparsity_ledger.write_empty(stage.output("sparsity.csv"))


def lossless(folder: Path, blocks: Iterable[Mapping[str, Linear]]) -> Iterator[dict[str, Linear]]:
    """A packed folder's blocks, one after another, each compared with what was packed, bit by bit.

    Raises:
        RuntimeError: they differ, which is a bug in the format.
    """
    for (index, shipped), given in zip(reader.stream(folder), blocks, strict=True):
        for name, linear in given.items():
            if not shipped[name].values().equal(linear.values()) or shipped[name].rank != linear.rank:
                raise RuntimeError(f"{name} of block {index} is not what was packed into {folder}")
        yield shipped


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json without blanks: it is shipped, too."""
    text = json.dumps(manifest, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def describe(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


def asked(wanda: Wanda, gptq: Gptq) -> str:
    """The pattern that the parameters ask for."""
    if gptq.enabled and gptq.joint:
        return f"{gptq.joint.keep}:{gptq.joint.of}"
    if not wanda.enabled:
        return "dense"
    return f"{wanda.keep}:{wanda.of}" if wanda.pattern == "n_m" else wanda.pattern


def _ledger(blocks: Iterable[Mapping[str, Linear]], keep: Mapping[str, Tensor], pattern: str) -> pd.DataFrame:
    weights = ({name: linear.values() for name, linear in linears.items()} for linears in blocks)
    return sparsity_ledger.ledger_of_blocks(weights, keep, pattern)


def _manifest(stage: Stage, folder: Path, pattern: str, pruned: int) -> dict[str, Any]:
    """bound: bytes that each component must hold, by what is known of its content (`packed.sizes.bound`)."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "files": {str(path.relative_to(folder)): describe(path) for path in paths},
        "bound": {name: bits / 8 for name, bits in sizes.bound(folder).items()},
        "pattern": pattern,
        "asked": asked(_settled(stage)["wanda"], stage.params.gptq),
        "pruned_matrices": pruned,
        "lineage": _lineage(stage),
    }


def _lineage(stage: Stage) -> dict[str, Any]:
    parameters = {name: section.model_dump() for name, section in _settled(stage).items()}
    inputs = ("masks.safetensors", "embedding.safetensors", "adapter.safetensors", "source.json", "removed.json")
    return {
        "source": json.loads(stage.input("source.json").read_text(encoding="utf-8")),
        "parameters": {name: values for name, values in sorted(parameters.items())},
        "inputs": {name: describe(stage.input(name))["sha256"] for name in inputs},
    }


def _settled(stage: Stage) -> dict[str, Section]:
    """The sections with the values that the stages before had for `auto`."""
    shape = shape_of_config(dense_folder.config(stage.model_in))
    found = {}
    for name, section in vars(stage.params).items():
        if name == "depth_prune" and section.remove == AUTO:  # its rule counts layers, and here they are gone
            removed = json.loads(stage.input("removed.json").read_text(encoding="utf-8"))["removed"]
            section = section.model_copy(update={"remove": len(removed)})
        if isinstance(section, Section):
            found[name] = rules.settle(section, shape, stage.params.device)
    return found
