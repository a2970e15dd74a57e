"""Stage baseline_lora: the model before it was pruned, with the same recovery training as the pruned one.

What recovery is worth can't be seen against the fetched model alone: training on the corpus improves a dense model too.
Parameters are those of `lora`; the model is its own teacher. Its vocabulary is trimmed where the pruned one's is. Where
lora is switched off this one is, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.algorithms.model.shape import shape_of_config
from tasks.compression import recovery_training
from tasks.models import dense_folder

if TYPE_CHECKING:
    from tasks.runtime.stage import Stage


def run(stage: Stage) -> None:
    """Write baseline_lora/model (a dense checkpoint) and history.csv, as lora does."""
    if not stage.params.lora.enabled:
        return skip(stage)
    source = stage.model_in
    layers = shape_of_config(dense_folder.config(source)).layers
    recovered = recovery_training.recover(stage, source, keep={}, kept=range(layers))
    recovery_training.write(recovered, source, stage.output("baseline_lora/model"), stage.output("history.csv"))


def skip(stage: Stage) -> None:
    """Pass the model on; a history without rows."""
    stage.pass_on(stage.model_in, stage.output("baseline_lora/model"))
    recovery_training.write_history([], stage.output("history.csv"))
