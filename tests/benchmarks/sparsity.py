"""Does the sparsity pattern outlive every stage? Violations and revived weights, mask-aware chain and stock chain.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.sparsity --threads 1 [--model stories260k] [--only 2:4]

Per pattern the same pruned model goes through
- `mask-aware`: the pipeline (wanda, lora, gptq, eora, package);
- `stock LoRA`: LoRA without masks, merged by PEFT's `merge_and_unload` with nothing applied after it (the real lora
  stage, given an empty file of masks), then GPTQ as gptqmodel ships it, then EoRA;
- `stock GPTQ`: GPTQ as shipped, on the mask-aware recovered model: what GPTQ alone does;
- `stock GPTQ, zeroed`: the same weights multiplied by the masks afterwards, evaluated densely: what it costs to mend
  the pattern after GPTQ instead of within it. Its line to compare with is mask-aware gptq.
groups, violations (groups with more non-zeros than the pattern allows) and revived (weights outside wanda's mask that
aren't zero) are counted here, on the weights as loaded from the folder and against wanda's masks;
ledger_violations and ledger_revived are the sums of the stage's own sparsity.csv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from tasks.algorithms.model import families, masks
from tasks.models import dense_folder, gptq_folder, mask_files
from tasks.runners import any_folder
from tests.benchmarks.chain import Chain
from tests.benchmarks.table import Row, Subject, main

PATTERNS: dict[str, dict[str, Any]] = {
    "2:4": {"wanda.pattern": "n_m", "wanda.keep": 2, "wanda.of": 4},
    "4:8": {"wanda.pattern": "n_m", "wanda.keep": 4, "wanda.of": 8},
    "7:8": {"wanda.pattern": "n_m", "wanda.keep": 7, "wanda.of": 8},
    "unstructured 50 %": {"wanda.pattern": "unstructured", "wanda.sparsity": 0.5},
}
MASK_AWARE = ("wanda", "lora", "gptq", "eora", "package")
STOCK_LORA = ("lora", "gptq", "eora")
STOCK = {"wanda.enforce": False, "gptq.masked": False, "gptq.descent_cycles": 0}
COLUMNS = [
    "pattern",
    "chain",
    "stage",
    "groups",
    "violations",
    "revived",
    "ledger_violations",
    "ledger_revived",
    "zeros",
    "ppl_test",
    "ppl_ood",
]


def rows(base: Chain, subject: Subject) -> Iterator[Row]:
    """Every pattern, chain and stage."""
    for pattern, params in PATTERNS.items():
        ours = base.variant(params)
        for stage in MASK_AWARE:
            yield _named(pattern, "mask-aware", stage), partial(counted, ours, stage, ours)
        for stage in STOCK_LORA:
            yield (
                _named(pattern, "stock LoRA", stage),
                lambda ours=ours, stage=stage: counted(plain_lora(ours), stage, ours),
            )
        yield _named(pattern, "stock GPTQ", "gptq"), lambda ours=ours: counted(plain_gptq(ours), "gptq", ours)
        yield _named(pattern, "stock GPTQ, zeroed", "gptq"), partial(zeroed, ours)


def plain_lora(ours: Chain) -> Chain:
    """The same pruned model, recovered by a LoRA that knows no masks."""
    empty = ours.derive("no-masks", {}, lambda folder: mask_files.save_masks(folder / "masks.safetensors", {}, "dense"))
    unknown = {("lora", "data/wanda/masks.safetensors"): empty / "masks.safetensors"}
    return ours.variant({**STOCK, "lora.method": "masked"}, _pruned(ours) | unknown)


def plain_gptq(ours: Chain) -> Chain:
    """The same recovered model (not computed again), quantised by GPTQ as shipped."""
    recovered = {("gptq", "data/lora/model"): ours.output("lora") / "model"}
    return ours.variant(STOCK, _pruned(ours) | recovered)


def counted(chain: Chain, stage: str, ours: Chain) -> Mapping[str, Any]:
    """Counts of a stage's model against wanda's masks of `ours`, and its perplexities."""
    folder = chain.output(stage)
    keep, pattern = mask_files.load_masks(ours.output("wanda") / "masks.safetensors")
    weights = dict(any_folder.block_weights(any_folder.load_model(folder / "model")))
    perplexity = chain.perplexity(stage)
    return {
        **count(weights, keep, pattern),
        **_ledger(folder / "sparsity.csv"),
        "ppl_test": perplexity["test"],
        "ppl_ood": perplexity["test_ood"],
    }


def zeroed(ours: Chain) -> Mapping[str, Any]:
    """Stock GPTQ's dequantised weights times the masks, as a dense model."""
    source, mask_file = plain_gptq(ours).output("gptq") / "model", ours.output("wanda") / "masks.safetensors"
    keep, pattern = mask_files.load_masks(mask_file)

    def make(folder: Path) -> None:
        model = gptq_folder.load_dequantised(source)
        del model.config.quantization_config  # the weights are ordinary ones now
        multiply(families.block_linears(model), keep)
        dense_folder.save_dense(model, dense_folder.load_tokenizer(source), folder)

    folder = ours.derive("stock-gptq-zeroed", {"model": source, "masks": mask_file}, make)
    perplexity = ours.measure(folder)
    return {
        **count(dict(any_folder.block_weights(dense_folder.load_dense(folder))), keep, pattern),
        "ppl_test": perplexity["test"],
        "ppl_ood": perplexity["test_ood"],
    }


def multiply(linears: Mapping[str, nn.Linear], keep: Mapping[str, Tensor]) -> None:
    """Set every weight outside its mask to zero, in place; keep: bool [out, in]."""
    for name, mask in keep.items():
        linears[name].weight.data.mul_(mask)


def count(weights: Mapping[str, Tensor], keep: Mapping[str, Tensor], pattern: str) -> dict[str, Any]:
    """groups, violations, revived and the share of zeros of all linears together; weights and keep [out, in]."""
    shape = masks.parse(pattern)
    total = sum(weight.numel() for weight in weights.values())
    return {
        "groups": total // shape[1] if shape else 0,
        "violations": sum(masks.violations(weight, *shape) for weight in weights.values()) if shape else 0,
        "revived": sum(int(weights[name][~mask].count_nonzero()) for name, mask in keep.items()),
        "zeros": sum(int((weight == 0).sum()) for weight in weights.values()) / total,
    }


def _pruned(ours: Chain) -> dict[tuple[str, str], Path]:
    """The model and the masks of our wanda, for a chain that then prunes nothing itself."""
    folder = ours.output("wanda")
    return {
        ("lora", "data/wanda/model"): folder / "model",
        ("gptq", "data/wanda/masks.safetensors"): folder / "masks.safetensors",
    }


def _ledger(path: Path) -> dict[str, int]:
    if not path.exists():
        return {}
    table = pd.read_csv(path)
    return {"ledger_violations": int(table["violations"].sum()), "ledger_revived": int(table["revived"].sum())}


def _named(pattern: str, chain: str, stage: str) -> dict[str, str]:
    return {"pattern": pattern, "chain": chain, "stage": stage}


if __name__ == "__main__":
    main("sparsity", COLUMNS, rows, identity=3)
