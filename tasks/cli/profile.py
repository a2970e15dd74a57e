"""`edgepress profile`: measure this machine as a device profile, data/devices/host.yaml, for `edgepress fit`.

    edgepress profile [--threads N] [--out FILE]
    edgepress fit --model DIR --device host

How it measures, and what it can't: `tasks.device_profiles.this_machine`.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from tasks.algorithms.errors import InputError
from tasks.cli import console
from tasks.cli.fit import PROFILES

OUT = PROFILES / "host.yaml"
SECONDS = 1.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of each kernel (default: {SECONDS})")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {'/'.join(OUT.parts[-3:])}")


def main(given: argparse.Namespace) -> None:
    """Measure, write the profile, and print its figures with their sources."""
    if not 0 < given.seconds < math.inf:
        raise InputError(f"--seconds {given.seconds:g} is no time: expected a positive number")
    most = os.cpu_count() or 1
    if given.threads is not None and not 1 <= given.threads <= most:
        raise InputError(
            f"--threads {given.threads} is not possible here: expected 1 to {most}, the processor's threads"
        )
    import torch  # here: --help and a wrong call need not wait for it

    from tasks.device_profiles import this_machine

    if given.threads is not None:
        torch.set_num_threads(given.threads)
    measured = this_machine.write(this_machine.profile(this_machine.measure(given.seconds)), given.out)
    rows = [[row["figure"], _value(row["value"]), row["source"]] for row in measured.sources()]
    console.show(
        f"{given.out}: {measured.description}", console.table(["figure", "value", "source"], rows, left=["source"])
    )


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else format(value, ",")
