"""Sentence frames and product domains in the form that a document is written from.

Frames are compiled once into literals, choices and slots, domains into all inflected forms of their entries, so that
expansion is a short loop over lists. It opens no file and keeps no state.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.built_in_model import values
from tasks.built_in_model.english import capital, gerund, indefinite, participle, plural, third_person
from tasks.built_in_model.paraphrase import with_alternatives

DEMONSTRATION_OPENINGS = ("The software must", "User authentication must", "The system must provide real-time")
"""Frames with these openings answer the prompts used for demonstration completions: the model must have seen them."""

_SLOT = re.compile(r"\{([a-z]+)([0-9]?)(?::([a-z]+))?\}")
_NOUNS = {"system": "systems", "component": "components", "actor": "actors", "data": "data", "event": "events"}
_PLAIN = {
    "condition": "conditions",
    "hazard": "hazards",
    "standard": "standards",
    "verification": "verification",
    "interface": "interfaces",
}


# Nouns that name a process and need no article, and participles in -ing that do not name one.
_PROCESS_NOUNS = frozenset(
    (
        "delivery",
        "service",
        "control",
        "operation",
        "guidance",
        "production",
        "supply",
        "protection",
        "surveillance",
        "calibration",
        "throughput",
        "access",
        "authentication",
        "maintenance",
        "fertigation",
        "recovery",
        "support",
        "initialisation",
        "entry",
        "exchange",
    )
)
_NOT_PROCESSES = frozenset(("pending", "awaiting", "outstanding", "missing"))


@dataclass(frozen=True)
class Piece:
    """One slot of a compiled frame: `key` identifies the draw, `form` the inflection that is written."""

    key: str
    base: str
    form: str


@dataclass(frozen=True)
class Frame:
    """A frame as a tuple of literals, tuples of interchangeable phrases, and `Piece` objects."""

    pieces: tuple[str | tuple[str, ...] | Piece, ...]
    keys: frozenset[str]
    needs_reference: bool


@dataclass(frozen=True)
class FrameSet:
    """All frames of a split by kind, and the table of generic slots they draw from."""

    by_kind: dict[str, tuple[Frame, ...]]
    generic: dict[str, values.Draw]


@dataclass(frozen=True)
class Domain:
    """A domain with every inflected form of every entry worked out beforehand."""

    name: str
    code: str
    items: dict[str, tuple[dict[str, str], ...]]
    quantities: tuple[dict, ...]
    rationale: tuple[Frame, ...]
    narrative: tuple[Frame, ...]


def compile_text(text: str, paraphrase: bool = False) -> Frame:
    """Cut a text into literals and slots; a slot without number is the same draw as the one numbered 1.

    Args:
        paraphrase: words with synonyms become choices among them.
    """
    pieces: list[str | tuple[str, ...] | Piece] = []
    end = 0
    for match in _SLOT.finditer(text):
        literal = text[end : match.start()]
        base, number, form = match.group(1), match.group(2) or "1", match.group(3) or ""
        if base in ("interface", "state") and not form and literal.lower().endswith("the "):
            form = "bare"  # the entry brings its own article, or gets one from `_state_forms`
        if literal:
            limit = "" if text[match.end() :].startswith(" of ") else base  # "within 2 seconds of it" stays
            pieces += with_alternatives(literal, limit) if paraphrase else [literal]
        pieces.append(Piece(base + number, base, form))
        end = match.end()
    pieces += with_alternatives(text[end:], "") if paraphrase else [text[end:]]
    keys = frozenset(piece.key for piece in pieces if isinstance(piece, Piece))
    return Frame(tuple(pieces), keys, "{reqref" in text)


def compile_frames(frames: Sequence[dict]) -> FrameSet:
    """Compile parsed frames and group them by kind."""
    grouped: dict[str, list[Frame]] = {}
    for frame in frames:
        grouped.setdefault(frame["kind"], []).append(compile_text(frame["text"], not is_demonstration(frame)))
    return FrameSet({kind: tuple(members) for kind, members in grouped.items()}, values.slots())


def compile_domain(domain: dict) -> Domain:
    """Work out the inflected forms of every entry of a parsed domain."""
    items = {slot: tuple(_noun_forms(text) for text in domain[key]) for slot, key in _NOUNS.items()}
    items.update({slot: tuple(_plain_forms(text) for text in domain[key]) for slot, key in _PLAIN.items()})
    items["state"] = tuple(_state_forms(text) for text in domain["states"])
    items["action"] = tuple(_action_forms(entry["verb"], entry["object"]) for entry in domain["actions"])
    return Domain(
        domain["name"],
        domain["code"],
        items,
        tuple(domain["quantities"]),
        tuple(map(compile_text, domain["rationale"])),
        tuple(map(compile_text, domain["narrative"])),
    )


def _noun_forms(text: str) -> dict[str, str]:
    return {"": text, "a": indefinite(text), "the": "the " + text, "plural": plural(text), "cap": capital(text)}


def _plain_forms(text: str) -> dict[str, str]:
    bare = text[4:] if text.startswith("the ") else text
    return {"": text, "cap": capital(text), "bare": bare}


def _state_forms(text: str) -> dict[str, str]:
    """A state that is a process is named as such ("during bolus delivery"), any other as "the closed state"."""
    last = text.rsplit(" ", 1)[-1]
    in_state = text if last in ("mode", "state") else text + " state"
    process = last in _PROCESS_NOUNS or (last.endswith("ing") and last not in _NOT_PROCESSES)
    return {"": text if process else "the " + in_state, "state": in_state, "bare": text}


def _action_forms(verb: str, target: str) -> dict[str, str]:
    past = participle(verb)
    return {
        "": f"{verb} {target}",
        "ing": f"{gerund(verb)} {target}",
        "s": f"{third_person(verb)} {target}",
        "object": target,
        "pp": past,
        "cap": capital(f"{verb} {target}"),
        "passive": f"{target} shall be {past}",
    }


def _decimals(step: object) -> int:
    text = str(step)
    return len(text.partition(".")[2]) if "." in text and not text.endswith(".0") else 0


def with_unit(number: str, unit: str) -> str:
    """Write a number with its unit, in the singular for exactly one."""
    if number != "1":
        return f"{number} {unit}"
    head, gap, tail = unit.partition(" ")
    if head.endswith("s") and not head.endswith("ss") and len(head) > 3:
        head = head[:-2] if head.endswith(("ches", "xes")) else head[:-1]
    return f"1 {head}{gap}{tail}"


def quantity_forms(entry: dict, rng: random.Random) -> dict[str, str]:
    """Draw a value of a quantity; half of the draws are rounded to a coarse step, as people choose limits."""
    low, high, step, unit = entry["low"], entry["high"], entry["step"], entry["unit"]
    steps = max(1, round((high - low) / step))
    index = int(rng.random() * (steps + 1))
    if steps > 20 and rng.random() < 0.5:
        index -= index % max(1, steps // 20)
    places = max(_decimals(step), _decimals(low))
    value, bottom, top = (f"{number:,.{places}f}" for number in (low + index * step, low, high))
    name = entry["name"]
    return {
        "": name,
        "cap": capital(name),
        "a": indefinite(name),
        "the": "the " + name,
        "unit": unit,
        "value": with_unit(value, unit),
        "low": with_unit(bottom, unit),
        "high": with_unit(top, unit),
        "range": f"between {bottom} and {top} {unit}",
        "step": with_unit(f"{step:.{_decimals(step)}f}", unit),
    }


def is_demonstration(frame: dict) -> bool:
    """Whether a parsed frame answers one of the prompts for demonstration."""
    return frame["text"].startswith(DEMONSTRATION_OPENINGS)
