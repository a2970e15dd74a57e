"""Expand sentence frames into requirements specifications in the style of ISO/IEC/IEEE 29148.

What it is: pure functions over already parsed lists of frames and domains.  `split` partitions both into the train,
calibration and test material; `documents` yields whole specifications until a number of bytes is reached.  Frames are
compiled once into literal pieces and slots, so that expansion is a short loop over lists.

What it does not do: it opens no file, parses no YAML, keeps no global state and draws no randomness other than from
the `random.Random` it is given.  It does not judge whether a combination makes engineering sense (the reaction to a
condition is drawn independently of it), and its inflection covers the vocabulary of the data files, not all of English.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

SPLIT_NAMES = ("train", "calibration", "test")

# Frames with these openings answer the prompts used for demonstration completions: the model must have seen them.
DEMONSTRATION_OPENINGS = ("The software must", "User authentication must", "The system must provide real-time")

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

# --------------------------------------------------------------------------------------------- English inflection

_AN_WORDS = ("hour", "honest", "honour", "heir")
_A_PREFIXES = ("uni", "use", "usa", "usu", "uti", "eu", "one", "once", "ura", "ubi")
_UN_NEGATIVE = ("unin", "unim", "unid")  # "uninterrupted", "unidentified": the negative un- takes "an"
_SPOKEN_ACRONYMS = ("RAM", "ROM", "LAN", "SIM", "NATO", "LIDAR", "SCADA", "RADAR", "RAID", "MAC", "SAN", "RIS")
_AN_LETTERS = "AEFHILMNORSX"

_PLURALS = {
    "person": "people",
    "child": "children",
    "foot": "feet",
    "criterion": "criteria",
    "series": "series",
    "aircraft": "aircraft",
    "staff": "staff",
    "datum": "data",
    "leaf": "leaves",
    "shelf": "shelves",
    "half": "halves",
    "knife": "knives",
    "life": "lives",
    "matrix": "matrices",
    "vertex": "vertices",
    "axis": "axes",
    "basis": "bases",
    "analysis": "analyses",
    "diagnosis": "diagnoses",
    "crisis": "crises",
    "hypothesis": "hypotheses",
    "bus": "buses",
    "cargo": "cargoes",
    "echo": "echoes",
    "equipment": "equipment",
    "human": "humans",
    "quiz": "quizzes",
    "phenomenon": "phenomena",
    "spectrum": "spectra",
    "torpedo": "torpedoes",
    "metadata": "metadata",
    "dosis": "doses",
    "synthesis": "syntheses",
    "talisman": "talismans",
}
_POSTMODIFIERS = (
    " of ",
    " in ",
    " for ",
    " from ",
    " to ",
    " at ",
    " on ",
    " with ",
    " between ",
    " by ",
    " per ",
    " without ",
    " during ",
    " after ",
    " over ",
    " under ",
    " into ",
    " passed ",
)
_PHRASE_PLURALS = {"top of descent crossing": "top of descent crossings", "point of sale": "points of sale"}

_PARTICIPLES = {
    "begin": "begun",
    "bind": "bound",
    "break": "broken",
    "bring": "brought",
    "broadcast": "broadcast",
    "build": "built",
    "catch": "caught",
    "choose": "chosen",
    "cut": "cut",
    "do": "done",
    "draw": "drawn",
    "drive": "driven",
    "feed": "fed",
    "find": "found",
    "forecast": "forecast",
    "freeze": "frozen",
    "get": "got",
    "give": "given",
    "go": "gone",
    "grind": "ground",
    "hide": "hidden",
    "hold": "held",
    "keep": "kept",
    "know": "known",
    "lay": "laid",
    "lead": "led",
    "leave": "left",
    "let": "let",
    "lose": "lost",
    "make": "made",
    "meet": "met",
    "offset": "offset",
    "override": "overridden",
    "oversee": "overseen",
    "overwrite": "overwritten",
    "pay": "paid",
    "preset": "preset",
    "put": "put",
    "read": "read",
    "rebuild": "rebuilt",
    "redo": "redone",
    "redraw": "redrawn",
    "reset": "reset",
    "resend": "resent",
    "rewrite": "rewritten",
    "ring": "rung",
    "run": "run",
    "rerun": "rerun",
    "say": "said",
    "see": "seen",
    "seek": "sought",
    "sell": "sold",
    "send": "sent",
    "set": "set",
    "show": "shown",
    "shut": "shut",
    "spin": "spun",
    "split": "split",
    "spread": "spread",
    "take": "taken",
    "teach": "taught",
    "tell": "told",
    "unbind": "unbound",
    "understand": "understood",
    "undertake": "undertaken",
    "undo": "undone",
    "unfreeze": "unfrozen",
    "unwind": "unwound",
    "wind": "wound",
    "withdraw": "withdrawn",
    "withhold": "withheld",
    "write": "written",
    "speak": "spoken",
    "steal": "stolen",
    "retake": "retaken",
    "bleed": "bled",
    "fly": "flown",
    "sweep": "swept",
    "withstand": "withstood",
    "light": "lit",
    "stand": "stood",
    "shed": "shed",
    "swing": "swung",
    "inset": "inset",
    "reread": "reread",
    "input": "input",
}
# Verbs of two or more syllables that double the last consonant (British spelling for those in -l).
_DOUBLING = frozenset(
    (
        "admit",
        "begin",
        "cancel",
        "commit",
        "compel",
        "control",
        "defer",
        "dial",
        "emit",
        "equal",
        "equip",
        "expel",
        "fulfil",
        "initial",
        "input",
        "label",
        "level",
        "model",
        "omit",
        "permit",
        "prefer",
        "propel",
        "rebut",
        "recur",
        "refer",
        "remit",
        "reset",
        "resubmit",
        "retransmit",
        "rerun",
        "rewrap",
        "signal",
        "submit",
        "total",
        "transfer",
        "transmit",
        "travel",
        "tunnel",
        "unplug",
        "unpin",
        "unzip",
        "preset",
        "offset",
        "marshal",
        "channel",
        "deter",
        "quit",
        "equip",
        "format",
        "unwrap",
        "replan",
        "remap",
        "reship",
        "replot",
        "retag",
        "rescan",
        "retrim",
        "inset",
        "enrol",
        "relevel",
        "relabel",
    )
)
_NOT_DOUBLING = frozenset(("bus", "gas", "mix", "fix", "tax", "relax"))
_LY_VERBS = frozenset(("apply", "comply", "multiply", "rely", "reply", "supply", "reapply", "fly", "imply"))


def indefinite(phrase: str) -> str:
    """Return `phrase` with the indefinite article its first sound asks for."""
    word = re.split(r"[\s/-]", phrase, maxsplit=1)[0]
    lower = word.lower()
    if len(word) > 1 and word[:2].isupper() and not word.startswith(_SPOKEN_ACRONYMS):
        vowel = word[0] in _AN_LETTERS
    elif word[0].isdigit():
        vowel = word[0] == "8" or word in ("11", "18")
    elif len(word) == 1:
        vowel = word.upper() in _AN_LETTERS
    elif lower.startswith(_AN_WORDS) or lower.startswith(_UN_NEGATIVE):
        vowel = True
    elif lower.startswith(_A_PREFIXES):
        vowel = False
    else:
        vowel = lower[0] in "aeiou"
    return ("an " if vowel else "a ") + phrase


def plural(phrase: str) -> str:
    """Return the plural of a noun phrase, inflecting the noun before the first preposition."""
    if phrase in _PHRASE_PLURALS:
        return _PHRASE_PLURALS[phrase]
    cuts = [position for position in (phrase.find(mark) for mark in _POSTMODIFIERS) if position > 0]
    head = phrase[: min(cuts)] if cuts else phrase
    tail = phrase[len(head) :]
    start = max(head.rfind(" "), head.rfind("-")) + 1
    return head[:start] + _plural_word(head[start:]) + tail


def _plural_word(word: str) -> str:
    if word.lower() in _PLURALS:
        return _PLURALS[word.lower()]
    if word.isupper() or word[-1:].isdigit():
        return word + "s"
    if word.endswith("man") and len(word) > 3:
        return word[:-3] + "men"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    if re.search(r"(s|x|z|[^r]ch|rch|sh)$", word):
        return word + "es"
    return word + "s"


def _verb_parts(verb: str) -> tuple[str, str, str]:
    """Split "automatically shut down" into the adverb, the word that is inflected and the particle."""
    words = verb.split(" ")
    first = 1 if len(words) > 1 and words[0].endswith("ly") and words[0] not in _LY_VERBS else 0
    before, after = " ".join(words[:first]), " ".join(words[first + 1 :])
    return before + " " if before else "", words[first], " " + after if after else ""


def _stem(word: str, vowel_suffix: str) -> str:
    """Return the stem to which -ing or -ed is added."""
    if "-" in word:
        head, _, last = word.rpartition("-")
        return f"{head}-{_stem(last, vowel_suffix)}"
    if word in _DOUBLING or (word not in _NOT_DOUBLING and re.fullmatch(r"[^aeiou]*[aeiou][bdfglmnprt]", word)):
        return word + word[-1]
    if re.fullmatch(r"squ[aeiou][bdglmnprt]", word):
        return word + word[-1]
    if vowel_suffix == "ing":
        if word.endswith("ie"):
            return word[:-2] + "y"
        return word[:-1] if word.endswith("e") and not word.endswith(("ee", "oe", "ye")) else word
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "i"
    return word[:-1] if word.endswith("e") else word


def gerund(verb: str) -> str:
    """Return the -ing form of a verb, which may have an adverb before it and a particle after it."""
    before, word, after = _verb_parts(verb)
    return f"{before}{_stem(word, 'ing')}ing{after}"


def participle(verb: str) -> str:
    """Return the past participle of a verb, which may have an adverb before it and a particle after it."""
    before, word, after = _verb_parts(verb)
    irregular = _PARTICIPLES.get(word.rpartition("-")[2])
    if irregular:
        return f"{before}{word[: len(word) - len(word.rpartition('-')[2])]}{irregular}{after}"
    return f"{before}{_stem(word, 'ed')}ed{after}"


def third_person(verb: str) -> str:
    """Return the third person singular of a verb."""
    before, word, after = _verb_parts(verb)
    if re.search(r"[^aeiou]y$", word):
        word = word[:-1] + "ies"
    elif re.search(r"(s|x|z|ch|sh|[^aeiou]o)$", word):
        word += "es"
    else:
        word += "s"
    return f"{before}{word}{after}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ------------------------------------------------------------------------------------------------- generic slots

_Draw = Callable[[random.Random], str]


def _skewed(values: Sequence[str]) -> _Draw:
    """Draw from values listed from the most to the least usual: early ones are taken more often."""
    count = len(values)
    return lambda rng: values[int(rng.random() * rng.random() * count)]


def _units(counts: str, unit: str) -> list[str]:
    return [f"{count} {unit if count == '1' else unit + 's'}" for count in counts.split()]


def _interleave(*lists: list[str]) -> list[str]:
    longest = max(map(len, lists))
    return [items[index] for index in range(longest) for items in lists if index < len(items)]


def _version(rng: random.Random) -> str:
    minor = int(rng.random() * rng.random() * 13)
    major = 1 + int(rng.random() * rng.random() * 9)
    return f"{major}.{minor}" if rng.random() < 0.7 else f"{major}.{minor}.{int(rng.random() * 10)}"


def _number(rng: random.Random) -> str:
    """A count between 10 and 50,000: mostly round, now and then an odd figure as real documents have."""
    if rng.random() < 0.15:
        return str(12 + int(rng.random() * rng.random() * 380))
    base = (1, 2, 5, 1, 2, 5, 3, 4, 8, 15)[int(rng.random() * 10)]
    value = base * (10, 100, 100, 1000)[int(rng.random() * 4)]
    return f"{value:,}"


def _generic_slots() -> dict[str, _Draw]:
    """Return a table of the slots that do not depend on the domain."""
    table = _timing_slots()
    table.update(_technical_slots())
    table["version"] = _version
    table["count"] = _number
    return table


def _timing_slots() -> dict[str, _Draw]:
    milliseconds = "100 200 500 50 250 20 10 300 150 800 400 5 750 80 30 120 350"
    small_seconds = "1 2 5 3 10 1.5 0.5 4 2.5"
    load = "80% 70% 60% 50% 75% 85% 40% 90% 65% 30% 25%"
    return {
        "latency": _skewed(
            _interleave(
                _units(small_seconds, "second"),
                [f"{n} ms" for n in milliseconds.split()],
                _units("100 200 500 50 20 250 150", "millisecond"),
            )
        ),
        "duration": _skewed(
            _interleave(
                _units("5 10 2 15 30 1 3 20 45 60 90 8 4", "minute"),
                _units("30 60 20 10 90 45 120", "second"),
                _units("1 2 4 8 6 3", "hour"),
            )
        ),
        "idle": _skewed(_units("10 5 15 30 3 2 20 1 60", "minute")),
        "worktime": _skewed(_interleave(_units("30 15 45 20 10 90", "minute"), _units("1 2 4 8 3 6", "hour"))),
        "period": _skewed(_interleave(_units("24 48 72 12 8 36 96", "hour"), _units("7 30 14 3 10 5 90 2", "day"))),
        "interval": _skewed(_interleave(_units("3 6 12 1 2 18", "month"), _units("30 90 60 180 45", "day"))),
        "retention": _skewed(_interleave(_units("5 10 2 3 7 1 15 30 25", "year"), _units("12 6 24 18 36", "month"))),
        "hours": _skewed(_units("10,000 20,000 50,000 5,000 8,760 25,000 100,000 40,000 15,000 2,000", "hour")),
        "frequency": _skewed(
            ["10 Hz", "1 Hz", "50 Hz", "100 Hz", "5 Hz", "2 Hz", "20 Hz", "25 Hz", "200 Hz", "1 kHz", "4 Hz", "0.5 Hz"]
        ),
        "percent": _skewed(["95%", "99%", "90%", "98%", "99.9%", "99.5%", "97%", "85%", "92%", "96%"]),
        "uptime": _skewed(["99.9%", "99.5%", "99.95%", "99%", "99.99%", "99.8%", "98.5%", "99.999%", "98%"]),
        "load": _skewed(load.split()),
        "tolerance": _skewed(["5%", "2%", "1%", "10%", "3%", "0.5%", "15%", "1.5%", "4%", "0.2%", "8%", "20%", "2.5%"]),
        "rate": _rate,
    }


def _rate(rng: random.Random) -> str:
    what = ("messages", "requests", "transactions", "records", "events")[int(rng.random() * 5)]
    return f"{_number(rng)} {what} per {('second', 'minute', 'minute', 'hour')[int(rng.random() * 4)]}"


def _technical_slots() -> dict[str, _Draw]:
    sizes = _interleave(
        [f"{n} MiB" for n in (64, 128, 256, 512, 16, 32, 8, 48, 96)],
        [f"{n} GiB" for n in (1, 2, 4, 8)],
        [f"{n} KiB" for n in (512, 256, 64, 128, 768)],
    )
    return {
        "few": _skewed(["three", "two", "five", "four", "six", "eight", "ten"]),
        "size": _skewed(sizes),
        "ppm": _skewed(["1 in 10,000", "1 in 1,000", "1 in 100,000", "1 in a million", "5 in 10,000", "2 in 1,000"]),
        "complexity": _skewed(["10", "15", "20", "12", "8", "25"]),
        "training": _skewed(["two hours", "one day", "half a day", "one hour", "four hours", "two days", "three days"]),
        "screen": _skewed(["1024", "768", "360", "1280", "1920", "480", "320"]),
        "decibels": _skewed(["65 dB(A)", "70 dB(A)", "60 dB(A)", "75 dB(A)", "55 dB(A)", "80 dB(A)", "45 dB(A)"]),
        "sil": _skewed(["2", "3", "1", "4"]),
        "crypto": _skewed(
            ["AES-256-GCM", "AES-128-GCM", "ChaCha20-Poly1305", "AES-256-CBC with HMAC-SHA-256", "AES-128-CCM"]
        ),
        "protocol": _skewed(
            [
                "TLS 1.3",
                "HTTPS",
                "MQTT 5.0 over TLS 1.2",
                "OPC UA",
                "SFTP",
                "gRPC over TLS 1.3",
                "Modbus TCP",
                "AMQP 1.0",
                "WebSocket over TLS 1.3",
                "SNMPv3",
                "CoAP over DTLS 1.2",
                "Syslog over TLS 1.2",
            ]
        ),
        "severity": _skewed(["critical", "major", "high", "minor", "medium"]),
        "environment": _skewed(
            [
                "an ambient temperature of 40 degrees Celsius",
                "a relative humidity of 95%, non-condensing",
                "a temperature between 0 and 50 degrees Celsius",
                "an ambient temperature of -20 degrees Celsius",
                "an illumination of 500 lux",
                "vibration of 2 g between 10 and 150 Hz",
                "direct sunlight of 50,000 lux",
                "an altitude of 3,000 metres",
                "a temperature between 15 and 30 degrees Celsius",
                "salt mist and condensation",
                "a magnetic field of 30 A/m",
                "a temperature change of 10 degrees Celsius per minute",
            ]
        ),
        "platform": _skewed(
            [
                "Ubuntu 22.04 LTS",
                "Windows 11",
                "Red Hat Enterprise Linux 9",
                "Android 14",
                "iOS 17",
                "Windows 10 IoT",
                "Debian 12",
                "QNX 7.1",
                "FreeRTOS 10.5",
                "Zephyr 3.4",
                "VxWorks 7",
                "macOS 14",
            ]
        ),
        "browser": _skewed(["Firefox ESR 115", "Chrome 120", "Edge 120", "Safari 17", "Chromium 118", "Firefox 121"]),
        "format": _skewed(["CSV", "JSON", "XML", "PDF/A", "CBOR", "Apache Parquet", "HL7 FHIR", "plain text"]),
        "language": _skewed(
            ["German", "French", "Spanish", "Italian", "Polish", "Portuguese", "Japanese", "Dutch", "Finnish", "Korean"]
        ),
        "factor": _skewed(
            [
                "a password of at least 12 characters",
                "a one-time code",
                "a hardware token",
                "a smart card",
                "a fingerprint scan",
                "a personal certificate",
                "a PIN of at least six digits",
                "a confirmation on a registered device",
            ]
        ),
    }


# ------------------------------------------------------------------------------------------------------- paraphrase

_SYNONYMS = (
    "shall/shall/shall/must",
    "store/keep/retain/save",
    "stored/kept/retained/saved",
    "display/show/present",
    "displayed/shown/presented",
    "displays/shows/presents",
    "recorded/logged/noted",
    "notify/inform/alert",
    "notified/informed/alerted",
    "detect/notice/recognise/identify",
    "detected/noticed/recognised/identified",
    "verify/check/confirm",
    "verified/checked/confirmed",
    "immediately/at once/without delay/straight away",
    "prevent/avoid",
    "prevented/avoided",
    "reject/refuse/decline",
    "rejected/refused/declined",
    "allow/permit",
    "allowed/permitted",
    "send/transmit/forward",
    "sent/transmitted/forwarded",
    "create/generate/produce",
    "created/generated/produced",
    "delete/remove/erase",
    "deleted/removed/erased",
    "change/alter/modify",
    "changed/altered/modified",
    "begin/start/commence",
    "begins/starts/commences",
    "restored/recovered/reinstated",
    "faults/failures/malfunctions",
    "fault/failure/malfunction",
    "approved/authorised/signed off",
    "message/notice",
    "at least/no less than/a minimum of",
    "no more than/at most/not more than",
    "during/in the course of/throughout",
    "so that/in such a way that",
    "in order to/so as to",
    "when/whenever/once/as soon as",
    "while/as long as",
    "When/Whenever/Once/As soon as/Every time",
    "While/As long as/For as long as",
    "If/In case/In the event that",
    "unless/except where/except when",
    "previous/earlier/preceding/former",
    "additional/further/extra",
    "necessary/required/needed",
    "automatically/without manual action/of its own accord",
    "together with/along with",
    "regularly/periodically/at regular intervals",
    "clearly/plainly/unambiguously",
    "current/present/latest",
    "completely/entirely/fully/in full",
    "correctly/properly/as intended",
    "quickly/rapidly/promptly",
    "permanently/for good",
    "temporarily/for the time being",
    "directly/without detour",
    "exactly/precisely",
    "available/at hand/ready for use",
    "damaged/harmed",
    "lost/missing",
    "separate/distinct",
    "entire/whole/complete",
    "caused/brought about/triggered",
    "according to/in line with/in keeping with",
    "instead of/in place of/rather than",
    "because/since/as",
    "several/a number of/various",
    "often/frequently",
    "usually/normally/as a rule",
    "replaced/exchanged/swapped",
    "measured/determined",
    "stopped/halted/ended",
    "selected/chosen/picked",
    "accepted/taken/admitted",
    "visible/apparent",
    "reduce/lower/decrease",
    "reduced/lowered/decreased",
    "increase/raise",
    "exceed/go beyond/surpass",
    "remain/stay",
    "remains/stays",
    "must not/shall not",
)
_ALTERNATIVES = {group.split("/")[0]: tuple(group.split("/")) for group in _SYNONYMS}
# A word after an indefinite article stays, or the article would be wrong.
_REPLACEABLE = re.compile(
    r"(?<!\ba )(?<!\ban )\b("
    + "|".join(sorted(map(re.escape, _ALTERNATIVES), key=len, reverse=True))
    + r")\b(?! not\b)"
)
# Words that may be nouns as well are taken for verbs after these only.
_AMBIGUOUS = frozenset(("store", "display", "change", "increase", "show", "approach", "reject", "message", "remain"))
_VERBAL = ("shall ", "must ", "should ", "may ", "can ", "to ", "not ", "and ", "or ", "then ")
_TIMES = frozenset(("latency", "duration", "idle", "period", "worktime"))
_WITHIN = ("within ", "in less than ", "in no more than ", "in at most ", "not later than ")
_KEPT = 0.45
"""Share of the words with synonyms that stay as the frame has them."""


def _with_alternatives(literal: str, next_base: str) -> list[str | tuple[str, ...]]:
    """A literal cut into strings and tuples of interchangeable phrases, the frame's own first."""
    pieces: list[str | tuple[str, ...]] = []
    end = 0
    tail = "within " if literal.endswith("within ") and next_base in _TIMES else ""
    body = literal[: len(literal) - len(tail)]
    for match in _REPLACEABLE.finditer(body):
        if match.group(1) in _AMBIGUOUS and not body[: match.start()].endswith(_VERBAL):
            continue
        pieces += [body[end : match.start()], _ALTERNATIVES[match.group(1)]]
        end = match.end()
    pieces.append(body[end:])
    if tail:
        pieces.append(_WITHIN[:4])
    return [piece for piece in pieces if piece]


# ------------------------------------------------------------------------------------------ compiled frames, domains

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
    generic: dict[str, _Draw]


@dataclass(frozen=True)
class Domain:
    """A domain with every inflected form of every entry worked out beforehand."""

    name: str
    code: str
    items: dict[str, tuple[dict[str, str], ...]]
    quantities: tuple[dict, ...]
    rationale: tuple[Frame, ...]
    narrative: tuple[Frame, ...]


@dataclass(frozen=True)
class Split:
    """The parsed frames and domains that one split may use; shared domains carry only this split's sentences."""

    name: str
    domains: tuple[dict, ...]
    frames: tuple[dict, ...]


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
            pieces += _with_alternatives(literal, limit) if paraphrase else [literal]
        pieces.append(Piece(base + number, base, form))
        end = match.end()
    pieces += _with_alternatives(text[end:], "") if paraphrase else [text[end:]]
    keys = frozenset(piece.key for piece in pieces if isinstance(piece, Piece))
    return Frame(tuple(pieces), keys, "{reqref" in text)


def compile_frames(frames: Sequence[dict]) -> FrameSet:
    """Compile parsed frames and group them by kind."""
    grouped: dict[str, list[Frame]] = {}
    for frame in frames:
        grouped.setdefault(frame["kind"], []).append(compile_text(frame["text"], not _is_demonstration(frame)))
    return FrameSet({kind: tuple(members) for kind, members in grouped.items()}, _generic_slots())


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
    return {"": text, "a": indefinite(text), "the": "the " + text, "plural": plural(text), "cap": _capital(text)}


def _plain_forms(text: str) -> dict[str, str]:
    bare = text[4:] if text.startswith("the ") else text
    return {"": text, "cap": _capital(text), "bare": bare}


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
        "cap": _capital(f"{verb} {target}"),
        "passive": f"{target} shall be {past}",
    }


def _decimals(step: object) -> int:
    text = str(step)
    return len(text.partition(".")[2]) if "." in text and not text.endswith(".0") else 0


def _with_unit(number: str, unit: str) -> str:
    """Write a number with its unit, in the singular for exactly one."""
    if number != "1":
        return f"{number} {unit}"
    head, gap, tail = unit.partition(" ")
    if head.endswith("s") and not head.endswith("ss") and len(head) > 3:
        head = head[:-2] if head.endswith(("ches", "xes")) else head[:-1]
    return f"1 {head}{gap}{tail}"


def _quantity_forms(entry: dict, rng: random.Random) -> dict[str, str]:
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
        "cap": _capital(name),
        "a": indefinite(name),
        "the": "the " + name,
        "unit": unit,
        "value": _with_unit(value, unit),
        "low": _with_unit(bottom, unit),
        "high": _with_unit(top, unit),
        "range": f"between {bottom} and {top} {unit}",
        "step": _with_unit(f"{step:.{_decimals(step)}f}", unit),
    }


# -------------------------------------------------------------------------------------------------------- splitting


def _is_demonstration(frame: dict) -> bool:
    return frame["text"].startswith(DEMONSTRATION_OPENINGS)


def _split_frames(frames: Sequence[dict], rng: random.Random) -> dict[str, list[dict]]:
    """Partition frames kind by kind, about 80 / 8 / 12 per cent, with at least one of each kind in each split."""
    result: dict[str, list[dict]] = {name: [] for name in SPLIT_NAMES}
    for kind in sorted({frame["kind"] for frame in frames}):
        members = sorted((frame for frame in frames if frame["kind"] == kind), key=lambda frame: frame["id"])
        free = [frame for frame in members if not _is_demonstration(frame)]
        result["train"] += [frame for frame in members if _is_demonstration(frame)]
        rng.shuffle(free)
        calibration = max(1, round(0.08 * len(members)))
        test = calibration + max(2 if len(members) >= 10 else 1, round(0.12 * len(members)))
        result["calibration"] += free[:calibration]
        result["test"] += free[calibration:test]
        result["train"] += free[test:]
    return result


_SENTENCE_LISTS = ("rationale", "verification", "narrative")


def _share(domain: dict, held_out: bool) -> dict:
    """Keep every fourth sentence of a shared domain for its evaluation split and the others for training."""
    part = dict(domain)
    for key in _SENTENCE_LISTS:
        part[key] = [text for index, text in enumerate(domain[key]) if (index % 4 == 3) == held_out]
    return part


def split(domains: list[dict], frames: list[dict], seed: int) -> dict[str, Split]:
    """Partition frames and domains into "train", "calibration" and "test".

    No frame is in two splits.  Calibration and test each get two domains that training never sees and two that it
    shares with training, of which the rationale, verification and narrative sentences are divided.
    """
    if len(domains) < 8:
        raise ValueError("at least 8 domains are needed: 4 are held out and 4 more are shared")
    rng = random.Random(seed)
    by_split = _split_frames(frames, rng)
    order = sorted(domains, key=lambda domain: domain["code"])
    rng.shuffle(order)
    held_calibration, held_test, shared_calibration, shared_test = (order[start : start + 2] for start in (0, 2, 4, 6))
    shared = shared_calibration + shared_test
    chosen = {
        "train": [_share(domain, False) for domain in shared] + order[8:],
        "calibration": held_calibration + [_share(domain, True) for domain in shared_calibration],
        "test": held_test + [_share(domain, True) for domain in shared_test],
    }
    return {name: Split(name, tuple(chosen[name]), tuple(by_split[name])) for name in SPLIT_NAMES}


# -------------------------------------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class Layout:
    """How a document is written; each string is a format with the fields named in `_LAYOUTS`."""

    heading: str
    requirement: str
    rationale: str
    acceptance: str
    attributes: str
    note: str
    item: str
    gap: str
    wording: int


_LAYOUTS = (
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

_TITLES = (
    "Software requirements specification: {system}",
    "Software Requirements Specification for the {system}",
    "{system} - requirements specification",
    "{code} requirements baseline: {system}",
    "Requirements for the {system} software",
)
_STATUS = ("draft", "approved", "for review", "released", "under change control")
_METHODS = ("test", "test", "test", "analysis", "inspection", "demonstration", "test and analysis", "review")
_PRIORITIES = ("high", "medium", "high", "low", "medium", "essential", "desirable")


@dataclass
class _Writer:
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


def expand(frame: Frame, scope: dict, writer: _Writer) -> str:
    """Write a frame, drawing the slots that `scope` does not hold yet and adding them to it."""
    out = []
    for piece in frame.pieces:
        if type(piece) is str:
            out.append(piece)
            continue
        if type(piece) is tuple:
            rng = writer.rng
            out.append(piece[0] if rng.random() < _KEPT else piece[int(rng.random() * len(piece))])
            continue
        item = scope.get(piece.key)
        if item is None:
            item = scope[piece.key] = _draw(piece, scope, writer)
        out.append(item[piece.form])
    text = "".join(out)
    return text[:1].upper() + text[1:]


def _draw(piece: Piece, scope: dict, writer: _Writer) -> dict[str, str]:
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
    return _quantity_forms(item, rng) if base == "quantity" else item


def _scope(writer: _Writer) -> dict:
    """A fresh scope in which only the name of the system is fixed for the whole document."""
    return dict(writer.scope)


def _next_frame(writer: _Writer, kind: str, scope: dict) -> Frame | None:
    """Deal the next frame of a kind that fits; all are used before one comes again.  None if there is none.

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


def _sentence(writer: _Writer, kind: str, scope: dict) -> str | None:
    frame = _next_frame(writer, kind, scope)
    return None if frame is None else expand(frame, scope, writer)


def _rationale(writer: _Writer, scope: dict) -> str | None:
    """A reason: sometimes one of the domain's own sentences, otherwise a frame about the requirement's slots."""
    if writer.rng.random() < 0.3:
        if "own" not in writer.decks:
            writer.decks["own"] = list(writer.domain.rationale)
            writer.rng.shuffle(writer.decks["own"])
        if writer.decks["own"]:
            return expand(writer.decks["own"].pop(), scope, writer)
    return _sentence(writer, "rationale", scope)


def _with_clauses(writer: _Writer, text: str, scope: dict) -> str:
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


def _identifier(writer: _Writer, kind: str) -> str:
    """The next identifier of a kind; numbers grow with gaps, as they do when requirements are withdrawn."""
    rng = writer.rng
    step = 1 + int(rng.random() ** 3 * 9)
    number = writer.numbers[kind] = writer.numbers.get(kind, int(rng.random() ** 2 * 60)) + step
    return f"{writer.domain.code}-{REQUIREMENT_KINDS[kind]}-{number:03d}"


def _attributes(writer: _Writer) -> str:
    """Priority, verification method and trace, each present or not, in the wording of the layout."""
    rng = writer.rng
    priority = _PRIORITIES[int(rng.random() * len(_PRIORITIES))]
    method = _METHODS[int(rng.random() * len(_METHODS))]
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


def _itemised(writer: _Writer, text: str) -> str:
    """Give the list items of a frame the marks of the layout."""
    head, *items = text.split("\n- ")
    marked = [writer.layout.item.format(letter="abcdefgh"[index], text=item) for index, item in enumerate(items)]
    return "\n".join([head, *marked])


def _requirement(writer: _Writer, kind: str) -> None:
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


def _append(writer: _Writer, form: str, text: str | None) -> None:
    if text is not None:
        writer.lines.append(form.format(text=text))


def _heading(writer: _Writer, number: int, text: str) -> None:
    writer.lines.append(writer.layout.heading.format(n=number, text=text, upper=text.upper()))


def _introduction(writer: _Writer) -> None:
    """Write the title, the narrative and some definitions."""
    rng, domain = writer.rng, writer.domain
    title = _TITLES[int(rng.random() * len(_TITLES))].format(system=writer.scope["system1"][""], code=domain.code)
    prefix = "# " if writer.layout.heading.startswith("#") else ""
    writer.lines.append(prefix + _capital(title))
    if rng.random() < 0.7:
        writer.lines.append(f"Version {_version(rng)}, {_STATUS[int(rng.random() * len(_STATUS))]}")
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
    writer = _Writer(rng, domain, frames, _LAYOUTS[int(rng.random() * len(_LAYOUTS))], {"system1": system})
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


def _section(writer: _Writer, number: int, kind: str, target: float) -> None:
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
