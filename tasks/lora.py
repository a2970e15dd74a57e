"""Stage lora: recover what pruning lost by training on the train corpus, with every pruned weight kept at zero.

What is trained, and on which loss, is `tasks.compression.recovery_training`'s and the algorithms'; this stage gives it
the pruned model, the masks and the record of which blocks are left, and checks the pattern of what comes back.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tasks.algorithms.model import layers
from tasks.compression import recovery_training, training_inputs
from tasks.models import mask_files, sparsity_ledger, streamed_folder

if TYPE_CHECKING:
    from torch import nn

    from tasks.runtime.stage import Stage


def run(stage: Stage) -> None:
    """Write lora/model (merged, dense checkpoint), history.csv (one row per step) and sparsity.csv.

    Raises:
        InputError: inputs or parameters don't fit each other, the training diverges, or the pattern is broken.
    """
    source = stage.model_in
    keep = mask_files.StoredMasks(stage.input("masks.safetensors"))
    kept = json.loads(stage.input("removed.json").read_text(encoding="utf-8"))["kept"]
    recovered = recovery_training.recover(stage, source, keep, kept)
    _ledger(stage, recovered.model)
    recovery_training.write(recovered, source, stage.output("lora/model"), stage.output("history.csv"))


def skip(stage: Stage) -> None:
    """Pass the pruned model on; a history without rows."""
    _ledger(stage, streamed_folder.open_dense(stage.model_in, outside=False))
    stage.pass_on(stage.model_in, stage.output("lora/model"))
    training_inputs.write_history([], stage.output("history.csv"))


def _ledger(stage: Stage, model: nn.Module) -> None:
    keep = mask_files.StoredMasks(stage.input("masks.safetensors"))
    table = sparsity_ledger.ledger_of_blocks(layers.weights(model), keep, keep.pattern)
    sparsity_ledger.check(table, "lora", stage.params.wanda.enforce)
    sparsity_ledger.write(table, stage.output("sparsity.csv"))
