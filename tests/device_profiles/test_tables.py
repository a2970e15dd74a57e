"""The command: verdicts as exit codes, models yet to be made, wrong input, and the published anchors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tasks.algorithms.device_fit.footprint import Workload
from tasks.algorithms.device_fit.verdict import judge
from tasks.device_profiles import profiles
from tasks.device_profiles.planned_contents import planned
from tasks.packed.plan import Plan
from tests.benchmarks import llama_bytes
from tests.device_profiles.test_profiles import NAMES, PROFILES, raw
from tests.support.command import edgepress
from tests.support.folder_of_zeros import folder_of_zeros

LLAMA_3B = llama_bytes.CONFIG | {
    "head_dim": 128,
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
}
"""meta-llama/Llama-3.2-3B's config.json, where it differs from the 1B's."""


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, errors) of the command."""
    return edgepress(capsys, "fit", *arguments)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(llama_bytes.CONFIG), encoding="utf-8")
    return path


def test_exit_codes_are_verdicts(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ("--model", llama, "--dtype", "BF16", "--context", 512)
    code, out, _ = run(capsys, *plan, "--device", "raspberry-pi-5")
    assert code == 0 and "raspberry-pi-5: FITS, limited by dram: weights" in out
    code, out, _ = run(capsys, *plan, "--device", "siracusa")
    assert code == 2 and "DOES_NOT_FIT" in out and "what would make it fit: no single change" in out
    code, out, _ = run(capsys, "--model", llama, "--context", 120_000, "--batch", 2, "--device", "raspberry-pi-5")
    assert code == 2 and "context <=" in out


def test_streaming_has_a_code_of_its_own(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = raw("raspberry-pi-5") | {"name": "small"}
    small["tiers"][0]["bytes"]["value"] = 3 * 2**30
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    chosen = ("--device", "small", "--profiles", tmp_path)
    code, out, _ = run(capsys, "--model", llama, "--context", 512, *chosen)
    assert code == 1 and "bytes are streamed from storage in each step" in out
    assert "what would make it fit: -5 layers, or 8.0 bits per weight" in out


def test_a_table_of_all_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of_zeros(tmp_path / "model", quantised=True)
    code, out, _ = run(capsys, "--model", folder)
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines[3:]] == NAMES
    code, out, _ = run(capsys, "--model", folder, "--json")
    assert code == 0 and [row["device"] for row in json.loads(out)["devices"]] == NAMES


def test_json_of_one_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of_zeros(tmp_path / "model")
    code, out, _ = run(capsys, "--model", folder, "--device", "phone", "--json", "--context", 8, "--kv-bits", 8)
    found = json.loads(out)
    assert (code, found["verdict"], found["device"]) == (0, "FITS", "phone")
    assert found["stored_bytes"] == sum(path.stat().st_size for path in folder.rglob("*.*"))
    assert found["workload"] == {"context": 8, "batch": 1, "kv_bits": 8, "activation_bits": 16}
    assert found["kv_bytes"] == 2 * 2 * 4 * 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "toaster"), "device 'toaster' has no profile; known: browser-tab, esp32-s3"),
        (("--context", -5), "--context -5 is not positive"),
        (("--batch", 0), "--batch 0 is not positive"),
        (("--context", 65), "context = 65 is above the model's max_position_embeddings = 64"),
        (("--kv-bits", 5), "--kv-bits: invalid choice"),
        (("--bits", 4, "--group-size", 7), "group_size = 7"),
        (("--profiles", "nowhere"), "holds no device profile"),
        (("--frobnicate",), "unrecognized arguments"),
    ],
)
def test_wrong_input_is_a_sentence_and_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple, said: str
) -> None:
    code, out, errors = run(capsys, "--model", folder_of_zeros(tmp_path / "model"), *arguments)
    assert code == 3 and out == "" and said in errors and "Traceback" not in errors


def test_folders_that_are_no_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(capsys, "--model", tmp_path / "nothing")
    assert code == 3 and "nothing can't be read" in errors
    code, _, errors = run(capsys, "--model", tmp_path)
    assert code == 3 and "config.json can't be read" in errors
    (tmp_path / "config.json").write_text(json.dumps(llama_bytes.CONFIG), encoding="utf-8")
    code, _, errors = run(capsys, "--model", tmp_path)
    assert code == 3 and "say how: --bits 4" in errors
    broken = tmp_path / "profiles"
    broken.mkdir()
    (broken / "bad.yaml").write_text("a: [", encoding="utf-8")
    code, _, errors = run(capsys, "--model", tmp_path, "--bits", 4, "--profiles", broken)
    assert code == 3 and "bad.yaml is not valid YAML" in errors


def test_a_machine_that_was_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of_zeros(tmp_path / "model")
    code, _, errors = run(capsys, "--model", folder, "--device", "host", "--profiles", tmp_path)
    assert code == 3 and "edgepress profile" in errors


ANCHORS = {
    "1B bf16": (llama_bytes.CONFIG, {"bits": None, "dtype": "BF16"}, 19.2),
    "1B SpinQuant": (llama_bytes.CONFIG, {"bits": 4, "embedding_bits": 8, "embedding_group": -1}, 50.2),
    "3B bf16": (LLAMA_3B, {"bits": None, "dtype": "BF16"}, 7.6),
    "3B SpinQuant": (LLAMA_3B, {"bits": 4, "embedding_bits": 8, "embedding_group": -1}, 19.7),
}
"""Decoding speed on a OnePlus 12, prompt of 64 tokens: pytorch/executorch, examples/models/llama/README.md."""


@pytest.mark.parametrize("name", ANCHORS)
def test_published_speeds_are_below_the_bound_and_not_far(name: str) -> None:
    config, plan, measured = ANCHORS[name]
    device = profiles.pick(profiles.load_all(PROFILES), "oneplus-12").device()
    result = judge(device, planned(config, Plan(**plan)), Workload(128, 1, 16, 16))
    assert result.verdict == "FITS" and result.tokens_per_second.limited_by == "bandwidth"
    ratio = measured / result.tokens_per_second.bound
    print(f"{name}: measured {measured}, bound {result.tokens_per_second.bound:.1f} tokens/s, ratio {ratio:.2f}")
    assert 0.4 < ratio < 1


def test_published_file_sizes() -> None:
    # MiB of the PTE files, same source. ExecuTorch's 4-bit file has float32 scales and an embedding beside the head.
    for name, mebibytes in (("1B bf16", 2358), ("3B bf16", 6129)):
        config, plan, _ = ANCHORS[name]
        assert planned(config, Plan(**plan)).stored / 2**20 == pytest.approx(mebibytes, rel=0.002)
    for name, mebibytes in (("1B SpinQuant", 1083), ("3B SpinQuant", 2435)):
        config, plan, _ = ANCHORS[name]
        model = planned(config, Plan(**plan))
        linears = sum(m.rows * m.cols for m in model.matrices() if m.component == "values")
        table = config["vocab_size"] * config["hidden_size"]
        assert (linears // 2 + linears // 32 * 4 + 2 * table) / 2**20 == pytest.approx(mebibytes, rel=0.01)
