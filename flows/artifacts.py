"""The report as Prefect artifacts of the flow run: its verdict as markdown, its tables, its plots as pictures.

What is shown is what stage report wrote; nothing is drawn or computed here. A picture is a data: URL, since the browser
of Prefect's UI can open neither files nor this project's folders. All go through one client: a client for each would
take most of the time of a flow in which nothing ran.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from prefect import get_client
from prefect.artifacts import Artifact, ImageArtifact, LinkArtifact, MarkdownArtifact, TableArtifact

from tasks.cli import report as summary
from tasks.evaluation import comparison

PLAIN = f"{' and '.join(comparison.PLAIN_MODELS)} are the plain models that it is compared with"
PICTURE = "data:image/svg+xml;base64,"


def publish(report: Path) -> None:
    """Create the artifacts; `report` is report.html, and the rest lies beside it."""
    asyncio.run(_send(list(made(report))))


def made(report: Path) -> Iterator[Artifact]:
    """Verdict, link, table of the stages; then every table and every plot of the report."""
    folder = report.parent
    sentences = (folder / "verdict.txt").read_text(encoding="utf-8").splitlines()
    rest = "\n\n".join(map(_plain, sentences[1:]))
    yield MarkdownArtifact(key="verdict", markdown=f"## {_plain(sentences[0])}\n\n{rest}", description="what came out")
    yield LinkArtifact(key="report", link=report.resolve().as_uri(), link_text=str(report.resolve()))
    stages = summary.rows()
    yield TableArtifact(key="stages", table=stages, description=f"the model after each stage; {PLAIN}")
    seconds = {row["stage"]: row["seconds"] for row in stages}
    for path in sorted((folder / "tables").glob("*.csv")):
        name = path.stem.replace("_", "-")
        table = _rows(path)
        if path.stem == "attribution":  # which can't have the seconds in the report: an output holds no time
            table = [row | {"seconds": seconds.get(row["stage"])} for row in table]
        yield TableArtifact(key=name, table=table, description=f"table {name} of the report")
    captions = json.loads((folder / "plots/captions.json").read_text(encoding="utf-8"))
    for name, caption in captions.items():
        picture = base64.b64encode((folder / "plots" / f"{name}.svg").read_bytes()).decode("ascii")
        yield ImageArtifact(key=f"plot-{name}", image_url=PICTURE + picture, description=caption)


async def _send(artifacts: list[Artifact]) -> None:
    async with get_client() as client:
        for artifact in artifacts:  # one after another: SQLite takes one writer at a time
            await artifact.acreate(client)


def _rows(path: Path) -> list[dict]:
    table = pd.read_csv(path).astype(object)
    return table.where(table.notna(), None).to_dict("records")


def _plain(sentence: str) -> str:
    """Names of devices and stages keep their underscores and stars in markdown."""
    return "".join(f"\\{character}" if character in "\\*_`[]<>#" else character for character in sentence)
