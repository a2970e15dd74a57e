"""evaluate: sizes add up to `stat`, zeros and completions agree with naive loops, perplexity with the definition."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks import evaluate
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, streaming
from tasks.algorithms.scoring import generation_failures
from tasks.models import dense_folder, model_files, tensor_headers
from tasks.models.tokenizer_files import copy_tokenizer
from tasks.packed import reader
from tasks.packed.stored_model import Linear, Model
from tasks.packed.writer import save
from tasks.parameters.evaluation_sections import Evaluate
from tasks.runtime.shelf import Shelf

PARAMS = {
    "protocol": "joined",
    "length": 16,
    "stride": 16,
    "max_windows": 3,
    "batch": 2,
    "prompts": "own/prompts.txt",
    "new_tokens": 7,
}
PROMPTS = ["The pump", "User"]


def on_disk(folder: Path) -> int:
    return sum(os.stat(Path(base) / name).st_size for base, _, names in os.walk(folder) for name in names)


def test_components_of_a_dense_folder_add_up(model_folder: Path) -> None:
    found = tensor_headers.component_bytes(model_folder)
    weights = load_file(model_folder / "model.safetensors")
    blocks = sum(4 * w.numel() for name, w in weights.items() if ".layers." in name and w.dim() == 2)
    assert sum(found.values()) == on_disk(model_folder) == model_files.stored_bytes(model_folder)
    assert (found["blocks"], found["embedding"]) == (blocks, 96 * 32 * 4)
    assert found["norms"] == (4 * 2 + 1) * 32 * 4
    assert found["scales"] == found["adapter"] == 0 and found["metadata"] > 0


def test_components_of_a_quantised_folder(tmp_path: Path) -> None:
    q = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{q}.qweight": torch.zeros(4, 32, dtype=torch.int32),
        f"{q}.scales": torch.zeros(1, 32, dtype=torch.float16),
        f"{q}.qzeros": torch.zeros(1, 4, dtype=torch.int32),
        f"{q}.g_idx": torch.zeros(32, dtype=torch.int32),
        f"{q}.bias": torch.zeros(32, dtype=torch.float16),
        "model.layers.0.self_attn.q_norm.weight": torch.zeros(8, dtype=torch.float16),
        "model.norm.weight": torch.zeros(32, dtype=torch.float16),
        "model.embed_tokens.weight": torch.zeros(96, 32, dtype=torch.float16),
        "lm_head.weight": torch.zeros(96, 32, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "eora").mkdir()
    factors = {f"base_model.model.{q}.lora_A.weight": torch.zeros(2, 32), f"x.{q}.lora_B.weight": torch.zeros(32, 2)}
    save_file(factors, tmp_path / "eora/adapter_model.safetensors")
    (tmp_path / "config.json").write_text("{}" * 50)
    found = tensor_headers.component_bytes(tmp_path)
    metadata = found.pop("metadata")
    assert found == {
        "blocks": 4 * 32 * 4 + 32 * 2,
        "scales": 32 * 2 + 4 * 4 + 32 * 4,
        "embedding": 2 * 96 * 32 * 2,
        "norms": 8 * 2 + 32 * 2,
        "adapter": 2 * 2 * 32 * 4,
    }
    assert metadata == on_disk(tmp_path) - sum(found.values()) > 100


def pack(model: torch.nn.Module, folder: Path, adapter: bool = False) -> Path:
    """A packed folder of a dense model; its first block's linears with an adapter of rank 2 if wanted."""
    blocks = []
    for index, linears in enumerate(families.linears_by_block(model)):
        extra = index == 0 and adapter
        blocks.append(
            {
                name: Linear(
                    weight=linear.weight.detach(),
                    adapter=(torch.ones(2, linear.in_features), torch.ones(linear.out_features, 2)) if extra else None,
                )
                for name, linear in linears.items()
            }
        )
    rest = {name: weight.detach() for name, weight in model.named_parameters() if "norm" in name}
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    save(Model(config, blocks, model.get_input_embeddings().weight.detach(), None, rest), folder)
    return folder


def test_a_packed_folder_has_its_own_components_and_all_its_parameters(model_folder: Path, tmp_path: Path) -> None:
    model = dense_folder.load_dense(model_folder)
    plain, adapted = pack(model, tmp_path / "plain"), pack(model, tmp_path / "adapted", adapter=True)
    found = [evaluate.sizes(folder) for folder in (plain, adapted)]
    for sizes, folder in zip(found, (plain, adapted), strict=True):
        assert sizes.pop("total") == sum(sizes.values()) == on_disk(folder)
        assert sizes["embedding"] == 96 * 32 * 4
        assert sizes["norms"] == (4 * 2 + 1) * 32 * 4
        assert dense_folder.parameter_count(reader.load_model(folder)) == sum(w.numel() for w in model.parameters())
    assert found[0]["adapter"] == 0 < found[1]["adapter"]


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{x"])
def test_a_damaged_file_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="model.safetensors is no safetensors file or is cut off"):
        tensor_headers.component_bytes(tmp_path)


def test_a_folder_without_weights_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no model.safetensors and no"):
        tensor_headers.component_bytes(tmp_path)


def naive_densest(weight: torch.Tensor, of: int) -> int:
    most = 0
    for row in weight.tolist():
        for start in range(0, len(row), of):
            most = max(most, sum(value != 0 for value in row[start : start + of]))
    return most


@pytest.mark.parametrize("columns, measured", [(32, (4, 8, 16, 32)), (24, (4, 8)), (6, ())])
def test_sparsity_as_a_loop_counts_it(columns: int, measured: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(columns)
    weights = {name: torch.rand(5, columns, generator=draw) for name in "ab"}
    weights = {name: weight * (torch.rand(5, columns, generator=draw) < 0.3) for name, weight in weights.items()}
    found = evaluate.sparsity(weights.values())
    zeros = sum(value == 0 for weight in weights.values() for row in weight.tolist() for value in row)
    assert (found["block_parameters"], found["zeros"]) == (2 * 5 * columns, zeros)
    assert found["zero_fraction"] == zeros / (10 * columns)
    for of in evaluate.GROUPS:
        most = max(naive_densest(weight, of) for weight in weights.values()) if of in measured else None
        assert found["max_kept"][str(of)] == most


def test_sparsity_of_a_2_of_4_pattern_and_of_a_dense_matrix() -> None:
    two_of_four = torch.ones(3, 8) * torch.tensor([1.0, 0, 0, 1] * 2)
    assert evaluate.sparsity([two_of_four])["max_kept"]["4"] == 2
    assert evaluate.sparsity([two_of_four, torch.ones(3, 8)])["max_kept"]["4"] == 4


def test_completions_are_the_greedy_ones(model_folder: Path) -> None:
    model, tokenizer = dense_folder.load_dense(model_folder), dense_folder.load_tokenizer(model_folder)
    rows = evaluate.completions(model, tokenizer, PROMPTS, PARAMS["new_tokens"])
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        for _ in range(PARAMS["new_tokens"]):
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
        assert row["completion"] == tokenizer.decode(ids[-PARAMS["new_tokens"] :], skip_special_tokens=True)
    assert evaluate.completions(model, tokenizer, PROMPTS, PARAMS["new_tokens"]) == rows


@pytest.fixture
def stage(tmp_path: Path, make_stage, model_folder: Path):
    for split, text in (
        ("test", "The pump must stop at once."),
        ("test_ood", "It rained all day, and then some more."),
    ):
        row = json.dumps({"text": text}) + "\n"
        (tmp_path / f"{split}.jsonl").write_text(row * 2, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("The pump\n\n User \n", encoding="utf-8")
    inputs = {"model": model_folder, "corpora": tmp_path, PARAMS["prompts"]: tmp_path / "prompts.txt"}
    return make_stage({"evaluate": dict(PARAMS)}, inputs, item="wanda")


def test_metrics_agree_with_the_definitions(stage, model_folder: Path) -> None:
    evaluate.run(stage)
    metrics = json.loads(stage.output("metrics.json").read_text())
    model, tokenizer = dense_folder.load_dense(model_folder), dense_folder.load_tokenizer(model_folder)
    assert (metrics["model"], metrics["evaluated"]) == ("wanda", True)
    assert metrics["protocol"] == "joined-16-16-nobos-fp32"
    for split in evaluate.SPLITS:
        rows = (stage.input("corpora") / f"{split}.jsonl").read_text().splitlines()
        ids = tokenizer("\n".join(json.loads(row)["text"] for row in rows), add_special_tokens=False)["input_ids"]
        starts = range(0, min(len(ids) // 16, 3) * 16, 16)
        losses = []
        for start in starts:
            window = torch.tensor([ids[start : start + 16]])
            with torch.no_grad():
                logits = model(window).logits[0].double()
            losses += [-math.log(logits[at].softmax(-1)[window[0, at + 1]]) for at in range(15)]
        assert metrics["predictions"][split] == len(losses)
        assert metrics["perplexity"][split] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert metrics["parameters"] == sum(w.numel() for w in load_file(model_folder / "model.safetensors").values())
    sizes = metrics["bytes"]
    assert sizes.pop("total") == sum(sizes.values()) == on_disk(model_folder)
    written = json.loads(stage.output("completions.json").read_text())
    assert [(row["tokens"], row["ended"]) for row in written] == [(7, False)] * 2  # the model has no end token
    assert metrics["failures"] == generation_failures.count(written)


@pytest.mark.parametrize("stride", [16, 5])
def test_bits_per_byte_of_a_model_that_knows_nothing(stage, model_folder: Path, stride: int) -> None:
    stage.params.evaluate.stride = stride
    weights = load_file(model_folder / "model.safetensors")
    weights["model.norm.weight"].zero_()  # every logit is 0: each of 96 tokens is as likely
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    for split in evaluate.SPLITS:
        row = json.dumps({"text": "naïve 😀 żółw, and so on: it is late."}) + "\n"
        (stage.input("corpora") / f"{split}.jsonl").write_text(row * 2, encoding="utf-8")
    evaluate.run(stage)
    metrics = json.loads(stage.output("metrics.json").read_text())
    text = "\n".join(["naïve 😀 żółw, and so on: it is late."] * 2)  # a token is a character
    counted = text[1:16] + text[16 : 16 + 2 * stride] if stride == 5 else text[1:16] + text[17:32] + text[33:48]
    bits = len(counted) * math.log2(96) / len(counted.encode())
    for split in evaluate.SPLITS:
        assert metrics["predictions"][split] == len(counted)
        assert metrics["perplexity"][split] == pytest.approx(96, rel=1e-6)
        assert metrics["bits_per_byte"][split] == pytest.approx(bits, rel=1e-6)


def test_a_split_shorter_than_one_window_is_a_sentence(stage) -> None:
    stage.params.evaluate.length = 60
    with pytest.raises(InputError, match="the text has 55 tokens, one window needs 60: give a longer text"):
        evaluate.run(stage)


def test_a_model_that_was_passed_on_is_measured_once(
    stage, make_stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, shelf = [], Shelf(tmp_path / "shelf")
    whole = evaluate.measure
    monkeypatch.setattr(evaluate, "measure", lambda stage: (measured.append(stage.item), whole(stage)))

    def run(item: str, content: str | None, out: str) -> dict[str, bytes]:
        one = make_stage({"evaluate": Evaluate(enabled=True, **PARAMS)}, stage.places, out=out, item=item)
        one.content, one.shelf = lambda path: content, lambda *_, **__: shelf
        evaluate.run(one)
        return {name: one.output(name).read_bytes() for name in evaluate.WRITTEN}

    first, again = run("fetch", "same", "a"), run("vocabulary", "same", "b")
    assert measured == ["fetch"]
    assert json.loads(again.pop("metrics.json")) == json.loads(first.pop("metrics.json")) | {"model": "vocabulary"}
    assert again == first
    for content in ("other", None):  # None: nothing is known of it
        run("wanda", content, "c")
    assert measured == ["fetch", "wanda", "wanda"]


def test_off_says_that_nothing_was_measured(stage) -> None:
    evaluate.skip(stage)
    assert json.loads(stage.output("metrics.json").read_text()) == {"model": "wanda", "evaluated": False}
    assert json.loads(stage.output("completions.json").read_text()) == []


def test_a_packed_model_is_measured_as_its_original(stage, model_folder: Path, tmp_path: Path, make_stage) -> None:
    folder = pack(dense_folder.load_dense(model_folder), tmp_path / "packed")
    copy_tokenizer(model_folder, folder)
    inputs = {"model": folder, "corpora": tmp_path, PARAMS["prompts"]: tmp_path / "prompts.txt"}
    other = make_stage({"evaluate": dict(PARAMS)}, inputs, out="other", item="package")
    evaluate.run(stage)
    evaluate.run(other)
    found, expected = (json.loads(each.output("metrics.json").read_text()) for each in (other, stage))
    assert found.pop("bytes")["total"] == on_disk(folder)
    assert {**expected, "model": "package", "bytes": None} == {**found, "bytes": None}


@pytest.mark.parametrize("protocol", [{}, {"stride": 5}, {"protocol": "rolling"}])
@pytest.mark.parametrize("states", [2**26, 2 * 2 * 16 * 32, 1])  # all batches at once, two, one
def test_a_model_that_stays_on_disk_has_the_same_bytes(
    protocol, states, stage, make_stage, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "STATES", states)
    settings = json.loads((model_folder / "tokenizer_config.json").read_text())
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "\n"}))  # rolling begins so
    params = {"evaluate": {**PARAMS, "max_windows": 7, **protocol}}
    written = []
    for out, largest in (("whole", 2**31), ("streamed", 0)):
        monkeypatch.setattr(streaming, "WHOLE", largest)
        each = make_stage(params, stage.places, out=out, item="wanda")
        evaluate.run(each)
        written.append({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()})
    assert len(written[0]) == 3 and written[0] == written[1]
