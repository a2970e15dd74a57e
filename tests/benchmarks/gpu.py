"""The stages on a GPU: whether each runs there and repeats itself, how fast, in how much memory, how near to the CPU.

    python -m tests.benchmarks.gpu --minutes 8

Sections run one after another in a process of their own, the most telling first; one that takes too long is ended, one
that fails leaves its traceback, and the next begins. Beside them another process runs the built-in model's chain on the
CPU, for comparison. A row is printed and written as soon as it is known:

- gpu-machine.json: card, versions, processors.
- gpu-stages.csv: seconds and peak memory of each stage, and perplexities.
- gpu-agreement.csv: of two runs' files the share of equal values, and the largest difference.

Models of other sizes are random: they are for speed and memory alone.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tasks.runtime import accelerator
from tests.benchmarks import agreement
from tests.benchmarks.agreement import SAME
from tests.benchmarks.random_models import LLAMA_1B, LLAMA_8B, SMOLLM2_135M

COLUMNS = ("section", "stage", "device", "seconds", "peak_mib", "test", "test_ood", "note")
"""Of gpu-stages.csv. peak_mib: of the card's memory, what PyTorch gave to tensors at most; test: perplexity."""
AGREEMENT = ("section", "stage", "what", "values", "equal", "largest", "note")
"""Of gpu-agreement.csv. equal: share of values, `largest` the largest difference."""
FORKED = """
import os
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
from tasks.runtime import lean, warm
lean.apply()
for name in warm.LIBRARIES:
    if not name.startswith("dvc"):
        __import__(name)
import torch
pid = os.fork()
if not pid:
    print("a stage forked from the warm process computes", float(torch.ones(2, device="cuda").sum()), flush=True)
    os._exit(0)
print("and ends with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
"""What `tasks.runtime.warm` does, apart from DVC."""
MAIN = ("calibrate", "importance", "depth_prune", "wanda", "lora", "gptq", "eora", "package")
REST = ("kv_cache", "baseline_lora", "sensitivity", "baseline", "harness@package-corpus")


class Given(NamedTuple):
    """The command line: folders, the card's name to PyTorch ("cpu" tries the script out), a model, CPU threads."""

    results: Path
    cache: Path
    device: str
    model: Path | None
    threads: int
    small: bool

    @property
    def common(self) -> dict[str, Any]:
        """What differs from params.yaml everywhere."""
        return {"evaluate.new_tokens": 8, **({"lora.steps": 3, "calibrate.windows": 4} if self.small else {})}


class Tables:
    """Two CSV files that grow row by row, by several processes; each row is printed, too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def stage(self, **values: Any) -> None:
        self._add("gpu-stages.csv", COLUMNS, values)

    def agreement(self, **values: Any) -> None:
        self._add("gpu-agreement.csv", AGREEMENT, values)

    def _add(self, name: str, columns: tuple[str, ...], values: Mapping[str, Any]) -> None:
        row = [_text(values.get(column)) for column in columns]
        path = self.folder / name
        with path.open("a", encoding="utf-8", newline="") as file:
            if not file.tell():
                csv.writer(file, lineterminator="\n").writerow(columns)
            csv.writer(file, lineterminator="\n").writerow(row)
        if SAME not in row:
            print(f"{name.removesuffix('.csv')} | " + " | ".join(row), flush=True)


class Section:
    """What a section gets: its name, the tables, and stages that are timed.

    Attributes:
        given: the command line.
    """

    def __init__(self, name: str, given: Given) -> None:
        self.name, self.given, self.tables = name, given, Tables(given.results)

    def chain(self, params: Mapping[str, Any] | None = None, **more: Any) -> Any:
        """A chain of stages on the card."""
        from tests.benchmarks.chain import Chain

        asked = {"device": self.given.device, **self.given.common, **(params or {})}
        return Chain(**{"scratch": self.given.cache / "chain", **more}, params=asked)

    def run(self, chain: Any, addresses: Iterable[str], label: str = "") -> None:
        """Compute stages in this order, each measured alone; where one fails the others are still tried."""
        for address in addresses:
            self.measured(chain, address, label)

    def compare(self, address: str, one: Path, other: Path, kind: str) -> None:
        """A row per file that two runs of a stage wrote."""
        for name, found in agreement.of_folders(one, other):
            self.tables.agreement(section=self.name, stage=address, what=f"{kind}: {name}", **found)

    def model(self, name: str, shape: Mapping[str, Any]) -> Path:
        """A random model's folder; a row says how long it took to make."""
        from tests.benchmarks import random_models

        folder = self.given.cache / "models" / name
        if not folder.exists():
            began = time.monotonic()
            count = random_models.make(
                folder, {**shape, **(random_models.SMALL if self.given.small else {})}, self.given.device
            )
            took = time.monotonic() - began
            self.tables.stage(section=self.name, stage=f"make {name}", seconds=took, note=f"{count:,} parameters")
        return folder

    def measured(self, chain: Any, address: str, label: str = "") -> Path | None:
        """Compute a stage and write its row."""
        import torch

        device = chain.everything.device
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = {"section": self.name, "stage": f"{address} {label}".strip(), "device": device}
        began = time.monotonic()
        try:
            folder = chain.output(address)
        except Exception as error:
            traceback.print_exc()
            said = accelerator.sentence(error, address) or f"{type(error).__name__}: {error}"
            self.tables.stage(**row, seconds=time.monotonic() - began, note=" ".join(said.split())[:300])
            return None
        peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
        found = {}
        if address.startswith("evaluate@"):
            found = chain.perplexity(address.partition("@")[2])
        self.tables.stage(**row, seconds=chain.seconds(address), peak_mib=peak, **found)
        return folder


def machine(section: Section) -> None:
    """Card, versions, processors; and what a full card's memory is told as."""
    import numpy
    import torch
    import transformers

    described = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": section.given.threads,
    }
    if section.given.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": card.name,
            "gpu_memory_mib": card.total_memory // 2**20,
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "attention": {
                name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
                for name in ("flash", "mem_efficient", "math", "cudnn")
            },
        }
        try:
            torch.empty(2**38, dtype=torch.uint8, device="cuda")
        except RuntimeError as error:
            described["full"] = accelerator.sentence(error, "lora")
            described["full_words"] = str(error)[:400]
        forked = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=50)
        described["forked"] = (forked.stdout + forked.stderr)[-300:]
    (section.given.results / "gpu-machine.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(described), flush=True)


def smoke(section: Section) -> None:
    """Every stage that computes, on a tiny model, twice: the same bytes again."""
    first = section.chain(**_tiny(section.given.cache, "once"))
    addresses = (*MAIN, "evaluate@wanda", "evaluate@gptq", "evaluate@package", *REST[:-1])
    section.run(first, addresses)
    again = section.chain(**_tiny(section.given.cache, "again"))
    for address in MAIN:
        try:
            section.compare(address, first.output(address), again.output(address), "repeated")
        except Exception as error:
            section.tables.agreement(section=section.name, stage=address, note=f"{type(error).__name__}: {error}"[:200])


def built_in(section: Section) -> None:
    """The built-in model's chain."""
    chain = section.chain()
    section.run(chain, ("code", "corpus", "fetch", "vocabulary"))
    section.run(chain, ("evaluate@fetch", *MAIN[:4], "evaluate@wanda", "lora", "evaluate@lora"))
    section.run(chain, ("gptq", "evaluate@gptq", "eora", "package", "evaluate@package"))


def on_the_cpu(section: Section) -> None:
    """The same on the CPU, in a process beside the others."""
    chain = section.chain({"device": "cpu"})
    section.run(chain, ("code", "corpus", "fetch", "vocabulary", "evaluate@fetch", *MAIN[:4], "evaluate@wanda"))
    section.run(chain, ("lora", "evaluate@lora", "gptq", "evaluate@gptq", "eora", "package", "evaluate@package"))


def beside_the_cpu(section: Section) -> None:
    """The card's results beside the CPU's: of whole chains, and of single stages on the CPU's inputs."""
    from tests.benchmarks.chain import Chain

    class Known(Chain):
        """A chain that computes nothing."""

        def _compute(self, stage: Any, *_: Any) -> None:
            raise LookupError(f"{stage.address} was not computed on the CPU")

    ours = section.chain()
    scratch = section.given.cache / "chain"
    theirs = Known(scratch=scratch, params=section.given.common)
    for address in MAIN:
        if _is_known(theirs, address) and _is_known(Known(scratch=scratch, params=ours.changed), address):
            section.compare(address, theirs.output(address), ours.output(address), "chain")
    for address in ("calibrate", "importance", "wanda", "gptq", "eora"):
        if not _is_known(theirs, address):
            continue
        inputs = {(address, dep): theirs._place(theirs.stages[address], dep) for dep in theirs.stages[address].deps}
        if folder := section.measured(section.chain(replaced=inputs), address, "on the CPU's inputs"):
            section.compare(address, theirs.output(address), folder, "same inputs")


def rest(section: Section) -> None:
    """The built-in model's other stages that compute."""
    section.run(section.chain({"harness.limit": 16}), REST)


def llama_1b(section: Section) -> None:
    """Llama-3.2-1B's shape, all blocks: calibrate, wanda, a short recovery; GPTQ of two blocks."""
    folder = section.model("llama-1b", LLAMA_1B)
    section.run(_alone(section, folder), ("calibrate", "wanda", "lora"))
    part = section.model("llama-1b-2", dict(LLAMA_1B, num_hidden_layers=2))
    section.run(_alone(section, part), ("calibrate", "wanda", "lora", "gptq"), "2 blocks")


def smollm2(section: Section) -> None:
    """SmolLM2-135M, or a random model of its shape: all blocks up to recovery, and GPTQ of four."""
    folder = section.given.model or section.model("smollm2", SMOLLM2_135M)
    section.run(_alone(section, folder), ("calibrate", "importance", "wanda", "lora"))
    part = section.model("smollm2-4", dict(SMOLLM2_135M, num_hidden_layers=4))
    section.run(_alone(section, part), ("calibrate", "wanda", "lora", "gptq", "eora"), "4 blocks")


def llama_8b(section: Section) -> None:
    """Four blocks of Llama-3.1-8B's shape, streamed: all blocks are eight times as much time, and no more memory."""
    folder = section.model("llama-8b-4", dict(LLAMA_8B, num_hidden_layers=4))
    section.run(_alone(section, folder), ("calibrate", "wanda"), "4 of 32 blocks")
    part = section.model("llama-8b-1", dict(LLAMA_8B, num_hidden_layers=1))
    chain = _alone(section, part, {"gptq.embedding": {"bits": 16, "group_size": 32, "method": "nearest"}})
    section.run(chain, ("calibrate", "wanda", "lora", "gptq"), "1 of 32 blocks")


SECTIONS: dict[str, tuple[Callable[[Section], None], float]] = {
    "machine": (machine, 60),
    "smoke": (smoke, 150),
    "built-in": (built_in, 180),
    "llama-1b": (llama_1b, 150),
    "agreement": (beside_the_cpu, 60),
    "llama-8b": (llama_8b, 100),
    "smollm2": (smollm2, 90),
    "rest": (rest, 240),
}
"""Name -> what runs, and how many seconds it may take."""
BESIDE = "cpu"


def _alone(section: Section, model: Path, params: Mapping[str, Any] | None = None) -> Any:
    """A chain of single stages of a model that is not fetched, with a short recovery."""
    texts = section.chain({"device": "cpu"})
    read = ("calibrate", "importance", "depth_prune", "lora", "wanda")
    replaced = {(stage, dep): model for stage in read for dep in ("data/vocabulary/model", "data/depth_prune/model")}
    short = {"lora.steps": 10, "lora.batch": 4, "lora.length": 512, "gptq.group_size": 64, "eora.budget_bytes": 10**6}
    kept = section.given.cache / f"{model.name}-removed.json"
    blocks = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    kept.write_text(json.dumps({"kept": [*range(blocks)]}), encoding="utf-8")
    replaced |= {(stage, "data/depth_prune/removed.json"): kept for stage in ("lora", "eora")}
    replaced |= {(stage, "data/fetch/corpora"): _short_texts(section, texts) for stage in read}
    return section.chain({**short, **(params or {})}, replaced=replaced)


def _short_texts(section: Section, chain: Any) -> Path:
    """The built-in texts, of train the first documents: to tokenise all of it takes longer than ten steps."""
    folder, whole = section.given.cache / "texts", chain.output("fetch") / "corpora"
    if not folder.exists():
        shutil.copytree(whole, folder)
        with (whole / "train.jsonl").open(encoding="utf-8") as file:
            (folder / "train.jsonl").write_text("".join(itertools.islice(file, 300)), encoding="utf-8")
    return folder


def _tiny(cache: Path, run: str) -> dict[str, Any]:
    """Arguments of a chain over a model of four tiny blocks and short texts."""
    from tests.support import project

    folder = cache / "tiny"
    if not folder.exists():
        folder.mkdir(parents=True)
        project.tiny_llama(folder / "model")
    corpora = project.short_corpora(folder)
    return {"model": folder / "model", "corpora": corpora, "params": project.QUICK, "scratch": cache / run}


def _is_known(chain: Any, address: str) -> bool:
    try:
        chain.output(address)
    except LookupError:
        return False
    return True


def _work(names: list[str], given: Given, pipe: Connection) -> None:
    """Run sections in this process, and tell when each begins and ends."""
    if names != [BESIDE]:
        accelerator.prepare(given.device)
    import torch

    torch.set_num_threads(given.threads)
    for name in names:
        pipe.send(("begin", name))
        began = time.monotonic()
        try:
            (on_the_cpu if name == BESIDE else SECTIONS[name][0])(Section(name, given))
        except Exception:
            traceback.print_exc()
        Tables(given.results).stage(section=name, stage="all", seconds=time.monotonic() - began)
        pipe.send(("end", name))
    pipe.close()


def _started(context: Any, names: list[str], given: Given) -> tuple[Any, Connection]:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(names, given, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _supervise(context: Any, names: list[str], given: Given, until: float) -> None:
    """Run sections in a process; end it where one takes too long, and go on with the next in another."""
    left, tables = list(names), Tables(given.results)
    while left and time.monotonic() < until:
        process, pipe = _started(context, left, given)
        limit = min(until, time.monotonic() + SECTIONS[left[0]][1] + 60)  # the start's imports
        while left:
            try:
                heard = pipe.recv() if pipe.poll(max(0.0, limit - time.monotonic())) else None
            except EOFError:
                heard = None
            if heard is None:
                tables.stage(section=left.pop(0), stage="cut off", note="time is over, or its process ended")
                break
            if heard[0] == "begin":
                limit = min(until, time.monotonic() + SECTIONS[heard[1]][1])
            else:
                left.remove(heard[1])
                limit = until
        process.kill()
        process.join()
    for name in left:
        tables.stage(section=name, stage="not begun", note="time is over")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which everything is ended")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--cache", type=Path, default=Path("data/.scratch/benchmarks/gpu"))
    parser.add_argument("--sections", nargs="+", choices=[*SECTIONS], default=[*SECTIONS])
    parser.add_argument("--no-cpu", action="store_true", help="no chain on the CPU beside")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script out")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M; default: a random model of its shape")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--small", action="store_true", help="small models, to try the script out")
    asked = parser.parse_args(arguments)
    until = time.monotonic() + 60 * asked.minutes
    given = Given(asked.results, asked.cache, asked.device, asked.model, asked.threads, asked.small)
    for path in (given.results / "gpu-stages.csv", given.results / "gpu-agreement.csv"):
        path.unlink(missing_ok=True)
    given.cache.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    beside = None if asked.no_cpu else _started(context, [BESIDE], given)
    _supervise(context, asked.sections, given, until)
    if beside is not None:
        beside[0].join(max(0.0, until - time.monotonic()))
        beside[0].kill()
    sys.stdout.flush()


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
