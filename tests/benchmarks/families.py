"""The matrix of families and stages: which stages a tiny random model of each family goes through, and what is refused.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.families [--only GPT-2]

A line per family: its class of transformers, how many stages it went through, CPU seconds, and the first sentence that
stopped it. The models that are refused come at the end, each with a part of its sentence.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from tests.support import family_matrix
from tests.support.family_list import FAMILIES, REFUSED


def line(name: str) -> tuple[bool, str]:
    """Whether a family went through all stages, and its line."""
    done: list[str] = []
    began, said = time.process_time(), "all"
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
        try:
            done.extend(family_matrix.run(Path(root), name))
        except Exception as error:  # the matrix goes on with the next one
            said = f"stopped: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    spent = f"{time.process_time() - began:.1f}"
    return said == "all", f"| {name} | {FAMILIES[name].architecture} | {len(done)} | {spent} | {said} |"


def main(arguments: list[str]) -> int:
    """Print the matrix; how many families were stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=FAMILIES, help="one family")
    only = parser.parse_args(arguments).only
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    stopped = 0
    for name in [only] if only else FAMILIES:
        went, text = line(name)
        stopped += not went
        print(text, flush=True)
    for name, (architecture, sentence) in ({} if only else REFUSED).items():
        print(f"| {name} | {architecture} | | | refused: {sentence} |")
    return stopped


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
