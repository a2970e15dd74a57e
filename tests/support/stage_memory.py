"""What each stage takes of memory: `python -m tests.support.stage_memory OUT.json` runs all of them on random models.

It prints per stage what was measured, what `tasks.parameters.needs` says, and the ratio; OUT.json has the same.
`--without measure` leaves out a stage that no later one of the list reads, `--shapes width` runs that shape alone.

A process per model runs them one after another, without DVC; a small chain comes first, so that libraries are imported
and their pages there. Before each stage free memory is given back to Linux and the mark of its peak is set anew: what
is measured is the peak above the memory before the stage, mapped files included.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import resource
import shutil
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import yaml

from tasks.algorithms.model import checkpoints
from tasks.parameters import needs, preflight, rules, schema
from tasks.runtime import processes
from tasks.runtime.stage import Inputs
from tests.benchmarks import chain as chains
from tests.support import project
from tests.support.paths import ROOT

STAGES = (
    "fetch",
    "vocabulary",
    "calibrate",
    "importance",
    "depth_prune",
    "wanda",
    "lora",
    "gptq",
    "eora",
    "qad",
    "package",
    "baseline_lora",
    "sensitivity",
    "baseline",
    "evaluate@fetch",
    "evaluate@package",
    "measure",
    "kv_cache",
    "harness_data@corpus",
    "harness@fetch-corpus",
    "harness@package-corpus",
)
SLOW = {"measure": (), "sensitivity": ("layers",), "baseline": ("layers",)}
"""Stages that take long -> the shapes on which the test runs them; this command runs all on all but the warm-up."""
SHAPES: dict[str, dict[str, int]] = {
    "layers": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12, "vocab_size": 1024},
    "width": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 1024},
    "vocabulary": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 32768},
}
"""Sizes of the random models: many layers, wide ones, a large vocabulary."""
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 512}
VALUES = {
    "fetch.model.path": "source/model",
    **{f"fetch.corpora.{name}.path": f"source/{name}.jsonl" for name in ("train", "calibration", "test", "test_ood")},
    "vocabulary.enabled": True,
    "calibrate.windows": 8,
    "calibrate.length": 256,
    "importance.windows": 1,
    "depth_prune.remove": 1,
    "depth_prune.protect_first": 0,
    "depth_prune.protect_last": 0,
    "lora.steps": 2,
    "lora.batch": 4,
    "lora.length": 256,
    "gptq.descent_cycles": 1,
    "gptq.mse": 0.0,
    "eora.rank": 8,
    "eora.budget_bytes": None,
    "qad.enabled": True,
    "qad.steps": 2,  # AdamW has its moments from the second on
    "qad.batch": 4,
    "qad.length": 256,
    "evaluate.length": 256,
    "evaluate.stride": 256,
    "evaluate.max_windows": 4,
    "evaluate.new_tokens": 2,
    "kv_cache.contexts": [256],
    "kv_cache.tokens": 256,
    "kv_cache.bits": [8],
    "harness.limit": 8,
    "measure.new_tokens": 8,
    "measure.generations": 1,
}


def parameters(changed: dict[str, Any] | None = None) -> schema.Params:
    """Those of params.yaml with `VALUES`, and others."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return schema.parse(chains.changed(raw, VALUES | (changed or {})), "params.yaml")


class MeasuredStage(Inputs):
    """A stage of dvc.yaml in a folder."""

    journal = answers = checkpoints.NOTHING

    def __init__(self, address: str, root: Path, params: schema.Params) -> None:
        self.name, _, item = address.partition("@")
        described = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"][self.name]
        model, _, task = item.partition("-")
        filled = {"${item.model}": model, "${item.task}": task or model, "${evaluate.prompts}": "data/prompts.txt"}
        filled |= {"${harness_data.folder}": "data/fetch/corpora", "${fetch.model.path}": "source/model"}
        filled |= {f"${{fetch.corpora.{name}.path}}": f"source/{name}.jsonl" for name in CORPORA}
        places = {}
        for dep in described["deps"]:
            for name, value in filled.items():
                dep = dep.replace(name, value)
            own = dep.startswith(("data/prompts.txt", "data/harness_tasks"))
            places[Path(dep)] = (ROOT if own else root) / dep
        super().__init__(address, places)
        declared = {key.split(".")[0] for key in described.get("params", ())}
        self.params = SimpleNamespace(**{key: getattr(params, key) for key in sorted(declared)})
        self.item, self.everything = item or None, params
        self.folder, self.facts = root / "data" / self.name / (item or ""), {}

    def output(self, name: str) -> Path:
        path = self.folder / name.removeprefix(f"{self.name}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def note(self, **facts: Any) -> None:
        self.facts |= facts

    def content(self, path: Path) -> None:
        """Nobody asks whether two models are the same."""

    def shelf(self, *_: Any, **__: Any) -> checkpoints.Saved:
        return checkpoints.NOTHING

    def pass_on(self, source: Path, target: Path) -> None:
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)

    def progress(self, *_: Any) -> Any:
        return contextlib.nullcontext(_Quiet())


class _Quiet:
    def update(self, done: int, **figures: float) -> None:
        pass


LATE = 60 * 2**20
"""Bytes that PyTorch's engine imports with its first model, and `needs` counts as the libraries'."""
CORPORA = ("train", "calibration", "test", "test_ood")


def make_model(folder: Path, sizes: dict[str, int]) -> None:
    """A random Llama, stored in bfloat16, with a byte-level tokenizer."""
    project.save_byte_level_tokenizer(folder, 512)
    config = transformers.LlamaConfig(
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        **sizes,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def make_source(root: Path, sizes: dict[str, int]) -> None:
    """A random model and short texts, where `VALUES` look for them."""
    make_model(root / "source/model", sizes)
    for first, name in enumerate(CORPORA):
        rows = [{"text": "".join(f"The {n} pump stops. " for n in range(first + n, first + n + 9))} for n in range(40)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"source/{name}.jsonl").write_text(text, encoding="utf-8")


def chain(
    root: Path, sizes: dict[str, int], changed: dict[str, Any] | None = None, stages: Sequence[str] = STAGES
) -> dict[str, dict[str, float]]:
    """Run stages in the folder; address -> what it took.

    "bytes" at the peak are above what was there, as are "predicted" ones; processor "seconds" are its children's, too.

    Args:
        changed: parameters besides `VALUES`.
        stages: in an order in which they can run.
    """
    make_source(root, sizes)
    model = preflight.model_shape(preflight.read_config(root / "source/model"))
    params, found = parameters(changed), {}
    with contextlib.chdir(root):
        for address in stages:
            stage = MeasuredStage(address, root, params)
            module, before, began = import_module(f"tasks.{stage.name}"), fresh(), _spent()
            module.run(stage)
            found[address] = {"bytes": _held(stage, before), "seconds": _spent() - began}
            if stage.name in needs.MEMORY:
                found[address]["predicted"] = needs.MEMORY[stage.name](rules.settle_all(params, model), model)
            _print(address, found[address])
            if address == "vocabulary":  # what follows keeps the whole one
                shutil.rmtree(stage.folder)
                module.skip(stage)
    return found


def _held(stage: MeasuredStage, before: int) -> int:
    """Bytes at the peak above what was held before; of the stage that measures in processes of their own, theirs."""
    own = processes.peak() - before
    theirs = [each["above_libraries_bytes"] - LATE for each in stage.facts.get("measured", {}).values()]
    return max([own, *theirs])


def _print(address: str, found: dict[str, float]) -> None:
    measured, predicted = (found.get(name, 0) / 2**20 for name in ("bytes", "predicted"))
    ratio = f"{predicted:7.0f} predicted, {predicted / max(measured, 0.1):5.2f}" if predicted else ""
    print(f"{address:24} {measured:7.0f} MiB {ratio:24} {found['seconds']:6.1f} s", flush=True)


def _spent() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def fresh() -> int:
    """Bytes that are held now, after all that can be given back was; the peak counts from here."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    return processes.peak()


def main() -> None:
    """Run all, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--without", nargs="+", default=[])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    given, found = parser.parse_args(), {}
    stages = [name for name in STAGES if name not in given.without]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # no model's gaps are the next one's
        for name in given.shapes:
            found[name] = pool.apply(_measured, (name, stages))
            given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def _measured(shape: str, stages: list[str]) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    for name, sizes in (("warm-up", TINY), (shape, SHAPES[shape])):
        print(name, sizes)
        chosen = [stage for stage in stages if name != "warm-up" or stage != "measure"]
        with tempfile.TemporaryDirectory() as folder:
            found = chain(Path(folder).resolve(), sizes, stages=chosen)
    return found


if __name__ == "__main__":
    main()
