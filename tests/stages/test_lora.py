"""lora and baseline_lora: the stages' files, PEFT's own merge, what doesn't fit."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks import baseline_lora, lora
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, families
from tasks.algorithms.pruning import depth_prune
from tasks.algorithms.recovery import eora_start, masked_lora, targets, training
from tasks.compression import recovery_training, training_inputs
from tasks.models import dense_folder, mask_files
from tasks.parameters import needs
from tasks.parameters.compression_sections import Distillation, Lora
from tasks.runtime.files import write_json
from tasks.runtime.shelf import Shelf
from tasks.runtime.stage import Inputs
from tests.support.paths import ROOT
from tests.support.pruned_llama import llama, prune


class FakeStage(Inputs):
    """What a stage module sees of tasks.runtime.stage.Stage, over folders of a test; dvc.yaml says which."""

    def __init__(self, folder: Path, params: Lora, run: str = "run", name: str = "lora") -> None:
        deps = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"][name]["deps"]
        data = [Path(dep) for dep in deps if dep.startswith("data/")]
        super().__init__(name, {path: folder / path.relative_to("data") for path in data})
        self.folder, self.out, self.name = folder, folder / run, name
        self.journal = self.shared = checkpoints.NOTHING
        self.params = SimpleNamespace(device="cpu", lora=params, wanda=SimpleNamespace(enforce=True))
        self.updates: list[tuple[int, float]] = []
        self.total = 0

    def output(self, name: str) -> Path:
        path = self.out / (name if "/" in name else f"{self.name}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def pass_on(self, source: Path, target: Path) -> None:
        shutil.copytree(source, target)

    def shelf(self, *_: object, **__: object) -> checkpoints.Saved:
        return self.shared

    def progress(self, description: str, total: int) -> FakeStage:
        self.total = total
        return self

    def __enter__(self) -> FakeStage:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, done: int, loss: float) -> None:
        self.updates.append((done, loss))


def distil(weight: float = 0.5, hidden: float = 0.0) -> Distillation:
    return Distillation(weight=weight, temperature=2.0, hidden=hidden)


def params(**changes: object) -> Lora:
    settings = {"enabled": True, "seed": 0, "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear"}
    settings |= {"steps": 5, "batch": 2, "length": 32, "learning_rate": 0.01, "warmup": 0.2}
    settings |= {"method": "masked", "start": "zeros", "distillation": distil()}
    return Lora(**settings | changes)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The stage's inputs: a bf16 teacher of three blocks, without its second and pruned, masks, 40 short documents."""
    tokenizer = byte_tokenizer()
    model = llama(blocks=3).bfloat16()
    dense_folder.save_dense(model, tokenizer, tmp_path / "vocabulary/model")
    model = depth_prune.without(model, [1])
    keep = prune(model)
    dense_folder.save_dense(model, tokenizer, tmp_path / "wanda/model")
    mask_files.save_masks(tmp_path / "wanda/masks.safetensors", keep, "2:4")
    (tmp_path / "depth_prune").mkdir()
    write_json(tmp_path / "depth_prune/removed.json", {"removed": [1], "kept": [0, 2]})
    (tmp_path / "fetch/corpora").mkdir(parents=True)
    rows = [json.dumps({"text": f"The pump must report {n} litres."}) + "\n" for n in range(40)]
    (tmp_path / "fetch/corpora/train.jsonl").write_text("".join(rows), encoding="utf-8")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


ARMS = {
    "masked": {},
    "hidden": {"distillation": distil(0.5, 1.0)},
    "eora": {"start": "eora"},
    "remasked": {"method": "remasked"},
    "remasked_eora": {"method": "remasked", "start": "eora"},
    "block": {"method": "block_reconstruction"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_stage_writes_a_stock_checkpoint_with_the_masks_and_dtype_kept(folder, arm):
    stage = FakeStage(folder, params(**ARMS[arm]))
    lora.run(stage)
    keep, _ = mask_files.load_masks(folder / "wanda/masks.safetensors")
    model = AutoModelForCausalLM.from_pretrained(stage.out / "lora/model", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert type(model) is LlamaForCausalLM
    assert masked_lora.revived(model, keep) == {}
    before = AutoModelForCausalLM.from_pretrained(folder / "wanda/model", dtype="auto")
    names = set(families.block_linears(model))
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) != (name.removesuffix(".weight") in names), name
    history = rows(stage.out / "lora/history.csv")
    steps = 10 if arm == "block" else 5  # per block
    assert [int(row["step"]) for row in history] == [step for step, _ in stage.updates] == list(range(1, steps + 1))
    assert stage.total == steps
    assert tuple(history[0]) == training.COLUMNS
    assert float(history[-1]["loss"]) == pytest.approx(stage.updates[-1][1], rel=1e-8)
    computed = {name for name in ("causal_lm", "distillation", "hidden") if history[0][name]}
    losses = {"block": {"hidden"}, "hidden": {"causal_lm", "distillation", "hidden"}}
    assert computed == losses.get(arm, {"causal_lm", "distillation"})
    ledger = rows(stage.out / "lora/sparsity.csv")
    assert [row["linear"] for row in ledger] == list(families.block_linears(model))
    assert all(row["revived"] == row["violations"] == "0" and int(row["groups"]) > 0 for row in ledger)


def test_eora_start_lowers_the_first_loss_and_compares_with_the_teachers_corresponding_blocks(folder, monkeypatch):
    keep, _ = mask_files.load_masks(folder / "wanda/masks.safetensors")
    teacher = dense_folder.load_dense(folder / "vocabulary/model")
    start, seen = eora_start.start_from_eora, {}

    def watched(adapted, wanted, *rest):
        seen.update(wanted)
        start(adapted, wanted, *rest)

    monkeypatch.setattr(eora_start, "start_from_eora", watched)
    first = {}
    for arm in ("zeros", "eora"):
        stage = FakeStage(folder, params(start=arm, method="remasked", distillation=distil(1.0), rank=16))
        first[arm] = recovery_training.recover(stage, folder / "wanda/model", keep, [0, 2]).history[0]["loss"]
    assert first["eora"] < first["zeros"]
    assert set(seen) == set(keep)
    for name, weight in seen.items():
        assert torch.equal(weight, teacher.get_submodule(name.replace("layers.1", "layers.2")).weight)


def test_a_broken_pattern_ends_the_stage_only_where_it_is_enforced(folder, monkeypatch):
    monkeypatch.setattr(masked_lora, "apply_masks", lambda model, keep: None)
    stage = FakeStage(folder, params(method="remasked"))
    with pytest.raises(InputError, match=r"lora broke the sparsity pattern of model\.layers\.0\.self_attn\.q_proj"):
        lora.run(stage)
    stage.params.wanda.enforce = False
    lora.run(stage)
    assert all(int(row["revived"]) > 0 for row in rows(stage.out / "lora/sparsity.csv"))


@pytest.mark.parametrize("arm", ["eora", "block", "remasked"])
def test_stage_repeats_its_bytes(folder, arm):
    for run, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        lora.run(FakeStage(folder, params(dropout=0.1, **ARMS[arm]), run))
    assert files(folder / "one") == files(folder / "two")


@pytest.mark.parametrize("arm", ["masked", "hidden", "eora", "block"])
def test_little_memory_changes_no_byte(folder, arm, monkeypatch):
    """Blocks computed anew, and a teacher whose blocks lie on the disk; the oracle has all in memory."""
    settings = params(dropout=0.1, **ARMS[arm])
    lora.run(FakeStage(folder, settings, "whole"))
    monkeypatch.setattr(needs, "KEEPING", 0.0)
    monkeypatch.setattr(training_inputs.streaming, "WHOLE", 0)
    monkeypatch.setattr(dense_folder, "load_dense", None)  # nothing is whole in float32
    lora.run(FakeStage(folder, settings, "little"))
    assert files(folder / "whole") == files(folder / "little")


def test_remasked_is_pefts_merge_and_then_the_masks(folder):
    """The oracle trains with PEFT's stock layer and merges with PEFT's own merge."""
    stage = FakeStage(folder, params(method="remasked", distillation=distil(0.0)))
    keep, _ = mask_files.load_masks(folder / "wanda/masks.safetensors")
    model = dense_folder.load_dense(folder / "wanda/model")
    torch.manual_seed(0)
    plain = get_peft_model(model, LoraConfig(r=4, lora_alpha=8.0, lora_dropout=0.0, target_modules=list(keep)))
    tokens = training_inputs.perplexity.tokenise(
        byte_tokenizer(), [f"The pump must report {n} litres." for n in range(40)]
    )
    training.train(plain.base_model, tokens, training_inputs.recipe(stage.params.lora))
    merged = plain.merge_and_unload()
    assert all(masked_lora.revived(merged, {name: mask}) for name, mask in keep.items())  # plain LoRA fills the zeros
    recovered = recovery_training.recover(stage, folder / "wanda/model", keep, [0, 2])
    for name, linear in families.block_linears(recovered.model).items():
        expected = torch.where(keep[name], merged.get_submodule(name).weight.detach(), 0.0).bfloat16()
        torch.testing.assert_close(linear.weight.detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("arm", ARMS)
def test_the_plain_model_is_its_own_teacher_and_needs_no_masks(folder, arm):
    stage = FakeStage(folder, params(**ARMS[arm]), name="baseline_lora")
    baseline_lora.run(stage)
    first = rows(stage.out / "baseline_lora/history.csv")[0]
    assert float(first["hidden"] or 0) == 0
    assert float(first["distillation"] or 0) == pytest.approx(0.0, abs=1e-6)
    before, after = (
        families.block_linears(dense_folder.load_dense(path / "model"))
        for path in (folder / "vocabulary", stage.out / "baseline_lora")
    )
    # Reconstruction has nothing to do; the others learn the corpus.
    assert all(torch.equal(before[name].weight, after[name].weight) == (arm == "block") for name in before)


def test_stage_without_distillation_needs_no_teacher(folder):
    shutil.rmtree(folder / "vocabulary/model")
    stage = FakeStage(folder, params(distillation=distil(0.0), targets="mlp"))
    lora.run(stage)
    first = rows(stage.out / "lora/history.csv")[0]
    assert first["distillation"] == first["hidden"] == ""


def test_stage_names_what_does_not_fit(folder):
    with pytest.raises(InputError, match="length = 65 is above the model's context of 64"):
        lora.run(FakeStage(folder, params(length=65)))
    with pytest.raises(InputError, match=r"lora\.start = eora .* set lora\.start to zeros"):
        lora.run(FakeStage(folder, params(start="eora", method="block_reconstruction")))
    for kept in ([0], [0, 3]):
        write_json(folder / "depth_prune/removed.json", {"kept": kept})
        with pytest.raises(InputError, match=rf"{len(kept)} of the teacher's 3 blocks .* run stage depth_prune again"):
            lora.run(FakeStage(folder, params()))
    write_json(folder / "depth_prune/removed.json", {"kept": [0, 2]})
    dense_folder.save_dense(llama(blocks=3, vocabulary=250), byte_tokenizer(), folder / "vocabulary/model")
    with pytest.raises(InputError, match="the model has 256 tokens, its teacher 250"):
        lora.run(FakeStage(folder, params()))
    (folder / "fetch/corpora/train.jsonl").write_text('{"text": "Pump."}\n')
    with pytest.raises(InputError, match="has 5 tokens, less than one window of 32"):
        lora.run(FakeStage(folder, params(distillation=distil(0.0))))


@pytest.mark.parametrize("method", ["masked", "remasked", "block_reconstruction"])
def test_a_model_of_other_masks_is_refused(folder, method):
    model = dense_folder.load_dense(folder / "wanda/model")
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    dense_folder.save_dense(model, byte_tokenizer(), folder / "wanda/model")
    with pytest.raises(InputError, match=r"pruned weights of model\.layers\.0\.mlp\.up_proj are not zero"):
        lora.run(FakeStage(folder, params(method=method)))


def test_skip_passes_the_model_on(folder):
    stage = FakeStage(folder, params(enabled=False))
    lora.skip(stage)
    assert files(stage.out / "lora/model") == files(folder / "wanda/model")
    assert (stage.out / "lora/history.csv").read_text() == ",".join(training.COLUMNS) + "\n"
    assert {row["revived"] for row in rows(stage.out / "lora/sparsity.csv")} == {"0"}


def test_what_the_two_recoveries_share_changes_nothing_and_is_computed_once(folder, monkeypatch) -> None:
    shutil.copytree(folder / "vocabulary/model", folder / "baseline/model")
    alone = {}
    for name, module in (("lora", lora), ("baseline_lora", baseline_lora)):
        module.run(FakeStage(folder, params(), f"alone-{name}", name))
        alone[name] = files(folder / f"alone-{name}")
    asked, texts = [], []
    states, tokenise = targets.head.states, training_inputs.perplexity.tokenise
    monkeypatch.setattr(targets.head, "states", lambda model, ids: asked.append(model.training) or states(model, ids))
    monkeypatch.setattr(training_inputs.perplexity, "tokenise", lambda *given: texts.append(1) or tokenise(*given))
    for name, module in (("lora", lora), ("baseline_lora", baseline_lora), ("lora", lora)):
        stage = FakeStage(folder, params(), f"shared-{name}-{len(asked)}", name)
        stage.shared = Shelf(folder / "shelf")
        module.run(stage)
        assert files(stage.out) == alone[name]
    assert len(texts) == 1 and asked.count(False) == 5  # the teacher, of as many steps
