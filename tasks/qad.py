"""Stage qad: train the codes that GPTQ chose, on their grids, until the model predicts what the fetched one does.

Quantisation-aware distillation (`tasks.algorithms.recovery.qad`), after EoRA, so that it trains what will be packed:
an adapter computes along and stays. Nothing but codes changes, and none where a weight is pruned. The plain model that
the package is compared with is trained in the same way by stage baseline.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tasks.compression import qad_training, training_inputs
from tasks.models import gptq_folder, mask_files, sparsity_ledger

if TYPE_CHECKING:
    from tasks.runtime.stage import Stage


def run(stage: Stage) -> None:
    """Write qad/model (as eora's, with other codes), history.csv (one row per step) and sparsity.csv.

    Raises:
        InputError: inputs or parameters don't fit each other, the training diverges, or the pattern is broken.
    """
    source, target, masks = stage.model_in, stage.output("qad/model"), stage.input("masks.safetensors")
    kept = json.loads(stage.input("removed.json").read_text(encoding="utf-8"))["kept"]
    found = qad_training.distil(stage, source, target, stage.input("lora/model"), kept, masks, stage.journal)
    training_inputs.write_history(found.history, stage.output("history.csv"))
    keep = mask_files.StoredMasks(masks)
    weights = ({name: weight for name, (_, weight) in block.items()} for block in gptq_folder.stored_linears(target))
    table = sparsity_ledger.ledger_of_blocks(weights, keep, keep.pattern)
    sparsity_ledger.check(table, "qad", stage.params.wanda.enforce)
    sparsity_ledger.write(table, stage.output("sparsity.csv"))
    print(f"{found.moved:.2%} of the codes have moved")


def skip(stage: Stage) -> None:
    """Pass the model on; tables without rows."""
    stage.pass_on(stage.model_in, stage.output("qad/model"))
    training_inputs.write_history([], stage.output("history.csv"))
    sparsity_ledger.write_empty(stage.output("sparsity.csv"))
