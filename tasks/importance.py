"""Stage importance: every score of every layer, in one table; `importance.method` names the one that later ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.algorithms.pruning import importance
from tasks.models import dense_folder, tensor_files
from tasks.runtime import files

if TYPE_CHECKING:
    import pandas as pd

    from tasks.runtime.stage import Stage


def run(stage: Stage) -> None:
    """Write scores.csv: layer and one column per score, higher = more important."""
    params = stage.params.importance
    model = dense_folder.load_dense(stage.model_in).to(stage.params.device)
    input_ids = tensor_files.load_tensors(stage.input("windows.safetensors"))["input_ids"][: params.windows].long()
    scores = {}
    with stage.progress("importance", len(importance.SCORES)) as progress:
        for done, name in enumerate(importance.SCORES, 1):
            scores[name] = importance.score(model, input_ids, name, saved=stage.journal)
            progress.update(done)
    scores[importance.COMPOUND] = importance.combine(scores)
    import pandas as pd

    table = pd.DataFrame({name: scores[name].numpy() for name in _columns()})
    table.insert(0, "layer", range(len(table)))
    _write(stage, table)
    print(f"{len(table)} layers scored on {len(input_ids)} windows of {input_ids.shape[1]} tokens")
    for name in _columns():
        ranked = table.sort_values(name, kind="stable")["layer"].tolist()
        print(f"{name}, least important first: {ranked}" + (" (ranks)" if name == params.method else ""))


def skip(stage: Stage) -> None:
    """A table without rows."""
    files.write_header(stage.output("scores.csv"), ["layer", *_columns()])


def _columns() -> list[str]:
    return [*importance.SCORES, importance.COMPOUND]


def _write(stage: Stage, table: pd.DataFrame) -> None:
    files.write_csv(stage.output("scores.csv"), table, "%.9g")
