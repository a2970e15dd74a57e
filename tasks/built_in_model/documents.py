"""Whole requirements specifications in the style of ISO/IEC/IEEE 29148, written from frames and a domain.

The same `random.Random` gives the same text. It does not judge whether a combination makes engineering sense: the
reaction to a condition is drawn independently of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from tasks.built_in_model.english import capital
from tasks.built_in_model.frames import (
    DEMONSTRATION_OPENINGS,
    Domain,
    Frame,
    FrameSet,
    Piece,
    compile_domain,
    compile_frames,
    quantity_forms,
)
from tasks.built_in_model.layouts import LAYOUTS, METHODS, PRIORITIES, STATUS, TITLES, Layout
from tasks.built_in_model.paraphrase import KEPT
from tasks.built_in_model.splits import Split
from tasks.built_in_model.values import version

REQUIREMENT_KINDS = {
    "functional": "FUN",
    "performance": "PER",
    "security": "SEC",
    "reliability": "REL",
    "usability": "USA",
    "interface": "INT",
    "data": "DAT",
    "maintainability": "MNT",
    "portability": "POR",
    "safety": "SAF",
    "compliance": "COM",
    "availability": "AVA",
    "scalability": "SCA",
    "logging": "LOG",
    "installation": "INS",
}
SUPPORT_KINDS = ("rationale", "acceptance", "definition", "scenario")
CLAUSE_KINDS = ("trigger", "constraint")
"""Clauses put before or after a requirement (the EARS patterns of Mavin et al., 2009), so that few sentences recur."""
_NOTE_KINDS = frozenset(("rationale", "acceptance"))

_HEADINGS = {
    "functional": ("Functional requirements", "Functions", "System behaviour"),
    "performance": ("Performance requirements", "Timing and throughput", "Performance"),
    "security": ("Security requirements", "Access control and protection of data", "Security"),
    "reliability": ("Reliability requirements", "Reliability and fault tolerance", "Behaviour in case of faults"),
    "usability": ("Usability requirements", "Human factors", "Operation and display"),
    "interface": ("External interfaces", "Interface requirements", "Connections to other systems"),
    "data": ("Data requirements", "Records and their retention", "Management of data"),
    "maintainability": ("Maintainability requirements", "Maintenance and support", "Maintainability"),
    "portability": ("Portability requirements", "Supported platforms", "Portability"),
    "safety": ("Safety requirements", "Protection against hazards", "Safety"),
    "compliance": ("Regulatory requirements", "Standards and compliance", "Compliance"),
    "availability": ("Availability requirements", "Service continuity", "Availability"),
    "scalability": ("Scalability requirements", "Growth and capacity", "Scalability"),
    "logging": ("Logging requirements", "Audit trail and logging", "Records of operation"),
    "installation": ("Installation requirements", "Delivery and commissioning", "Installation and upgrade"),
}


@dataclass
class Writer:
    """State of one document while it is written."""

    rng: random.Random
    domain: Domain
    frames: FrameSet
    layout: Layout
    scope: dict[str, dict[str, str]]
    lines: list[str] = field(default_factory=list)
    identifiers: list[str] = field(default_factory=list)
    decks: dict[str, list[Frame]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)


def expand(frame: Frame, scope: dict, writer: Writer) -> str:
    """Write a frame, drawing the slots that `scope` does not hold yet and adding them to it."""
    out = []
    for piece in frame.pieces:
        if type(piece) is str:
            out.append(piece)
            continue
        if type(piece) is tuple:
            rng = writer.rng
            out.append(piece[0] if rng.random() < KEPT else piece[int(rng.random() * len(piece))])
            continue
        item = scope.get(piece.key)
        if item is None:
            item = scope[piece.key] = _draw(piece, scope, writer)
        out.append(item[piece.form])
    text = "".join(out)
    return text[:1].upper() + text[1:]


def _draw(piece: Piece, scope: dict, writer: Writer) -> dict[str, str]:
    """Draw one slot, different from the other slots of the same name in the scope where the list allows it."""
    rng, base = writer.rng, piece.base
    used = scope.setdefault(base, [])
    if base == "reqref":
        return {"": writer.identifiers[int(rng.random() * len(writer.identifiers))]}
    generic = writer.frames.generic.get(base)
    for _ in range(12):
        if generic is not None:
            mark = item = generic(rng)
        else:
            pool = writer.domain.quantities if base == "quantity" else writer.domain.items[base]
            mark = int(rng.random() * len(pool))
            item = pool[mark]
        if mark not in used:
            break
    used.append(mark)
    if generic is not None:
        return {"": item}
    return quantity_forms(item, rng) if base == "quantity" else item


def _scope(writer: Writer) -> dict:
    """A fresh scope in which only the name of the system is fixed for the whole document."""
    return dict(writer.scope)


def _next_frame(writer: Writer, kind: str, scope: dict) -> Frame | None:
    """Deal the next frame of a kind that fits; all are used before one comes again. None if there is none.

    For the notes of a requirement a few frames are looked at and the one that shares most slots with it is taken:
    a note about other things than its requirement would be grammatical but pointless.
    """
    deck = writer.decks.get(kind)
    if not deck:
        deck = writer.decks[kind] = list(writer.frames.by_kind.get(kind, ()))
        writer.rng.shuffle(deck)
    candidates = range(max(0, len(deck) - (6 if kind in _NOTE_KINDS else 2)), len(deck))
    best, best_score = -1, -100
    for index in candidates:
        frame = deck[index]
        if frame.needs_reference and not writer.identifiers:
            continue
        score = sum(1 if key in scope else -1 for key in frame.keys) if kind in _NOTE_KINDS else 0
        if score > best_score:
            best, best_score = index, score
    return deck.pop(best) if best >= 0 else None


def _sentence(writer: Writer, kind: str, scope: dict) -> str | None:
    frame = _next_frame(writer, kind, scope)
    return None if frame is None else expand(frame, scope, writer)


def _rationale(writer: Writer, scope: dict) -> str | None:
    """A reason: sometimes one of the domain's own sentences, otherwise a frame about the requirement's slots."""
    if writer.rng.random() < 0.3:
        if "own" not in writer.decks:
            writer.decks["own"] = list(writer.domain.rationale)
            writer.rng.shuffle(writer.decks["own"])
        if writer.decks["own"]:
            return expand(writer.decks["own"].pop(), scope, writer)
    return _sentence(writer, "rationale", scope)


def _with_clauses(writer: Writer, text: str, scope: dict) -> str:
    """Put a trigger before or a constraint after one requirement in three, where its form allows it."""
    simple = text.startswith("The ") and text.count(". ") == 0 and not set(text) & set(";:\n(")
    if not simple or not any(f" {word} " in text for word in ("shall", "must", "should")):
        return text
    if text.startswith(DEMONSTRATION_OPENINGS):
        return text
    drawn = writer.rng.random()
    if drawn < 0.2 and (clause := _sentence(writer, "trigger", scope)):
        return f"{clause}, {text[:1].lower()}{text[1:]}"
    if drawn > 0.86 and len(text.split()) < 28 and (clause := _sentence(writer, "constraint", scope)):
        return f"{text.rstrip('.')} {clause[:1].lower()}{clause[1:]}."
    return text


def _identifier(writer: Writer, kind: str) -> str:
    """The next identifier of a kind; numbers grow with gaps, as they do when requirements are withdrawn."""
    rng = writer.rng
    step = 1 + int(rng.random() ** 3 * 9)
    number = writer.numbers[kind] = writer.numbers.get(kind, int(rng.random() ** 2 * 60)) + step
    return f"{writer.domain.code}-{REQUIREMENT_KINDS[kind]}-{number:03d}"


def _attributes(writer: Writer) -> str:
    """Priority, verification method and trace, each present or not, in the wording of the layout."""
    rng = writer.rng
    priority = PRIORITIES[int(rng.random() * len(PRIORITIES))]
    method = METHODS[int(rng.random() * len(METHODS))]
    trace = ""
    if writer.identifiers and rng.random() < 0.45:
        # Mostly a recent requirement: traces in real documents are local.
        back = 1 + int(rng.random() ** 2 * min(len(writer.identifiers), 12))
        trace = writer.identifiers[-back]
    if writer.layout.wording == 0:
        return f"Priority: {priority}. Verified by {method}." + (f" Traces to {trace}." if trace else "")
    if writer.layout.wording == 1:
        return f"priority {priority}; verification by {method}" + (f"; see {trace}" if trace else "")
    return f"Priority: {priority}\nVerification: {method}" + (f"\nTrace: {trace}" if trace else "")


def _itemised(writer: Writer, text: str) -> str:
    """Give the list items of a frame the marks of the layout."""
    head, *items = text.split("\n- ")
    marked = [writer.layout.item.format(letter="abcdefgh"[index], text=item) for index, item in enumerate(items)]
    return "\n".join([head, *marked])


def _requirement(writer: Writer, kind: str) -> None:
    """Write one requirement with the notes that belong to it; they share its slots."""
    rng, layout = writer.rng, writer.layout
    scope = _scope(writer)
    text = _sentence(writer, kind, scope)
    if text is None:
        return
    text = _with_clauses(writer, text, scope)
    identifier = _identifier(writer, kind)
    if "\n- " in text:
        text = _itemised(writer, text)
    writer.lines.append(layout.requirement.format(id=identifier, text=text))
    if rng.random() < 0.5:
        _append(writer, layout.rationale, _rationale(writer, scope))
    if rng.random() < 0.45:
        _append(writer, layout.acceptance, _sentence(writer, "acceptance", scope))
    if rng.random() < 0.55:
        _append(writer, layout.attributes, _attributes(writer))
    if rng.random() < 0.06:
        _append(writer, layout.note, _sentence(writer, "definition", scope))
    writer.lines.append("")
    writer.identifiers.append(identifier)


def _append(writer: Writer, form: str, text: str | None) -> None:
    if text is not None:
        writer.lines.append(form.format(text=text))


def _heading(writer: Writer, number: int, text: str) -> None:
    writer.lines.append(writer.layout.heading.format(n=number, text=text, upper=text.upper()))


def _introduction(writer: Writer) -> None:
    """Write the title, the narrative and some definitions."""
    rng, domain = writer.rng, writer.domain
    title = TITLES[int(rng.random() * len(TITLES))].format(system=writer.scope["system1"][""], code=domain.code)
    prefix = "# " if writer.layout.heading.startswith("#") else ""
    writer.lines.append(prefix + capital(title))
    if rng.random() < 0.7:
        writer.lines.append(f"Version {version(rng)}, {STATUS[int(rng.random() * len(STATUS))]}")
    writer.lines.append("")
    _heading(writer, 1, ("Introduction", "Purpose and scope", "Overview")[int(rng.random() * 3)])
    if domain.narrative and rng.random() < 0.75:
        writer.lines.append(expand(domain.narrative[int(rng.random() * len(domain.narrative))], _scope(writer), writer))
    else:
        writer.lines.append(_sentence(writer, "scenario", _scope(writer)) or "")
    wanted = min(int(rng.random() * 4), len(writer.frames.by_kind.get("definition", ())))
    definitions = [_sentence(writer, "definition", _scope(writer)) for _ in range(wanted)]
    as_list = rng.random() < 0.5
    for letter, text in zip("abc", filter(None, definitions), strict=False):
        writer.lines.append(writer.layout.item.format(letter=letter, text=text) if as_list else text)
    writer.lines.append("")


def document(rng: random.Random, domain: Domain, frames: FrameSet, n_words: int | None = None) -> str:
    """Write one specification of about `n_words` words (drawn if not given) with an introduction and 3-7 sections."""
    wanted = n_words or 260 + int(rng.random() * 520)
    system = domain.items["system"][int(rng.random() * len(domain.items["system"]))]
    writer = Writer(rng, domain, frames, LAYOUTS[int(rng.random() * len(LAYOUTS))], {"system1": system})
    _introduction(writer)
    kinds = [kind for kind in REQUIREMENT_KINDS if frames.by_kind.get(kind)]
    sections = min(len(kinds), 3 + int(rng.random() * min(5, wanted / 100)))
    chosen = set(rng.sample(kinds, sections))
    if rng.random() < 0.85:
        chosen.add("functional")
    ordered = [kind for kind in kinds if kind in chosen][:7]
    start = sum(len(line.split()) for line in writer.lines)
    weights = [2.5 if kind == "functional" else 0.6 + rng.random() for kind in ordered]
    for number, kind in enumerate(ordered):
        _section(writer, number + 2, kind, start + (wanted - start) * sum(weights[: number + 1]) / sum(weights))
    return "\n".join(writer.lines).rstrip("\n") + "\n"


def _section(writer: Writer, number: int, kind: str, target: float) -> None:
    """Write requirements of one kind until the document has about `target` words."""
    rng = writer.rng
    _heading(writer, number, _HEADINGS[kind][int(rng.random() * 3)])
    if rng.random() < 0.3:
        _append(writer, "{text}\n", _sentence(writer, "scenario", _scope(writer)))
    words = sum(len(line.split()) for line in writer.lines)
    # A split with few frames of this kind gets a shorter section rather than the same sentence many times.
    for _ in range(max(2, len(writer.frames.by_kind[kind]))):
        before = len(writer.lines)
        _requirement(writer, kind)
        words += sum(len(line.split()) for line in writer.lines[before:])
        if words >= target:
            break


def documents(split: Split, n_bytes: int, seed: int) -> Iterator[dict]:
    """Yield {"text", "domain"} until the texts have at least `n_bytes` bytes; the same seed gives the same texts."""
    rng = random.Random(seed)
    frames = compile_frames(split.frames)
    domains = [compile_domain(domain) for domain in split.domains]
    written = 0
    while written < n_bytes:
        domain = domains[int(rng.random() * len(domains))]
        text = document(rng, domain, frames)
        written += len(text.encode("utf-8"))
        yield {"text": text, "domain": domain.name}
