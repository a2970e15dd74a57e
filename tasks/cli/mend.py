"""`edgepress mend`: put right what a kill, a full disk or a failing one left behind, so that the next run goes on.

    edgepress mend            DVC's list of readers and writers, dvc.lock, its run cache, what it noted of an edit
    edgepress mend --cache    hash every byte of DVC's cache and of the outputs, too

It prints a sentence for each thing that it did. What is wrong and how it is mended: `tasks.runtime.mend`.
"""

from __future__ import annotations

import argparse
import itertools

from tasks.runtime import mend


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--cache", action="store_true", help="hash DVC's cache and the outputs, too")


def main(given: argparse.Namespace) -> None:
    """Mend, and print a sentence when its thing is done."""
    done = 0
    for sentence in itertools.chain(mend.mend(), mend.mend_cache() if given.cache else ()):
        print(sentence, flush=True)
        done += 1
    print("`dvc repro` goes on from here" if done else "nothing to mend")
