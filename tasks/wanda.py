"""Stage wanda: the depth-pruned model with zeros where the metric is smallest, and the masks that say where."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
from safetensors.torch import load_file
from torch import Tensor, nn

from tasks.algorithms.model import families, matrices
from tasks.algorithms.pruning import wanda
from tasks.models import dense_folder, mask_files, sparsity_ledger
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
    chosen = stage.params.wanda
    model = dense_folder.load_dense(stage.model_in).to(stage.params.device)
    input_ids = load_file(stage.input("windows.safetensors"))["input_ids"].long()
    select = SELECTS[chosen.method, chosen.pattern](chosen)
    with stage.progress("wanda", len(families.blocks(model))) as progress:
        selections = wanda.prune(model, input_ids, select, BATCH, progress.update)
    tokenizer = dense_folder.load_tokenizer(stage.model_in)
    dense_folder.save_dense(model, tokenizer, stage.output("wanda/model"))
    pattern = _pattern(chosen)
    keep = {name: each.keep for name, each in selections.items()}
    mask_files.save_masks(stage.output("masks.safetensors"), keep, pattern)
    _ledger(stage, model, keep, pattern)
    table = _table(model, selections)
    _write(stage, table)
    _print(table, pattern, chosen.method, input_ids.numel())


def skip(stage: Stage) -> None:
    """The depth-pruned model as it is, no masks."""
    stage.pass_on(stage.model_in, stage.output("wanda/model"))
    _ledger(stage, dense_folder.load_dense(stage.model_in), {}, "dense")
    mask_files.save_masks(stage.output("masks.safetensors"), {}, "dense")
    _write(stage, pd.DataFrame(columns=COLUMNS))


SELECTS = {
    ("wanda", "n_m"): lambda chosen: partial(wanda.n_m, keep=chosen.keep, of=chosen.of),
    ("wanda", "unstructured"): lambda chosen: partial(wanda.unstructured, sparsity=chosen.sparsity),
    ("wanda_alpha", "unstructured"): lambda chosen: partial(wanda.cumulative, sparsity=chosen.sparsity),
}
"""(method, pattern) -> from the parameters to what selects the weights that stay."""


def _ledger(stage: Stage, model: nn.Module, keep: dict[str, Tensor], pattern: str) -> None:
    table = sparsity_ledger.ledger(matrices.weights(model), keep, pattern)
    sparsity_ledger.check(table, "wanda", enforce=True)
    sparsity_ledger.write(table, stage.output("sparsity.csv"))


def _pattern(chosen: Wanda) -> str:
    return f"{chosen.keep}:{chosen.of}" if chosen.pattern == "n_m" else chosen.pattern


def _table(model: nn.Module, selections: dict[str, wanda.Selection]) -> pd.DataFrame:
    weights = matrices.weights(model)
    rows = [
        (name, *weights[name].shape, int(weights[name].eq(0).sum()), each.alpha) for name, each in selections.items()
    ]
    return pd.DataFrame(rows, columns=COLUMNS).astype({"alpha": float})


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
