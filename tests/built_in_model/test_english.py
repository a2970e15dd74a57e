"""Inflection against answers worked out by hand."""

from __future__ import annotations

import pytest

from tasks.built_in_model import english


@pytest.mark.parametrize(
    "phrase, expected",
    [
        ("pump", "a pump"),
        ("infusion pump", "an infusion pump"),
        ("hour meter", "an hour meter"),
        ("unit", "a unit"),
        ("user account", "a user account"),
        ("unexpected restart", "an unexpected restart"),
        ("unidentified caller", "an unidentified caller"),
        ("ultrasonic probe", "an ultrasonic probe"),
        ("ECG lead", "an ECG lead"),
        ("PLC", "a PLC"),
        ("RAM module", "a RAM module"),
        ("UPS", "a UPS"),
        ("one-time code", "a one-time code"),
        ("8-bit port", "an 8-bit port"),
        ("X-ray tube", "an X-ray tube"),
        ("LED", "an LED"),
        ("uplink", "an uplink"),
        ("euro payment", "a euro payment"),
        ("order line", "an order line"),
    ],
)
def test_indefinite_article(phrase, expected):
    assert english.indefinite(phrase) == expected


@pytest.mark.parametrize(
    "phrase, expected",
    [
        ("valve", "valves"),
        ("drug library entry", "drug library entries"),
        ("relay", "relays"),
        ("track switch", "track switches"),
        ("gear box", "gear boxes"),
        ("blood analysis", "blood analyses"),
        ("foreman", "foremen"),
        ("member of the public", "members of the public"),
        ("PLC", "PLCs"),
        ("rate of change", "rates of change"),
        ("signal passed at danger", "signals passed at danger"),
        ("field bus", "field buses"),
        ("status", "statuses"),
        ("stock-out", "stock-outs"),
        ("person", "people"),
        ("acceptance criterion", "acceptance criteria"),
        ("top of descent crossing", "top of descent crossings"),
    ],
)
def test_plural(phrase, expected):
    assert english.plural(phrase) == expected


@pytest.mark.parametrize(
    "verb, ing, past, third",
    [
        ("start", "starting", "started", "starts"),
        ("stop", "stopping", "stopped", "stops"),
        ("close", "closing", "closed", "closes"),
        ("transmit", "transmitting", "transmitted", "transmits"),
        ("cancel", "cancelling", "cancelled", "cancels"),
        ("open", "opening", "opened", "opens"),
        ("verify", "verifying", "verified", "verifies"),
        ("display", "displaying", "displayed", "displays"),
        ("shut down", "shutting down", "shut down", "shuts down"),
        ("override", "overriding", "overridden", "overrides"),
        ("free", "freeing", "freed", "frees"),
        ("tie", "tying", "tied", "ties"),
        ("scan", "scanning", "scanned", "scans"),
        ("dispatch", "dispatching", "dispatched", "dispatches"),
        ("withdraw", "withdrawing", "withdrawn", "withdraws"),
        ("slowly lower", "slowly lowering", "slowly lowered", "slowly lowers"),
        ("apply", "applying", "applied", "applies"),
        ("load", "loading", "loaded", "loads"),
        ("fix", "fixing", "fixed", "fixes"),
        ("enrol", "enrolling", "enrolled", "enrols"),
    ],
)
def test_verb_forms(verb, ing, past, third):
    assert (english.gerund(verb), english.participle(verb), english.third_person(verb)) == (ing, past, third)
