"""Model folders and the hub's: links, indices, pickles, and the hub through a server of this machine's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from dvc.repo import Repo
from huggingface_hub import constants

from tasks import fetch
from tasks.sources import model_source
from tests.support.fetch_stage import AT_HUB, REVISION, edit, refusal
from tests.support.model_hub import Hub


def test_pickles_and_no_weights(make_fetch, model_folder: Path, no_weights_read) -> None:
    (model_folder / "model.safetensors").unlink()
    assert refusal(make_fetch()).endswith(
        "holds no model.safetensors and no model.safetensors.index.json; take a model with safetensors weights"
    )
    (model_folder / "pytorch_model.bin").write_bytes(b"\x80")
    assert "holds only pickled weights (pytorch_model.bin), which can run code" in refusal(make_fetch())


def test_a_folder_that_is_none(make_fetch, tmp_path: Path) -> None:
    assert refusal(make_fetch({"path": str(tmp_path / "gone")})).endswith("is no folder; name a folder with a model")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_no_link_out_of_the_folder(make_fetch, model_folder: Path, tmp_path: Path, no_weights_read, name: str) -> None:
    (model_folder / name).rename(tmp_path / "elsewhere")
    (model_folder / name).symlink_to(tmp_path / "elsewhere")
    assert "is a link out of the model folder" in refusal(make_fetch())


def test_a_link_within_the_folder_is_followed(make_fetch, model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "real")
    (model_folder / "model.safetensors").symlink_to("real")
    stage = make_fetch()
    fetch.run(stage)
    assert not (stage.output("model") / "model.safetensors").is_symlink()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/x.safetensors", "weights.bin", "*.safetensors", 5])
def test_an_index_that_leads_elsewhere(make_fetch, model_folder: Path, no_weights_read, name) -> None:
    (model_folder / model_source.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    message = refusal(make_fetch())
    assert "expected safetensors files of the model folder itself" in message or "has no `weight_map`" in message


def test_an_index_of_missing_shards(make_fetch, model_folder: Path, no_weights_read) -> None:
    (model_folder / model_source.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    assert "model.safetensors.index.json names gone.safetensors, which is not there" in refusal(make_fetch())


def test_hub_equals_local(make_fetch, hub: Hub, model_folder: Path, no_preflight: list[dict]) -> None:
    (model_folder / "pytorch_model.bin").write_bytes(b"\x80")
    (model_folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    stage, local = make_fetch(AT_HUB), make_fetch()
    fetch.run(stage)
    fetch.run(local)
    source, expected = (json.loads(one.output("source.json").read_text()) for one in (stage, local))
    assert source["files"] == expected["files"]
    assert source["model"] | {"kind": "hub", **AT_HUB} == source["model"]
    assert "hf_secret" not in stage.output("source.json").read_text()
    asked = [line for line in hub.asked if "/resolve/" in line]
    assert not any(name in line for line in asked for name in (".bin", "consolidated"))
    first_weight = next(index for index, line in enumerate(asked) if ".safetensors" in line)
    assert sum("config.json" in line or "tokenizer.json" in line for line in asked[:first_weight]) >= 2
    assert no_preflight == [
        {"config": json.loads((model_folder / "config.json").read_text()), "tokenizer_size": 96, "stage": "fetch"}
    ]
    assert not any("torch" in (agent or "") for agent in hub.sent)  # telemetry names the libraries in use


def test_a_refused_hub_model_is_not_downloaded(make_fetch, hub: Hub, model_folder: Path) -> None:
    edit(model_folder / "config.json", architectures=["LlamaWithoutEnd"])
    assert "names LlamaWithoutEnd" in refusal(make_fetch(AT_HUB))
    assert not any("model.safetensors" in line and "index" not in line for line in hub.asked if "/resolve/" in line)


def test_pickles_on_the_hub(make_fetch, hub: Hub, model_folder: Path, no_preflight) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    assert refusal(make_fetch(AT_HUB)).startswith("a/model holds only pickled weights (pytorch_model.bin)")
    assert not any(".bin" in line for line in hub.asked)


def test_an_unknown_commit(make_fetch, hub: Hub) -> None:
    assert refusal(make_fetch(AT_HUB | {"revision": "f" * 40})) == (
        f"model a/model has no commit {'f' * 40}; copy the 40-digit one from its history"
    )


@pytest.mark.parametrize(
    ("status", "gated", "sentence"),
    [
        (401, True, "model a/model is gated: ask for access on its page, then `hf auth login`"),
        (403, True, "model a/model is gated: ask for access on its page, then `hf auth login`"),
        (401, False, f"the hub has no model a/model at {REVISION}, or it is private or gated"),
        (404, False, f"the hub has no model a/model at {REVISION}, or it is private or gated"),
        (418, False, "the hub answered 418 for model a/model; try again later"),
    ],
)
def test_a_hub_that_refuses(make_fetch, hub: Hub, status: int, gated: bool, sentence: str) -> None:
    hub.status, hub.gated = status, gated
    assert refusal(make_fetch(AT_HUB)).startswith(sentence)


def test_offline(make_fetch, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(make_fetch(AT_HUB)) == (
        "the hub can't be reached for model a/model; go online, or name a local folder or file"
    )


def test_offline_with_a_filled_cache(make_fetch, hub: Hub, no_preflight, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_fetch(AT_HUB), make_fetch(AT_HUB)
    fetch.run(first)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    fetch.run(second)
    assert len(hub.asked) == asked > 0
    assert second.output("source.json").read_bytes() == first.output("source.json").read_bytes()
    assert (second.output("model") / "model.safetensors").stat().st_size > 0


def test_telemetry_is_off() -> None:
    assert constants.HF_HUB_DISABLE_TELEMETRY


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "copy"])
def test_a_model_that_dvc_has_is_taken_or_told_with_dvc_s_way_out(
    make_fetch, model_folder: Path, tmp_path: Path, monkeypatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with Repo.init(no_scm=True) as repo, repo.config.edit("repo") as config:
        config["cache"]["type"] = [kind]
    with Repo() as repo:
        repo.add("model")
        weights = Path("model/model.safetensors")
        assert (weights.is_symlink(), weights.stat().st_nlink) == (kind == "symlink", 1 + (kind == "hardlink"))
        if kind == "symlink":
            way_out = re.search(
                r"link out of the model folder, not a file; `dvc unprotect (\S*)`", refusal(make_fetch())
            )
            repo.unprotect(way_out[1])
    stage = make_fetch()
    fetch.run(stage)
    assert (stage.output("model") / "model.safetensors").stat().st_nlink == 1
