"""Slots that don't depend on the domain: times, sizes, versions, standards and other values that people choose.

A slot is a function that draws its text from the `random.Random` that it is given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Draw = Callable[[random.Random], str]
"""Writes a value that it draws."""


def _skewed(values: Sequence[str]) -> Draw:
    """Draw from values listed from the most to the least usual: early ones are taken more often."""
    count = len(values)
    return lambda rng: values[int(rng.random() * rng.random() * count)]


def _units(counts: str, unit: str) -> list[str]:
    return [f"{count} {unit if count == '1' else unit + 's'}" for count in counts.split()]


def _interleave(*lists: list[str]) -> list[str]:
    longest = max(map(len, lists))
    return [items[index] for index in range(longest) for items in lists if index < len(items)]


def version(rng: random.Random) -> str:
    """Write the version of a product or a document."""
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


def slots() -> dict[str, Draw]:
    """Return a table of the slots that do not depend on the domain."""
    lists = {name: _skewed(values) for name, values in _LISTS.items()}
    return _timing_slots() | lists | {"version": version, "count": _number}


def _timing_slots() -> dict[str, Draw]:
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


_LISTS: dict[str, list[str]] = {
    "few": ["three", "two", "five", "four", "six", "eight", "ten"],
    "size": _interleave(
        [f"{n} MiB" for n in (64, 128, 256, 512, 16, 32, 8, 48, 96)],
        [f"{n} GiB" for n in (1, 2, 4, 8)],
        [f"{n} KiB" for n in (512, 256, 64, 128, 768)],
    ),
    "ppm": ["1 in 10,000", "1 in 1,000", "1 in 100,000", "1 in a million", "5 in 10,000", "2 in 1,000"],
    "complexity": ["10", "15", "20", "12", "8", "25"],
    "training": ["two hours", "one day", "half a day", "one hour", "four hours", "two days", "three days"],
    "screen": ["1024", "768", "360", "1280", "1920", "480", "320"],
    "decibels": ["65 dB(A)", "70 dB(A)", "60 dB(A)", "75 dB(A)", "55 dB(A)", "80 dB(A)", "45 dB(A)"],
    "sil": ["2", "3", "1", "4"],
    "crypto": ["AES-256-GCM", "AES-128-GCM", "ChaCha20-Poly1305", "AES-256-CBC with HMAC-SHA-256", "AES-128-CCM"],
    "protocol": [
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
    ],
    "severity": ["critical", "major", "high", "minor", "medium"],
    "environment": [
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
    ],
    "platform": [
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
    ],
    "browser": ["Firefox ESR 115", "Chrome 120", "Edge 120", "Safari 17", "Chromium 118", "Firefox 121"],
    "format": ["CSV", "JSON", "XML", "PDF/A", "CBOR", "Apache Parquet", "HL7 FHIR", "plain text"],
    "language": [
        "German",
        "French",
        "Spanish",
        "Italian",
        "Polish",
        "Portuguese",
        "Japanese",
        "Dutch",
        "Finnish",
        "Korean",
    ],
    "factor": [
        "a password of at least 12 characters",
        "a one-time code",
        "a hardware token",
        "a smart card",
        "a fingerprint scan",
        "a personal certificate",
        "a PIN of at least six digits",
        "a confirmation on a registered device",
    ],
}
"""Values that are taken as they are, from the most to the least usual."""
