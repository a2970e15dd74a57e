"""Stage evaluate against naive loops: zeros, the densest group, perplexity, greedy completions."""

import json
from types import SimpleNamespace

import pytest
import torch

from tasks import checkpoint, evaluate, tensor_files


def test_sparsity_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(6, 32, generator=generator) for name in ("a", "b")}
    for weight in weights.values():
        weight[torch.rand(weight.shape, generator=generator) < 0.4] = 0
    found = evaluate.sparsity(weights)
    zeros, densest = 0, dict.fromkeys(evaluate.GROUPS, 0)
    for weight in weights.values():
        for row in weight.tolist():
            zeros += sum(value == 0 for value in row)
            for of in evaluate.GROUPS:
                for start in range(0, 32, of):
                    densest[of] = max(densest[of], sum(value != 0 for value in row[start : start + of]))
    assert found["zeros"] == zeros
    assert found["zero_fraction"] == zeros / found["block_parameters"] == zeros / (2 * 6 * 32)
    assert found["max_kept"] == {str(of): count for of, count in densest.items()}


def test_groups_that_do_not_divide_have_no_count() -> None:
    assert evaluate.sparsity({"a": torch.ones(2, 12)})["max_kept"] == {"4": 4, "8": None, "16": None, "32": None}


@pytest.fixture
def evaluated(make_stage, model_folder, tmp_path):
    """The stage's metrics and completions of a small random model."""
    corpora = tmp_path / "corpora"
    corpora.mkdir()
    for split in evaluate.SPLITS:
        rows = [json.dumps({"text": f"{split} sentence number {i}, with words"}) + "\n" for i in range(12)]
        (corpora / f"{split}.jsonl").write_text("".join(rows))
    values = {"length": 32, "stride": 32, "max_windows": 5, "batch": 2, "prompts": ["The pump"], "new_tokens": 6}
    stage = make_stage(
        {"evaluate": SimpleNamespace(**values)}, {"model": model_folder, "corpora": corpora}, item="wanda"
    )
    evaluate.run(stage)
    return tuple(json.loads((tmp_path / f"out/{name}.json").read_text()) for name in ("metrics", "completions"))


def test_perplexity_equals_a_loop_over_tokens(evaluated, model_folder, tmp_path) -> None:
    metrics, _ = evaluated
    model, tokenizer = checkpoint.load_dense(model_folder), checkpoint.load_tokenizer(model_folder)
    rows = (tmp_path / "corpora/test.jsonl").read_text().splitlines()
    ids = tokenizer("\n".join(json.loads(row)["text"] for row in rows), add_special_tokens=False)["input_ids"]
    losses = []
    for start in range(0, 5 * 32, 32):
        window = torch.tensor(ids[start : start + 32])
        with torch.no_grad():
            probabilities = model(input_ids=window[None]).logits[0].double().softmax(-1)
        losses += [-float(probabilities[i, window[i + 1]].log()) for i in range(31)]
    expected = torch.tensor(losses, dtype=torch.float64).mean().exp()
    assert metrics["perplexity"]["test"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["predictions"]["test"] == len(losses)
    assert metrics["model"] == "wanda" and metrics["protocol"] == "joined-32-32-nobos-fp32"


def test_sizes_are_those_of_the_files(evaluated, model_folder) -> None:
    metrics, _ = evaluated
    assert metrics["bytes"]["total"] == sum(path.stat().st_size for path in model_folder.iterdir())
    assert metrics["bytes"]["total"] == sum(metrics["bytes"][name] for name in tensor_files.COMPONENTS)
    assert metrics["parameters"] == sum(w.numel() for w in checkpoint.load_dense(model_folder).parameters())


def test_completions_are_greedy(evaluated, model_folder) -> None:
    _, completions = evaluated
    model, tokenizer = checkpoint.load_dense(model_folder), checkpoint.load_tokenizer(model_folder)
    ids = tokenizer("The pump", add_special_tokens=False)["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert completions == [{"prompt": "The pump", "completion": tokenizer.decode(ids[-6:], skip_special_tokens=True)}]


def test_switched_off_it_says_so(make_stage, tmp_path) -> None:
    evaluate.skip(make_stage({}, {}, item="lora"))
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == {"model": "lora", "evaluated": False}
