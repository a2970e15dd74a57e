"""Measure one model of the pipeline: perplexity on both test splits, size by `stat`, zeros, and greedy completions.

The protocol is `tasks.algorithms.perplexity`'s, its name stands beside the numbers. Each model is an item of the
stage's matrix and so is cached on its own. It judges nothing: limits and comparisons are the report's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tasks import checkpoint, corpora, quantised, tensor_files
from tasks.algorithms import masks, perplexity

if TYPE_CHECKING:
    from tasks.params import Evaluate
    from tasks.stage import Stage

SPLITS = ("test", "test_ood")
GROUPS = (4, 8, 16, 32)
"""Lengths of the groups of consecutive inputs whose largest number of non-zeros is stated."""


def run(stage: Stage) -> None:
    """Write metrics.json and completions.json."""
    folder, p = stage.input("model"), stage.params.evaluate
    model, tokenizer = quantised.load_model(folder), checkpoint.load_tokenizer(folder)
    metrics = {
        "model": stage.item,
        "evaluated": True,
        "protocol": perplexity.protocol(p.length, p.stride),
        "perplexity": {},
        "predictions": {},
        **sparsity(quantised.block_weights(model)),
        "parameters": checkpoint.parameter_count(model),
        "bytes": {"total": tensor_files.stored_bytes(folder), **tensor_files.component_bytes(folder)},
    }
    for split in SPLITS:
        tokens = perplexity.tokenise(tokenizer, corpora.read(stage.input("corpora") / f"{split}.jsonl"))
        windows = perplexity.windows(tokens, p.length, p.stride, p.max_windows)
        nll = perplexity.token_nll(model, windows, p.batch)
        metrics["perplexity"][split] = perplexity.from_nll(nll, p.stride)
        metrics["predictions"][split] = len(perplexity.counted(nll, p.stride))
        print(f"{split}: perplexity {metrics['perplexity'][split]:.4f} ({metrics['protocol']}, {len(windows)} windows)")
    print(f"{metrics['bytes']['total']} bytes, {metrics['zero_fraction']:.4f} zeros in the blocks")
    checkpoint.write_json(stage.output("metrics.json"), metrics)
    checkpoint.write_json(stage.output("completions.json"), completions(model, tokenizer, p))


def skip(stage: Stage) -> None:
    """Say that nothing was measured."""
    checkpoint.write_json(stage.output("metrics.json"), {"model": stage.item, "evaluated": False})
    checkpoint.write_json(stage.output("completions.json"), [])


def sparsity(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Zeros of the blocks' matrices, and how dense their densest group of consecutive inputs is.

    Args:
        weights: module name -> [out_features, in_features].
    """
    parameters = sum(weight.numel() for weight in weights.values())
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    densest = {}
    for of in GROUPS:
        fits = all(weight.shape[1] % of == 0 for weight in weights.values())
        densest[str(of)] = max(masks.densest_group(weight, of) for weight in weights.values()) if fits else None
    return {"block_parameters": parameters, "zeros": zeros, "zero_fraction": zeros / parameters, "max_kept": densest}


def completions(model: Any, tokenizer: Any, p: Evaluate) -> list[dict[str, str]]:
    """The greedy continuation of every prompt, at most `new_tokens` tokens."""
    rows = []
    for prompt in p.prompts:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            full = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=p.new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        rows.append(
            {"prompt": prompt, "completion": tokenizer.decode(full[0, ids.shape[1] :], skip_special_tokens=True)}
        )
    return rows
