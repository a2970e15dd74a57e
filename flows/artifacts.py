"""What a flow run leaves in Prefect's UI: few artifacts, the verdict first.

| key | what |
|---|---|
| `1-verdict` | what came out, and how the run ended |
| `2-stages` | each stage: state, why, seconds, code, and the record of who made its outputs |
| `3-progress` | how far the run is, and when it will end (`flows.foresight`) |
| `4-models` | the model after each stage |
| `5-tables`, `6-plots` | all of the report's |
| `7-report` | the report's page |

What is shown is what stage report wrote; nothing is drawn or computed here. A picture is a data: URL, since the browser
of Prefect's UI can open neither files nor this project's folders. All go through one client: a client for each would
take most of the time of a flow in which nothing ran.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from prefect import get_client
from prefect.artifacts import Artifact, LinkArtifact, MarkdownArtifact, TableArtifact

from flows import costs
from tasks.cli import report as summary
from tasks.evaluation import comparison

PLAIN = f"{' and '.join(comparison.PLAIN_MODELS)} are the plain models that it is compared with"
COLUMNS = ("stage", "state", "why", *costs.COLUMNS, "made", "code", "key", "record")
"""Of the table of the stages: what they did, seconds of what ran, and the lineage of what is there now."""
PICTURE = "data:image/svg+xml;base64,"


def publish(artifacts: Iterable[Artifact]) -> None:
    """Create the artifacts on the current flow run."""
    asyncio.run(_send(list(artifacts)))


def of_run(rows: Sequence[Mapping[str, Any]], failure: str | None) -> Iterator[Artifact]:
    """What each stage did; and what stopped the run, where something did."""
    if failure:
        yield MarkdownArtifact(key="1-verdict", markdown=f"## Failed\n\n{_plain(failure)}", description=failure)
    table = [{column: _shown(row.get(column)) for column in COLUMNS} for row in rows]
    yield TableArtifact(key="2-stages", table=table, description="what each stage did, and where its record is")


def of_report(report: Path) -> Iterator[Artifact]:
    """What came out; `report` is report.html, and the rest lies beside it."""
    folder = report.parent
    sentences = verdict(report)
    rest = "\n\n".join(map(_plain, sentences[1:]))
    yield MarkdownArtifact(key="1-verdict", markdown=f"## {_plain(sentences[0])}\n\n{rest}", description=sentences[0])
    models = summary.rows()
    yield TableArtifact(key="4-models", table=models, description=f"the model after each stage; {PLAIN}")
    seconds = {row["stage"]: row["seconds"] for row in models}
    tables = "\n\n".join(
        f"## {path.stem.replace('_', ' ')}\n\n{_markdown(_table(path, seconds))}"
        for path in sorted((folder / "tables").glob("*.csv"))
    )
    yield MarkdownArtifact(key="5-tables", markdown=tables, description="the tables of the report")
    captions = json.loads((folder / "plots/captions.json").read_text(encoding="utf-8"))
    plots = "\n\n".join(
        f"![{_plain(name)}]({_picture(folder / 'plots' / f'{name}.svg')})\n\n{_plain(caption)}"
        for name, caption in captions.items()
    )
    yield MarkdownArtifact(key="6-plots", markdown=plots, description="the plots of the report")
    yield LinkArtifact(
        key="7-report", link=report.resolve().as_uri(), link_text=str(report.resolve()), description="its page"
    )


def _shown(value: Any) -> Any:
    """Seconds to a tenth; Prefect's UI draws a table with the columns of its first row."""
    return "" if value is None else round(value, 1) if isinstance(value, float) else value


def verdict(report: Path) -> list[str]:
    """The report's sentences; the first one says it all."""
    return (report.parent / "verdict.txt").read_text(encoding="utf-8").splitlines()


async def _send(artifacts: list[Artifact]) -> None:
    async with get_client() as client:
        for artifact in artifacts:  # one after another: SQLite takes one writer at a time
            await artifact.acreate(client)


def _table(path: Path, seconds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table of the report; attribution's with the seconds, which no output can hold."""
    rows = pd.read_csv(path).astype(object).to_dict("records")
    return [row | {"seconds": seconds.get(row["stage"])} for row in rows] if path.stem == "attribution" else rows


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in markdown; a missing value is an empty cell, a number has six digits."""
    if not rows:
        return "no rows"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _plain(str(value))


def _picture(path: Path) -> str:
    return PICTURE + base64.b64encode(path.read_bytes()).decode("ascii")


def _plain(sentence: str) -> str:
    """Names of devices and stages keep their underscores and stars in markdown."""
    return "".join(f"\\{character}" if character in "\\*_`[]<>#|" else character for character in sentence)
