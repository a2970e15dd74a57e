"""How a specification looks: headings, marks and wording of five house styles, words of titles and attributes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How a document is written; each string is a format with the fields named in `LAYOUTS`."""

    heading: str
    requirement: str
    rationale: str
    acceptance: str
    attributes: str
    note: str
    item: str
    gap: str
    wording: int


LAYOUTS = (
    Layout(
        "{n} {text}\n",
        "{id} {text}",
        "  Rationale: {text}",
        "  Acceptance: {text}",
        "  {text}",
        "  Note: {text}",
        "  - {text}",
        "\n",
        0,
    ),
    Layout(
        "## {n}. {text}\n",
        "**{id}** {text}",
        "- Rationale: {text}",
        "- Acceptance: {text}",
        "- {text}",
        "> Note: {text}",
        "  {letter}) {text}",
        "\n",
        0,
    ),
    Layout(
        "{n}. {upper}",
        "[{id}] {text}",
        "    Why: {text}",
        "    Check: {text}",
        "    ({text})",
        "    NOTE {text}",
        "    {letter}) {text}",
        "",
        1,
    ),
    Layout(
        "{upper}\n",
        "ID: {id}\nRequirement: {text}",
        "Rationale: {text}",
        "Acceptance: {text}",
        "{text}",
        "Note: {text}",
        "  * {text}",
        "\n",
        2,
    ),
    Layout(
        "Section {n}: {text}\n",
        "{id}: {text}",
        "Rationale: {text}",
        "Acceptance criterion: {text}",
        "Attributes: {text}",
        "Note: {text}",
        "  ({letter}) {text}",
        "\n",
        1,
    ),
)

TITLES = (
    "Software requirements specification: {system}",
    "Software Requirements Specification for the {system}",
    "{system} - requirements specification",
    "{code} requirements baseline: {system}",
    "Requirements for the {system} software",
)
STATUS = ("draft", "approved", "for review", "released", "under change control")
METHODS = ("test", "test", "test", "analysis", "inspection", "demonstration", "test and analysis", "review")
PRIORITIES = ("high", "medium", "high", "low", "medium", "essential", "desirable")
