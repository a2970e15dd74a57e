"""Calibration windows against the text they come from, and norms against hooks on the model."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tasks import calibrate
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.models import dense_folder

TEXTS = ["The software must be able to run.", "It logs in.", "abcdefghijklmnopqrstuvwxyz" * 20]


@pytest.mark.parametrize("windows", [1, 5, 9])
def test_windows_are_distinct_and_do_not_overlap(windows):
    found = calibrate.choose(torch.arange(95), windows, 10, seed=3)
    starts = found[:, 0].tolist()
    assert len(set(starts)) == windows
    for row, start in zip(found.tolist(), starts, strict=True):
        assert start % 10 == 0
        assert row == list(range(start, start + 10))


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    choices = [calibrate.choose(torch.arange(1000), 10, 10, seed)[:, 0].tolist() for seed in (0, 0, 1)]
    assert choices[0] == choices[1] != choices[2]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("tokens", [0, 9, 39])
def test_a_short_text_is_refused_with_both_counts(tokens):
    with pytest.raises(InputError, match=rf"has {tokens} tokens, 4 windows of 10 need 40"):
        calibrate.choose(torch.arange(tokens), 4, 10, seed=0)


@pytest.fixture
def ready(model_folder, make_stage, tmp_path):
    """ready(out, **params) -> the stage with its inputs."""
    (tmp_path / "corpora").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "corpora/calibration.jsonl").write_text(lines)
    inputs = {"vocabulary/model": model_folder, "fetch/corpora": tmp_path / "corpora"}

    def make(out="out", **changes):
        return make_stage({"calibrate": {"seed": 0, "windows": 5, "length": 16, **changes}}, inputs, out)

    return make


def test_the_stage_writes_windows_of_the_joined_text_and_the_model_s_norms(ready, model_folder, tmp_path, capsys):
    for out in ("a", "b"):
        calibrate.run(ready(out))
    for name in ("windows.safetensors", "norms.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    ids = load_file(tmp_path / "a/windows.safetensors")["input_ids"]
    assert (ids.dtype, ids.shape) == (torch.int32, (5, 16))
    for text in dense_folder.load_tokenizer(model_folder).batch_decode(ids):
        assert text.replace(" ", "") in "\n".join(TEXTS).replace(" ", "")
    model, naive = dense_folder.load_dense(model_folder), {}
    for name, linear in families.block_linears(model).items():
        linear.register_forward_pre_hook(lambda _, x, name=name: naive.__setitem__(name, x[0].detach()))
    model(input_ids=ids.long())
    norms = load_file(tmp_path / "a/norms.safetensors")
    assert norms.keys() == {f"{name}.sum_of_squares" for name in naive}
    for name, inputs in naive.items():
        assert torch.allclose(norms[f"{name}.sum_of_squares"], inputs.square().sum(dim=(0, 1)), rtol=1e-4)
    with safe_open(tmp_path / "a/norms.safetensors", framework="pt") as file:
        assert file.metadata() == {"tokens": "80"}
    assert "5 of 35 windows of 16 tokens" in capsys.readouterr().out


def test_a_corpus_shorter_than_the_windows_is_refused(ready):
    with pytest.raises(InputError, match="calibrate.windows"):
        calibrate.run(ready(windows=99))


def test_switched_off_it_writes_no_windows(ready, tmp_path):
    calibrate.skip(ready())
    assert load_file(tmp_path / "out/windows.safetensors")["input_ids"].shape == (0, 16)
    assert load_file(tmp_path / "out/norms.safetensors") == {}
