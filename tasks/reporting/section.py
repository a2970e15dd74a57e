"""What a section of the report is: a title, a partial template with its variables, plots, and tables as files.

A section is a module of `tasks.reporting.sections` that defines `SECTION`, a partial of the same name, and a row in
`tasks.report.SECTIONS`. Every function of it is pure: evidence in, plain data out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

    from tasks.reporting.evidence import Evidence


class Plot(NamedTuple):
    """A Vega-Lite specification and the sentence below it; an empty specification is not drawn."""

    spec: dict[str, Any]
    caption: str


def nothing(evidence: Evidence) -> dict[str, Any]:
    """A section without plots, or without tables."""
    return {}


class Section(NamedTuple):
    """One section of the page.

    Attributes:
        name: of its module, of its partial and, with dashes, its anchor.
        context: the partial's variables.
        plots: by name, unique on the page; the partial places them.
        tables: by file name, unique; what the section shows as a table, for other programs. Empty ones aren't written.
    """

    name: str
    title: str
    context: Callable[[Evidence], dict[str, Any]]
    plots: Callable[[Evidence], dict[str, Plot]] = nothing
    tables: Callable[[Evidence], dict[str, pd.DataFrame]] = nothing

    @property
    def anchor(self) -> str:
        """What a link to the section names."""
        return self.name.replace("_", "-")
