"""A copy of this project with a tiny random model and short corpora, in which the whole DAG takes a minute or two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tasks.runtime import warm
from tests.support.paths import ROOT

COPIED = (
    "flows",
    "tasks",
    "data/devices",
    "data/harness_tasks",
    "data/prompts.txt",
    "dvc.yaml",
    "params.yaml",
    ".dvcignore",
    ".gitignore",
    ".dvc/config",
    ".dvc/.gitignore",
)
DOCUMENT = (
    "The {n} pump shall start within {n} seconds of the request, and shall report the {n} state to the operator. "
)


class Project:
    """A folder with its own DVC cache and git history.

    Attributes:
        path: its root.
    """

    def __init__(self, path: Path, model: Path) -> None:
        self.path = path
        for name in COPIED:
            source, target = ROOT / name, path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
        shutil.copytree(model, path / "source/model")
        short_corpora(path / "source")
        self.change(SMALL)
        self("git", "init", "-q")
        self("git", "add", "-A")
        self("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "start")

    @classmethod
    def found(cls, path: Path) -> Project:
        """One that was made before, as it is."""
        project = cls.__new__(cls)
        project.path = path
        return project

    def __call__(
        self, *command: str, check: bool = True, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        """Run a command in the project; standard error is part of stdout."""
        done = subprocess.run(
            command,
            cwd=self.path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**clean_environment(), **(env or {})},
            timeout=1200,
        )
        assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done

    def repro(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """`dvc repro` of everything that the report needs, without a Prefect server."""
        return self(sys.executable, "-m", "dvc", "repro", *(arguments or ("report",)), check=check)

    def flow(self, check: bool = True) -> subprocess.CompletedProcess:
        """The same as a Prefect flow."""
        return self(sys.executable, "-m", "tasks", "run", "report", check=check)

    def change(self, values: dict[str, Any]) -> None:
        """Set parameters: {"wanda.keep": 1}."""
        change(self.path / "params.yaml", values)

    def lock(self) -> dict[str, dict[str, str]]:
        """dvc.lock: stage -> output -> hash."""
        stages = yaml.safe_load((self.path / "dvc.lock").read_text(encoding="utf-8"))["stages"]
        return {name: {out["path"]: out["md5"] for out in stage["outs"]} for name, stage in stages.items()}


SMALL = {
    "fetch.model.path": "source/model",
    **{f"fetch.corpora.{name}.path": f"source/{name}.jsonl" for name in ("train", "calibration", "test", "test_ood")},
    "calibrate.windows": 4,
    "calibrate.length": 64,
    "importance.windows": 2,
    "depth_prune.remove": 1,
    "depth_prune.protect_first": 1,
    "depth_prune.protect_last": 1,
    "lora.steps": 3,
    "lora.batch": 2,
    "lora.length": 64,
    "lora.rank": 4,
    "gptq.group_size": 32,
    "eora.rank": 4,
    "eora.budget_bytes": None,
    "qad.enabled": False,  # on in tests/pipeline
    "evaluate.length": 64,
    "evaluate.stride": 64,
    "evaluate.max_windows": 4,
    "evaluate.new_tokens": 4,
    "measure.enabled": False,  # it takes as long as all the rest
    "kv_cache.contexts": [16, 48],
    "kv_cache.tokens": 48,
    "kv_cache.residual": 8,
    "harness_data.enabled": False,
    "harness.enabled": False,
    "hardware_fit.context": 64,
}


QUICK = {key: value for key, value in SMALL.items() if not key.startswith("fetch.")}
"""Of SMALL what is no path."""


def short_corpora(folder: Path, documents: int = 60) -> dict[str, Path]:
    """Write four short texts that don't overlap, at most 190 documents each; returns split -> .jsonl file."""
    paths = {}
    for name, first in (("train", 0), ("calibration", 500), ("test", 700), ("test_ood", 900)):
        rows = [{"text": "".join(DOCUMENT.format(n=first + row + i) for i in range(8))} for row in range(documents)]
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def save_byte_level_tokenizer(folder: Path, context: int) -> int:
    """Write a tokenizer with a token per byte, and one that ends a text; returns how many there are."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = {"<end>": 0, **{char: i + 1 for i, char in enumerate(sorted(byte_level.alphabet()))}}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer, core.decoder = byte_level, decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<end>", eos_token="<end>", model_max_length=context
    ).save_pretrained(folder)
    return len(vocabulary)


def tiny_llama(folder: Path) -> Path:
    """Fill the folder with a random Llama of four layers (hidden 64) and a byte-level tokenizer."""
    vocabulary = save_byte_level_tokenizer(folder, 128)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def change(path: Path, values: dict[str, Any]) -> None:
    """Set parameters in a params.yaml: {"wanda.keep": 1}."""
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in values.items():
        *parents, last = key.split(".")
        section = params
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def clean_environment() -> dict[str, str]:
    """This process's environment without what would name a server or a run, its own `python` first on PATH.

    The warm process of the test session stays in it: stages are forked from that.
    """
    kept = {
        key: value
        for key, value in os.environ.items()
        if key == warm.SOCKET or not key.startswith(("PREFECT_", "EDGEPRESS_"))
    }
    return kept | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])}


def ran(output: str) -> set[str]:
    """Stages that `dvc repro` computed, from what it printed."""
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")}


def restored(output: str) -> set[str]:
    """Stages that `dvc repro` took from the run cache."""
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Stage '") and "is cached" in line}
