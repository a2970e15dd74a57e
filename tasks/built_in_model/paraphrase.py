"""Words and phrases of a frame that may be exchanged for others of the same meaning, so that few sentences recur."""

from __future__ import annotations

import re

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
_WITHIN = ("within ", "in less than ", "in no more than ", "in at most ")
KEPT = 0.45
"""Share of the words with synonyms that stay as the frame has them."""


def with_alternatives(literal: str, next_base: str) -> list[str | tuple[str, ...]]:
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
        pieces.append(_WITHIN)
    return [piece for piece in pieces if piece]
