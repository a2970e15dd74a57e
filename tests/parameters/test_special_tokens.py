"""A tokenizer without what later stages ask of it, known before they run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from tasks import fetch
from tasks.parameters import preflight
from tasks.parameters.special_tokens import Known, of_files, problems
from tests.support.fetch_stage import refusal


def asked(**enabled: object) -> SimpleNamespace:
    sections = {name: SimpleNamespace(enabled=False, protocol="joined") for name in ("harness", "evaluate", "kv_cache")}
    return SimpleNamespace(**sections | {name: SimpleNamespace(**values) for name, values in enabled.items()})


HARNESS = {"harness": {"enabled": True}}
ROLLING = {"evaluate": {"enabled": True, "protocol": "rolling"}}


@pytest.mark.parametrize(
    "params, known, sentence",
    [
        (HARNESS, Known(True, False, True), "the tokenizer has no eos token, which lm_eval begins and ends texts with"),
        (HARNESS, Known(False, True, True), None),
        ({}, Known(False, False, False), None),
        (ROLLING, Known(False, False, True), "it has neither; take one of joined, gptq-2048, thesis-512, sliding"),
        (ROLLING, Known(True, False, True), None),
        (ROLLING, Known(True, True, False), "so evaluate can't measure bits per byte"),
    ],
)
def test_what_is_lacking(params: dict, known: Known, sentence: str | None) -> None:
    found = list(problems(asked(**params), known))
    assert (sentence in found[0] and len(found) == 1) if sentence else not found


def strip(folder: Path) -> None:
    """Leave the tokenizer without eos."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({k: v for k, v in content.items() if k != "eos_token"}))


def test_fetch_refuses_before_weights_are_read(make_fetch, model_folder: Path, no_weights_read) -> None:
    strip(model_folder)
    assert transformers.AutoTokenizer.from_pretrained(model_folder).eos_token_id is None
    harness = SimpleNamespace(enabled=True, tasks=["corpus"])

    def stage_with(harness: SimpleNamespace):
        stage = make_fetch()
        stage.everything = stage.everything.model_copy(update={"harness": harness})
        return stage

    assert refusal(stage_with(harness)).startswith("the tokenizer has no eos token")
    harness.enabled = False
    with pytest.raises(AssertionError, match="the weights were opened"):
        fetch.run(stage_with(harness))


def test_the_files_alone_tell_it(model_folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    named = of_files(model_folder)
    assert (named.bos, named.eos) == (tokenizer.bos_token_id is not None, tokenizer.eos_token_id is not None)
    strip(model_folder)
    assert not of_files(model_folder).eos
    content = json.loads((model_folder / "tokenizer_config.json").read_text())
    (model_folder / "tokenizer_config.json").write_text(json.dumps(content | {"tokenizer_class": "LlamaTokenizer"}))
    assert of_files(model_folder) is None  # that class has an eos token of its own
    (model_folder / "tokenizer_config.json").write_text("{")
    assert of_files(model_folder) is None


def test_each_stage_asks_the_files(model_folder: Path, monkeypatch) -> None:
    given = {}
    monkeypatch.setattr(preflight, "check", lambda *_, **named: given.update(named))
    source = SimpleNamespace(path=str(model_folder), hub=None)
    off = SimpleNamespace(enabled=False)
    preflight.check_workspace(SimpleNamespace(fetch=SimpleNamespace(model=source), evaluate=off), "harness")
    assert given["tokenizer"] == of_files(model_folder)
