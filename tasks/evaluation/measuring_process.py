"""How fast, how large and how hungry one model is on this machine: measured in a process of its own.

`python -m tasks.evaluation.measuring_process FOLDER '{"threads": 1, …}'` is that process and prints one line of JSON;
`measure_each` starts it, so that no model warms another, and what the caller has imported doesn't count. The model is
any folder that `tasks.runners.engines` runs. Its files are read once before, so that the disk has no part in the times.

| figure | what it is |
|---|---|
| `import_seconds`, `load_seconds` | the engine's libraries, as `tasks.runtime.lean` has them; the model, until ready |
| `first_token_seconds` | the very first call: the prompt, and one token |
| `generation_seconds` | each of `generations` whole ones at batch 1, prompt included, after one that warms up |
| `together_seconds` | one at batch `TOGETHER`, after one that warms up |
| `cpu_seconds_per_token` | of all threads, over these generations at batch 1 |
| `joules_per_token` | RAPL's, of the whole processor and all that ran on it; null where the host shows none |
| `peak_bytes` | resident memory at its most, loading and batch 1, libraries and mapped files included |
| `above_libraries_bytes` | that, above the peak of the imports |

Figures are of this machine at this time: another run gives others. It takes no medians and compares nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from tasks.algorithms.errors import InputError
from tasks.parameters.machine import processor
from tasks.runtime import lean, processes

ROOT = Path(__file__).resolve().parents[2]
POWER = Path("/sys/class/powercap")
TOGETHER = 4
"""Sequences of the larger batch."""
READY = "imported"
"""The process's first line."""
REFUSED = 2
"""Exit code of the process after an InputError, whose sentence is its last line."""


@dataclass(frozen=True)
class Workload:
    """What is asked of a model.

    Attributes:
        threads: of the engine.
        prompt_tokens: random ones, the same for every model with as many tokens.
        new_tokens: that follow, none sampled, none an end token.
        generations: that are timed.
        vocabulary: prompt tokens are below it; None: the model's own.
        settings: of `tasks.runners.engines.load`.
    """

    threads: int
    prompt_tokens: int
    new_tokens: int
    generations: int
    vocabulary: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def measure(folder: Path, workload: Workload) -> dict[str, Any]:
    """The figures of a model folder, from a process of its own; raises as `measure_each`."""
    return next(measure_each([folder], workload))


def measure_each(folders: Sequence[Path], workload: Workload) -> Iterator[dict[str, Any]]:
    """The figures of model folders, each from a process of its own, one after another.

    On two cores two processes import their libraries at once, and nothing else happens meanwhile: a model is loaded
    and asked while no other process does anything.

    Raises:
        InputError: a model can't be loaded, its engine isn't installed, or its process was killed.
        RuntimeError: it failed otherwise.
    """
    together = min(2, len(os.sched_getaffinity(0)))
    for first in range(0, len(folders), together):
        with contextlib.ExitStack() as stack:
            started = [
                (folder, stack.enter_context(_started(folder, workload)))
                for folder in folders[first : first + together]
            ]
            for _, (process, _) in started:
                process.stdout.readline()  # READY, or nothing: then it has ended
            for folder, (process, errors) in started:
                yield _figures(folder, process, errors)


@contextlib.contextmanager
def _started(folder: Path, workload: Workload) -> Iterator[tuple[subprocess.Popen, IO[str]]]:
    """The process, which imports and then waits for a line, and the file with its errors."""
    environment = os.environ | {name: str(workload.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    call = [
        sys.executable,
        "-m",
        "tasks.evaluation.measuring_process",
        str(folder.resolve()),
        json.dumps(asdict(workload)),
    ]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            call, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        try:
            yield process, errors
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.communicate()


def _figures(folder: Path, process: subprocess.Popen, errors: IO[str]) -> dict[str, Any]:
    said, _ = process.communicate("\n")
    errors.seek(0)
    words = errors.read()
    if process.returncode == REFUSED:
        raise InputError(words.splitlines()[-1])
    if process.returncode < 0:
        raise InputError(
            f"the process that measured {folder} was ended by signal {-process.returncode}; where it was the memory"
            " that ran out, end other programs or take a smaller model, and run again"
        )
    if process.returncode:
        raise RuntimeError(f"measuring {folder} failed:\n{words}")
    return json.loads(said.splitlines()[-1])


def here(folder: Path, workload: Workload, imported: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """The figures, measured in this process; `imported` is called between the imports and the rest.

    Raises:
        InputError: the model can't be loaded, or its engine isn't installed.
    """
    for path in folder.iterdir():
        if path.is_file():
            path.read_bytes()  # into the page cache, for all alike
    started = time.perf_counter()
    _import_engine(folder)
    found: dict[str, Any] = {"import_seconds": time.perf_counter() - started}
    libraries = processes.peak()
    imported()
    from tasks.runners import engines

    started = time.perf_counter()
    engine = engines.load(folder, workload.threads, **workload.settings)
    found["load_seconds"] = time.perf_counter() - started
    ids = _prompt(folder, workload)
    found["first_token_seconds"] = _time_to_first(engine, ids, workload.new_tokens)
    found |= _generations(engine, ids, workload)
    found["peak_bytes"] = processes.peak()
    found["above_libraries_bytes"] = found["peak_bytes"] - libraries
    together = ids.repeat(TOGETHER, axis=0)
    engine.generate(together, workload.new_tokens)
    found["together_seconds"] = _seconds(engine, together, workload.new_tokens)
    return found


def machine() -> dict[str, Any]:
    """The processor's name, where Linux tells it, and the number of cores that this process may use."""
    return {"processor": processor(), "cores": len(os.sched_getaffinity(0))}


def _import_engine(folder: Path) -> None:
    """Import what the engine of a folder needs, so that the memory of its code can be told from that of the model."""
    from tasks.runners import engines, llama_bindings

    with contextlib.suppress(ModuleNotFoundError):  # engines.load says so
        if (folder / engines.GENAI).exists():
            import onnxruntime_genai  # noqa: F401
        elif (folder / engines.GGUF).exists():
            llama_bindings.import_library()
        else:
            from tasks.models import model_files
            from tasks.runners import any_folder  # noqa: F401

            if model_files.is_quantised(folder):
                from tasks.models import gptq_folder  # noqa: F401


def _prompt(folder: Path, workload: Workload) -> Any:
    """int64 [1, prompt_tokens]."""
    import numpy as np

    vocabulary = workload.vocabulary
    if vocabulary is None:
        from tasks.algorithms.model.shape import shape_of_config
        from tasks.runners import any_folder

        vocabulary = shape_of_config(any_folder.config(folder)).vocabulary
    return np.random.default_rng(0).integers(1, vocabulary, (1, workload.prompt_tokens))


def _generations(engine: Any, ids: Any, workload: Workload) -> dict[str, Any]:
    """Times at batch 1, and processor time and energy of them."""
    engine.generate(ids, workload.new_tokens)
    tokens = workload.generations * workload.new_tokens
    cpu, energy = time.process_time(), joules()
    times = [_seconds(engine, ids, workload.new_tokens) for _ in range(workload.generations)]
    cpu, after = time.process_time() - cpu, joules()
    return {
        "generation_seconds": times,
        "cpu_seconds_per_token": cpu / tokens,
        "joules_per_token": None if energy is None or after is None or after < energy else (after - energy) / tokens,
    }


def _seconds(engine: Any, ids: Any, new_tokens: int) -> float:
    started = time.perf_counter()
    engine.generate(ids, new_tokens)
    return time.perf_counter() - started


def _time_to_first(engine: Any, ids: Any, new_tokens: int) -> float:
    class Enough(Exception):
        pass

    def stop() -> None:
        raise Enough

    started = time.perf_counter()
    with contextlib.suppress(Enough):
        engine.generate(ids, new_tokens, stop)
    return time.perf_counter() - started


def joules() -> float | None:
    """Energy that the processor's packages have taken so far; None where the host doesn't tell."""
    try:
        meters = list(_meters())
        return sum(int(path.read_text(encoding="utf-8")) for path in meters) / 1e6 if meters else None
    except OSError:
        return None


def _meters() -> Iterator[Path]:
    """RAPL's counters of whole packages; they begin again at 0 some times a day."""
    for path in POWER.glob("intel-rapl:*/energy_uj"):
        if re.fullmatch(r"intel-rapl:\d+", path.parent.name):
            yield path


def main(folder: str, workload: str) -> int:
    """The process; returns the exit code."""
    processes.die_with_parent()
    lean.apply()
    try:
        print(json.dumps(here(Path(folder), Workload(**json.loads(workload)), _wait)))
    except InputError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return REFUSED
    return 0


def _wait() -> None:
    """Say that all is imported, and wait until it is this process's turn."""
    print(READY, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
