"""What does it cost when a call to the kernel fails? Every call of a stage, a promotion, an update, a night, in turn.

    python -m tests.benchmarks.faults                      # every call, every fault: hours
    python -m tests.benchmarks.faults --case update        # of one case
    python -m tests.benchmarks.faults --every 5 --start 2  # calls 2, 7, 12, …

Faults are ENOSPC, EIO, EACCES, EINTR for one call, SIGKILL before it, and no room for a byte from it on. What is
disturbed, and what has to hold after it, is `tests.support.fault_cases`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.support import fault_cases, faults


def parse(arguments: list[str] | None) -> argparse.Namespace:
    described = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.faults", description=described)
    parser.add_argument("--case", choices=list(fault_cases.CASES), help="this alone")
    parser.add_argument("--fault", choices=faults.FAULTS, help="this alone")
    parser.add_argument("--every", type=int, default=1, help="of so many calls one")
    parser.add_argument("--start", type=int, default=0, help="number of the first call")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Print what was not as it has to be, and a row per case; 1 where there was anything."""
    given = parse(arguments)
    faulty = 0
    print("| case | calls | faults | harm | seconds each |\n|---|---|---|---|---|", flush=True)
    for name in [given.case] if given.case else fault_cases.CASES:
        with tempfile.TemporaryDirectory() as folder:
            case = fault_cases.CASES[name](Path(folder))
            started, harm, count = time.monotonic(), 0, 0
            for number in range(given.start, len(case.calls), given.every):
                for fault in [given.fault] if given.fault else faults.FAULTS:
                    count += 1
                    found = list(case.disturb(fault, number))
                    harm += bool(found)
                    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr, flush=True)
            seconds = (time.monotonic() - started) / max(count, 1)
            print(f"| {name} | {len(case.calls)} | {count} | {harm} | {seconds:.2f} |", flush=True)
            faulty += harm
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main())
