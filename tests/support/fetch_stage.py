"""Stage fetch over a small local model and corpus; its fixtures are known to every test by tests/conftest.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from tasks import fetch
from tasks.algorithms.errors import InputError
from tasks.parameters import schema
from tasks.parameters.source_sections import Fetch
from tasks.sources import weight_check
from tests.support.paths import ROOT

OFF = {name: SimpleNamespace(enabled=False) for name in ("calibrate", "lora", "evaluate", "kv_cache", "harness")}


REVISION = "0123456789abcdef0123456789abcdef01234567"


TEXTS = ["The pump must stop.", "", "  \n", "Straße, naïve, 水"]


NO_HUB = {"hub": None, "revision": None}


AT_HUB = {"hub": "a/model", "revision": REVISION}


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "domain": "x"}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def make_fetch(tmp_path: Path, make_stage, model_folder: Path, corpus: Path):
    """make_fetch(model={…}, **corpora) -> the stage; whatever is not given is the small local one."""
    counter = iter(range(100))

    def make(model: dict | None = None, **corpora: dict):
        one = {"path": str(corpus), "field": "text", "config": None, "split": None, **NO_HUB}
        section = Fetch.model_validate(
            {
                "model": {"path": str(model_folder), **NO_HUB, **(model or {})},
                "corpora": {name: one | corpora.get(name, {}) for name in fetch.CORPORA},
            }
        )
        stage = make_stage({"fetch": section}, {}, out=f"out{next(counter)}")
        stage.input = Path  # every path is declared
        stage.everything = schema.load(ROOT / "params.yaml").model_copy(update=OFF)
        return stage

    return make


@pytest.fixture
def no_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("the weights were opened")

    monkeypatch.setattr(weight_check, "safe_open", refuse)


@pytest.fixture
def no_preflight(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The small model fits no params.yaml of the project; what preflight was asked is kept."""
    asked: list[dict] = []
    monkeypatch.setattr(fetch.preflight, "check", lambda _, config, **named: asked.append({"config": config, **named}))
    return asked


def refusal(stage) -> str:
    with pytest.raises(InputError) as caught:
        fetch.run(stage)
    message = str(caught.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
