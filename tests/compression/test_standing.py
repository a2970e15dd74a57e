"""Where pruning stands: perplexity of the really quantised model, as many bytes for both, and what is said of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tasks.algorithms.quantisation import gptq_walk, masked_gptq
from tasks.algorithms.scoring import perplexity
from tasks.compression import block_quantisation, standing
from tasks.models import dense_folder
from tasks.parameters import rules
from tests.support.paths import ROOT
from tests.support.pruned_model import inputs_of_the_stage, sections

SHAPES = {f"layers.{i}.{name}": shape for i in range(9) for name, shape in (("up", (96, 64)), ("down", (64, 96)))}


@pytest.fixture(scope="module")
def pruned(tiny_llama, tmp_path_factory):
    """A 2:4 pruned model in its folder, its masks, windows."""
    return inputs_of_the_stage(tmp_path_factory.mktemp("standing"), tiny_llama)


@pytest.mark.parametrize("masked", [True, False])
def test_perplexity_is_that_of_the_quantised_model(pruned, masked):
    chosen, folder = sections(scale_steps=8, mse=2.4, descent_cycles=3)["gptq"], pruned.files["lora/model"]
    keep = pruned.keep if masked else {}
    whole = dense_folder.load_dense(folder)
    config = block_quantisation.settings(chosen.model_copy(update={"mse": 0.0}), 3, "cpu")
    gptq_walk.quantise(whole, pruned.windows, keep, config, lambda *_: None, masked_gptq.Settings(8))
    expected = perplexity.perplexity(whole, pruned.windows)
    assert expected != perplexity.perplexity(dense_folder.load_dense(folder), pruned.windows)
    model = standing.streamed_folder.open_dense(folder)
    found = standing.perplexity(model, keep, dict.fromkeys(pruned.keep, 3), chosen, pruned.windows, "cpu")
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.8, 0.99, 1.7])
def test_plain_widths_fill_the_bytes(share):
    chosen = sections(group_size=32)["gptq"]
    sizes = block_quantisation.choices({}, SHAPES, {}, "dense", chosen).sizes
    four = sum(each[4] for each in sizes.values())
    widths = standing.plain_widths(SHAPES, round(share * four), chosen)
    assert list(widths) == list(SHAPES) and len(set(widths.values())) <= 2
    spent = sum(sizes[name][bits] for name, bits in widths.items())
    largest = max(each[8] - each[4] for each in sizes.values())
    least = sum(each[2] for each in sizes.values())
    assert abs(spent - max(share * four, least)) <= largest


def test_as_many_bytes_for_both(pruned):
    """2:4 at 4 bit are 2 bits and log2(6) / 4 for the positions: 2.65, between 2 and 3 bits of the plain model."""
    chosen, folder = sections(scale_steps=8)["gptq"], pruned.files["lora/model"]
    found = standing.compare(folder, folder, pruned.keep, "2:4", chosen, pruned.windows, "cpu")
    assert 2.4 < found.bits < 2.9
    assert found.own < found.plain  # its zeros cost nothing more, its other weights have twice as many bits


def test_what_is_said():
    better, worse = standing.Standing(20.0, 30.0, 2.65), standing.Standing(60.0, 30.0, 2.65)
    assert standing.sentence(better, 4) == (
        "quantised to 4 bits now, its perplexity would be 20 on 8 calibration windows; of the model with nothing"
        " pruned, in as many bytes (2.65 bits per weight), 30: pruning is worth it so far"
    )
    said = standing.sentence(worse, 4)
    assert said.startswith("warning: quantised") and said.endswith(
        "so far, and what follows has to win back a factor of 2"
    )


@pytest.mark.parametrize("stage", ["depth_prune", "wanda", "lora"])
@pytest.mark.parametrize("small", [True, False])
def test_a_stage_tells(pruned, make_stage, tiny_llama, tmp_path, monkeypatch, capsys, stage, small):
    plain = tiny_llama(tmp_path / "plain")
    monkeypatch.setattr(standing, "PLAIN", plain)
    monkeypatch.setattr(standing, "CALIBRATION", pruned.files["windows.safetensors"])
    monkeypatch.setattr(rules, "SMALL", 10**6 if small else 1)
    given = make_stage(sections(), pruned.files)
    given.name, given.everything = stage, given.params
    (given.out / "masks.safetensors").parent.mkdir(parents=True, exist_ok=True)
    (given.out / "masks.safetensors").symlink_to(pruned.files["masks.safetensors"])
    (given.out / "model").symlink_to(pruned.files["lora/model"])
    standing.tell(given)
    assert ("standing" in given.facts) is not small
    if not small:
        assert min(given.facts["standing"].values()) > 1
        assert "calibration windows" in capsys.readouterr().out


def test_of_what_is_not_pruned_nothing_is_told(pruned, make_stage, monkeypatch, capsys):
    monkeypatch.setattr(standing, "PLAIN", pruned.files["lora/model"])
    monkeypatch.setattr(standing, "CALIBRATION", pruned.files["windows.safetensors"])
    monkeypatch.setattr(rules, "SMALL", 1)
    given = make_stage(sections(), pruned.files)
    given.name, given.everything = "depth_prune", given.params
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "model").symlink_to(pruned.files["lora/model"])
    standing.tell(given)
    assert given.facts == {} and capsys.readouterr().out == ""


def test_of_a_small_model_nothing_is_told_and_little_is_loaded(tmp_path):
    """As `tasks.runtime.execution` asks."""
    code = f"""
import importlib, pathlib, sys
from types import SimpleNamespace
from tasks.runtime import lazily
everything = SimpleNamespace(gptq=SimpleNamespace(enabled=True), device="cpu")
with lazily.imported():
    standing = importlib.import_module("tasks.compression.standing")
    standing.PLAIN = pathlib.Path("data/base_model/model")
    standing.CALIBRATION = pathlib.Path({str(tmp_path / "windows")!r})
    standing.CALIBRATION.touch()
    standing.tell(SimpleNamespace(name="wanda", everything=everything))
print("gptqmodel" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr
