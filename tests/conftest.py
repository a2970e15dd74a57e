"""Fixtures for tests of several modules: a stage without DVC, small random models, a model folder with a tokenizer."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tasks.algorithms.model import checkpoints
from tasks.runtime import warm
from tasks.runtime.stage import Inputs
from tests.support import project

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests begin: the last to end are short, and no process is left alone with a long one."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


_looked_at = 0


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        _leave_libraries_alone()


def pytest_runtest_logfinish() -> None:
    if len(sys.modules) > _looked_at + 100:  # a library was imported by a test
        _leave_libraries_alone()


def _leave_libraries_alone() -> None:
    """A look for garbage at every object of torch takes half a second, and gptqmodel asks for several per model."""
    global _looked_at
    _looked_at = len(sys.modules)
    gc.collect()
    gc.freeze()


pytest_plugins = ["tests.support.fetch_stage", "tests.support.model_hub"]


class _Progress:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, done, **figures):
        pass


class FakeStage(Inputs):
    """What a stage module gets, without DVC; inputs are looked up as those of the real one.

    Args:
        inputs: path as dvc.yaml declares it, or its end -> where it lies.
        out: the folder of its outputs.
    """

    def __init__(self, params, inputs, out, item, journal, answers):
        super().__init__("under test", {Path(name): Path(place) for name, place in inputs.items()})
        sections = {
            name: SimpleNamespace(**values) if isinstance(values, dict) else values for name, values in params.items()
        }
        self.params, self.item, self.out = SimpleNamespace(**{"device": "cpu"} | sections), item, out
        self.journal = checkpoints.NOTHING if journal is None else journal
        self.answers = checkpoints.NOTHING if answers is None else answers
        self.facts = {}

    def output(self, name):
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def note(self, **facts):
        self.facts |= facts

    def content(self, path):
        return None

    def shelf(self, *_, **__):
        return checkpoints.NOTHING

    def pass_on(self, source, target):
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)

    def progress(self, description, total):
        return _Progress()


@pytest.fixture(scope="session", autouse=True)
def warm_process():
    """One process with the libraries in memory for all stages that this session's tests start."""
    server = warm.Server()
    os.environ |= server.environment()
    yield
    os.environ.pop(warm.SOCKET, None)
    server.close()


def _environment() -> Iterator[None]:
    """What a test sets in it ends with the test, also by a command or a library that it only calls: a process that
    differs from the warm one takes no stage from that, but seven seconds.
    """
    before = {**os.environ}
    yield
    own = "PYTEST_CURRENT_TEST"
    for name in {*os.environ} - {*before, own}:
        del os.environ[name]
    os.environ |= {name: value for name, value in before.items() if name != own}


environment_of_module = pytest.fixture(_environment, scope="module", autouse=True)
environment_of_test = pytest.fixture(_environment, autouse=True)


@pytest.fixture
def make_stage(tmp_path):
    """make_stage({section: params}, {suffix: path}, out="out") -> what run(stage) gets; it writes to tmp_path / out."""

    def make(params, inputs, out="out", item=None, journal=None, answers=None):
        return FakeStage(params, inputs, tmp_path / out, item, journal, answers)

    return make


@pytest.fixture
def make_model():
    """make_model(architecture="LlamaForCausalLM", seed=0, **config) -> a small random model in evaluation mode."""

    def make(architecture="LlamaForCausalLM", seed=0, **config):
        model_class = getattr(transformers, architecture)
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 96,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return model_class(model_class.config_class(**{**sizes, **config})).eval()

    return make


@pytest.fixture
def make_windows():
    """make_windows(windows, length, vocabulary=96, seed=0) -> int64 [windows, length]."""

    def make(windows, length, vocabulary=96, seed=0):
        return torch.randint(0, vocabulary, (windows, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def model_folder(tmp_path, make_model):
    """A small random Llama of four layers with a tokenizer of single characters: one token per character."""
    vocabulary = {"<unk>": 0, "\n": 1, **{chr(code): code - 30 for code in range(32, 126)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama():
    """tiny_llama(folder) -> the folder, with a random Llama of four layers (hidden 64) and a byte-level tokenizer."""

    return project.tiny_llama
