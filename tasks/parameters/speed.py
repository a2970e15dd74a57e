"""How fast this machine is: a second's sample of what stages spend their time on, kept in the user's cache folder.

A process of its own measures it, once per machine and sizes of a block (`python -m tasks.parameters.speed`): PyTorch is
imported there and nowhere else. It counts processor time of one thread, in the fastest of several passes, so that what
else runs on the machine counts little; what further threads bring is a rule (`SHARES`). It goes into no artifact: only
`durations` asks for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.parameters import machine

if TYPE_CHECKING:
    from tasks.algorithms.model.shape import ModelShape

FOLDER = "edgepress"
"""Below the user's cache folder, XDG_CACHE_HOME or ~/.cache."""
SHARES = {"products": 0.9, "doubles": 0.9, "spectra": 0.3, "bytes": 0.5, "exps": 0.9, "calls": 0.0, "starts": 0.0}
"""Kind of work (`tasks.parameters.work.Work`) -> what a further thread brings of what the first one does, about."""
SECONDS = 0.1
"""How long each kernel is repeated."""
ROWS, SIDE, SPECTRUM, COPIED = 1024, 512, 256, 2**26
"""Tokens of a product; sides of a float64 product and of a decomposition; bytes of a copy."""
LOGITS = (32, 2**14)
"""Rows and columns of a softmax."""
TIMEOUT = 120
"""Seconds that the sample may take on a busy machine."""

Speed = dict[str, float]
"""Kind of work (the fields of `tasks.parameters.work.Work`) -> how much of it a second brings."""


def of_machine(model: ModelShape, device: str = "cpu", threads: int | None = None) -> Speed | None:
    """How much of each kind of work a second brings, for a model of these sizes; None where it can't be measured.

    Args:
        device: cpu or cuda.
        threads: of PyTorch; None: all cores of this process.
    """
    key = f"{machine.processor()}, {os.cpu_count()} cores: {device}, {model.hidden} x {model.mlp}"
    known = _read()
    if key not in known:
        if (found := _sampled(model, device)) is None:
            return None
        known[key] = found
        _write(known)
    more = (threads or len(os.sched_getaffinity(0))) - 1 if device == "cpu" else 0
    return {name: rate * (1 + SHARES[name] * more) for name, rate in known[key].items()}


def path() -> Path:
    """Where the samples are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / FOLDER / "speed.json"


def _read() -> dict[str, Speed]:
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    fits = isinstance(found, dict) and all(
        isinstance(each, dict) and set(each) == set(SHARES) for each in found.values()
    )
    return found if fits else {}


def _write(known: Mapping[str, Speed]) -> None:
    """Keep the samples; where the folder can't be written they are taken again."""
    unfinished = path().with_suffix(f".{os.getpid()}")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(known, indent=1), encoding="utf-8")
        os.replace(unfinished, path())
    except OSError:
        unfinished.unlink(missing_ok=True)


def _sampled(model: ModelShape, device: str) -> Speed | None:
    asked = json.dumps({"hidden": model.hidden, "mlp": model.mlp, "device": device})
    call = [sys.executable, "-m", "tasks.parameters.speed", asked]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(call, cwd=root, env=environment, capture_output=True, timeout=TIMEOUT, check=True)
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def measure(hidden: int, mlp: int, device: str = "cpu") -> Speed:
    """The sample, in this process, by one thread; without `starts`."""
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    tokens, weight = drawn(ROWS, hidden), drawn(mlp, hidden)
    square, logits = drawn(SIDE, SIDE, dtype=torch.float64), drawn(*LOGITS)
    symmetric = drawn(SPECTRUM, SPECTRUM, dtype=torch.float64)
    symmetric = symmetric @ symmetric.T
    source, target = (torch.ones(COPIED // 4, device=device) for _ in range(2))
    small, linear = drawn(1, 8), torch.nn.Linear(8, 8).to(device)
    on_card = device == "cuda"
    kernels: dict[str, tuple[Callable[[], Any], float]] = {
        "products": (lambda: torch.nn.functional.linear(tokens, weight), 2 * ROWS * hidden * mlp),
        "doubles": (lambda: square @ square, 2 * SIDE**3),
        "spectra": (lambda: torch.linalg.eigh(symmetric), SPECTRUM**3),
        "bytes": (lambda: target.copy_(source), 2 * COPIED),
        "exps": (lambda: torch.log_softmax(logits, dim=-1), logits.numel()),
        "calls": (lambda: [linear(small) for _ in range(100)], 100),
    }
    with torch.no_grad():
        return {
            name: amount / _fastest(kernel, torch.cuda.synchronize if on_card else None)
            for name, (kernel, amount) in kernels.items()
        }


def _fastest(kernel: Callable[[], Any], ready: Callable[[], Any] | None) -> float:
    """Seconds of the fastest pass: of this thread's processor time, or until the card is `ready`."""
    clock = time.perf_counter if ready else time.thread_time
    kernel()
    best, count, end = float("inf"), 0, clock() + SECONDS
    while count < 3 or clock() < end:
        if ready:
            ready()
        began = clock()
        kernel()
        if ready:
            ready()
        best, count = min(best, clock() - began), count + 1
    return best


def _main() -> None:
    began = time.process_time()
    import torch  # noqa: F401  how long that takes tells how long a stage needs to begin

    imported = time.process_time() - began
    print(json.dumps(measure(**json.loads(sys.argv[1])) | {"starts": 1 / imported}))


if __name__ == "__main__":
    _main()
