"""Stage wanda: the depth-pruned model with zeros where the metric is smallest, and the masks that say where."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
from safetensors.torch import load_file

from tasks.algorithms.model import families, layers, matrices
from tasks.algorithms.model.matrices import Matrix
from tasks.algorithms.model.shape import shape_of_config
from tasks.algorithms.pruning import wanda
from tasks.models import dense_folder, mask_files, sparsity_ledger, streamed_folder
from tasks.parameters import rules
from tasks.runtime import files

if TYPE_CHECKING:
    from tasks.parameters.schema import Wanda
    from tasks.runtime.stage import Stage

BATCH = 4
"""Windows per forward pass: no effect on the result beyond rounding, and no parameter."""
COLUMNS = ["linear", "rows", "cols", "zeros", "alpha"]


def run(stage: Stage) -> None:
    """Write the pruned model, the masks, sparsity.csv and layers.csv: linear, rows, cols, zeros, alpha.

    `zeros` counts the weights that are 0, those included that were 0 before. `alpha` is wanda_alpha's, else empty.

    Raises:
        InputError: a linear's inputs aren't divisible by `of`, or a metric isn't finite.
    """
    shape = shape_of_config(dense_folder.config(stage.model_in))
    chosen = rules.settle(stage.params.wanda, shape, stage.params.device)
    model = streamed_folder.open_dense(stage.model_in, stage.params.device)
    input_ids = load_file(stage.input("windows.safetensors"))["input_ids"].long()
    pattern, rows, ledgers = _pattern(chosen), [], []
    shapes = {name: matrix.shape for name, matrix in matrices.of_model(model).items()}
    with (
        stage.progress("wanda", len(families.blocks(model))) as progress,
        mask_files.writing(stage.output("masks.safetensors"), shapes, pattern) as write_mask,
        streamed_folder.writing(
            model, dense_folder.load_tokenizer(stage.model_in), stage.output("wanda/model")
        ) as writer,
    ):

        def pruned(index: int, block: Mapping[str, Matrix], selections: Mapping[str, wanda.Selection]) -> None:
            weights = {name: matrix.weight for name, matrix in block.items()}
            keep = {name: each.keep for name, each in selections.items()}
            writer.block(index)
            for name, mask in keep.items():
                write_mask(name, mask)
            ledgers.append(sparsity_ledger.ledger(weights, keep, pattern))
            for name, each in selections.items():
                rows.append((name, *shapes[name], int(weights[name].eq(0).sum()), each.alpha))
            progress.update(index + 1)

        select = SELECTS[chosen.method, chosen.pattern](chosen)
        wanda.prune(model, input_ids, select, pruned, BATCH)
    _ledger(stage, ledgers)
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"alpha": float})
    _write(stage, table)
    _print(table, pattern, chosen.method, input_ids.numel())


def skip(stage: Stage) -> None:
    """The depth-pruned model as it is, no masks."""
    stage.pass_on(stage.model_in, stage.output("wanda/model"))
    model, ledgers = streamed_folder.open_dense(stage.model_in), []
    for block, inside in zip(families.blocks(model), matrices.by_block(model), strict=True):
        with layers.opened(block):
            weights = {name: matrix.weight for name, matrix in inside.items()}
            ledgers.append(sparsity_ledger.ledger(weights, {}, "dense"))
    _ledger(stage, ledgers)
    mask_files.save_masks(stage.output("masks.safetensors"), {}, "dense")
    _write(stage, pd.DataFrame(columns=COLUMNS))


SELECTS = {
    ("wanda", "n_m"): lambda chosen: partial(wanda.n_m, keep=chosen.keep, of=chosen.of),
    ("wanda", "unstructured"): lambda chosen: partial(wanda.unstructured, sparsity=chosen.sparsity),
    ("wanda_alpha", "unstructured"): lambda chosen: partial(wanda.cumulative, sparsity=chosen.sparsity),
}
"""(method, pattern) -> from the parameters to what selects the weights that stay."""


def _ledger(stage: Stage, blocks: list[pd.DataFrame]) -> None:
    table = pd.concat(blocks, ignore_index=True)
    sparsity_ledger.check(table, "wanda", enforce=True)
    sparsity_ledger.write(table, stage.output("sparsity.csv"))


def _pattern(chosen: Wanda) -> str:
    return f"{chosen.keep}:{chosen.of}" if chosen.pattern == "n_m" else chosen.pattern


def _print(table: pd.DataFrame, pattern: str, method: str, tokens: int) -> None:
    weights = table["rows"] * table["cols"]
    fractions, zeros = table["zeros"] / weights, table["zeros"].sum()
    print(f"{method}, {pattern}{' (kept : of)' if ':' in pattern else ''}, on {tokens} calibration tokens")
    print(f"zeros: {zeros:,} of {weights.sum():,} weights in {len(table)} linears")
    print(f"zero fraction {zeros / weights.sum():.4f}, per linear {fractions.min():.4f} to {fractions.max():.4f}")
    if table["alpha"].notna().any():
        print(f"alpha per linear {table['alpha'].min():.4g} to {table['alpha'].max():.4g}")


def _write(stage: Stage, table: pd.DataFrame) -> None:
    files.write_csv(stage.output("layers.csv"), table, "%.9g")
