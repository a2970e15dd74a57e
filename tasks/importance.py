"""Stage importance: how important each layer is, by the score that `importance.method` names.

A compound of scores is written with its parts. The model's blocks come from the disk, one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.algorithms.pruning import importance
from tasks.models import streamed_folder, tensor_files
from tasks.runtime import files

if TYPE_CHECKING:
    from tasks.runtime.stage import Stage


def run(stage: Stage) -> None:
    """Write scores.csv: layer, and the method's score and its parts; higher = more important."""
    params = stage.params.importance
    parts, model = importance.parts(params.method), streamed_folder.open_dense(stage.model_in, stage.params.device)
    input_ids = tensor_files.load_tensors(stage.input("windows.safetensors"))["input_ids"][: params.windows].long()
    scores = {}
    with stage.progress("importance", len(parts)) as progress:
        for done, name in enumerate(parts, 1):
            scores[name] = importance.score(model, input_ids, name, saved=stage.journal)
            progress.update(done)
    if params.method == importance.COMPOUND:
        scores[importance.COMPOUND] = importance.combine(scores)
    import pandas as pd

    table = pd.DataFrame({name: values.numpy() for name, values in scores.items()})
    table.insert(0, "layer", range(len(table)))
    files.write_csv(stage.output("scores.csv"), table, "%.9g")
    print(f"{len(table)} layers scored on {len(input_ids)} windows of {input_ids.shape[1]} tokens")
    for name in scores:
        ranked = table.sort_values(name, kind="stable")["layer"].tolist()
        print(f"{name}, least important first: {ranked}" + (" (ranks)" if name == params.method else ""))


def skip(stage: Stage) -> None:
    """A table without rows."""
    method = stage.params.importance.method
    columns = dict.fromkeys([*importance.parts(method), method])
    files.write_header(stage.output("scores.csv"), ["layer", *columns])
