"""Measure one model of the pipeline: perplexity on both test splits, size by `stat`, zeros, and greedy completions.

The protocol is one of `tasks.algorithms.scoring.protocols`, its name stands beside the numbers. Perplexity is per
token, so it can't be compared between vocabularies. Bits per byte can: the information of the same predictions over the
UTF-8 bytes of the text that they stand for. documents.csv has the sums per document, from which the difference of two
models gets its confidence interval. What goes wrong in the completions is counted
(`tasks.algorithms.scoring.generation_failures`). Each model is an item of the stage's matrix and so is cached on its
own. It judges nothing: limits and comparisons are the report's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.algorithms.model import checkpoints, layers, masks
from tasks.algorithms.model.shape import shape_of_config, shape_of_model
from tasks.algorithms.scoring import generation_failures, likelihood, protocols
from tasks.models import dense_folder, model_files
from tasks.parameters import prompt_file, rules
from tasks.runners import any_folder
from tasks.runtime import files
from tasks.sources import json_lines

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    import torch

    from tasks.runtime.stage import Stage

SPLITS = ("test", "test_ood")
GROUPS = (4, 8, 16, 32)
"""Lengths of the groups of consecutive inputs whose largest number of non-zeros is stated."""
DOCUMENTS = ("split", "document", "predictions", "bytes", "nll")
"""Columns of documents.csv."""

WRITTEN = ("metrics.json", "documents.csv", "completions.json")
TOGETHER = 8
"""Prompts that are completed at once."""


def run(stage: Stage) -> None:
    """Write metrics.json, documents.csv and completions.json.

    Where a stage passed its model on, as one that is switched off does, several items have the same one: the first
    measures it, the others take what it wrote.
    """
    content, own = stage.content(stage.model_in), stage.params.evaluate
    if content is None:
        return measure(stage)
    import torch

    texts = [stage.input("corpora"), stage.input(os.path.relpath(own.prompts))]
    shelf = stage.shelf("evaluations", "evaluate", texts, device=stage.params.device, parameters=own.model_dump())
    if found := shelf.load(content):
        print("another item of this stage has the same model: its figures are taken")
        for name in WRITTEN:
            files.write_bytes(stage.output(name), found.tensors[name].numpy().tobytes())
        metrics = json.loads(stage.output("metrics.json").read_text(encoding="utf-8"))
        return files.write_json(stage.output("metrics.json"), metrics | {"model": stage.item})
    measure(stage)
    written = {name: bytearray(stage.output(name).read_bytes()) for name in WRITTEN}
    shelf.save(content, {name: torch.frombuffer(each, dtype=torch.uint8) for name, each in written.items()})


def measure(stage: Stage) -> None:
    """Measure and write all, whatever other items found."""
    folder = stage.model_in
    p = rules.settle(stage.params.evaluate, shape_of_config(any_folder.config(folder)), stage.params.device)
    model, tokenizer = any_folder.load_or_stream(folder, stage.params.device), dense_folder.load_tokenizer(folder)
    protocol = protocols.protocol(p.protocol, p.length, p.stride)
    protocols.check_context(protocol, shape_of_model(model).context)
    metrics = {
        "model": stage.item,
        "evaluated": True,
        "protocol": protocols.label(protocol, p.max_windows),
        "perplexity": {},
        "bits_per_byte": {},
        "predictions": {},
        **sparsity(weight for _, weight in any_folder.block_weights(model)),
        "parameters": dense_folder.parameter_count(model),
        "bytes": sizes(folder),
    }
    import pandas as pd

    tables = []
    for split in SPLITS:
        documents = json_lines.read(stage.input("corpora") / f"{split}.jsonl")
        prepared = likelihood.prepare(protocol, tokenizer, documents, p.max_windows)
        score = likelihood.score(model, prepared, p.batch, stage.journal.part(split))
        metrics["perplexity"][split] = score.perplexity
        metrics["bits_per_byte"][split] = score.bits_per_byte
        metrics["predictions"][split] = len(score.nll)
        tables.append(pd.DataFrame({"split": split} | score.by_document()))
        print(
            f"{split}: perplexity {score.perplexity:.4f}, {score.bits_per_byte:.4f} bits per byte"
            f" ({score.label}, {score.windows} windows)"
        )
    print(f"{metrics['bytes']['total']} bytes, {metrics['zero_fraction']:.4f} zeros in the blocks")
    prompts = prompt_file.read(stage.input(os.path.relpath(p.prompts)))
    written = completions(model, tokenizer, prompts, p.new_tokens, stage.journal)
    metrics["failures"] = generation_failures.count(written)
    _write_documents(stage, tables)
    files.write_json(stage.output("metrics.json"), metrics)
    files.write_json(stage.output("completions.json"), written)


def skip(stage: Stage) -> None:
    """Say that nothing was measured."""
    files.write_header(stage.output("documents.csv"), DOCUMENTS)
    files.write_json(stage.output("metrics.json"), {"model": stage.item, "evaluated": False})
    files.write_json(stage.output("completions.json"), [])


def _write_documents(stage: Stage, tables: list[pd.DataFrame]) -> None:
    import pandas as pd

    files.write_csv(stage.output("documents.csv"), pd.concat(tables), "%.9g", DOCUMENTS)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of a model folder by `stat`: total, and by what they are for, with the names of the folder's own format."""
    return {"total": model_files.stored_bytes(folder), **any_folder.component_bytes(folder)}


def sparsity(weights: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Zeros of the blocks' matrices, and how dense their densest group of consecutive inputs is.

    Args:
        weights: [out_features, in_features] each; one is looked at a time.
    """
    parameters, zeros, densest = 0, 0, dict.fromkeys(map(str, GROUPS), 0)
    for weight in weights:
        parameters += weight.numel()
        zeros += int((weight == 0).sum())
        for of in GROUPS:
            before = densest[str(of)]
            if before is None or weight.shape[1] % of:
                densest[str(of)] = None
            else:
                densest[str(of)] = max(before, masks.densest_group(weight, of))
    return {"block_parameters": parameters, "zeros": zeros, "zero_fraction": zeros / parameters, "max_kept": densest}


def completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    new_tokens: int,
    saved: checkpoints.Saved | None = None,
) -> list[dict[str, Any]]:
    """The greedy continuation of every prompt, at most `new_tokens` tokens, and what goes wrong in it."""
    saved = saved or checkpoints.NOTHING
    begun = saved.load("completions")
    rows = begun.values if begun else []
    end = model.generation_config.eos_token_id
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    while several := prompts[len(rows) : len(rows) + TOGETHER]:
        for prompt, new in zip(several, _continued(model, tokenizer, several, new_tokens, ends), strict=True):
            text = tokenizer.decode(new, skip_special_tokens=True)
            rows.append({"prompt": prompt, "completion": text, **generation_failures.describe(new, text, ends)})
        if saved.due():
            saved.save("completions", {}, rows)
    return rows


def _continued(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, ends: list[int]) -> list[list[int]]:
    """The greedy new tokens of each prompt, up to and with the first end token."""
    import torch

    given = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    width, padding = max(map(len, given)), tokenizer.eos_token_id or 0
    # padded on the left and masked there, so that all continue in the same column; [prompts, width]
    ids = torch.tensor([[padding] * (width - len(one)) + one for one in given])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in given])
    with torch.no_grad(), layers.opening_themselves(model):
        full = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=padding,
        )
    found = []
    for row in full[:, width:].tolist():
        stop = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
        found.append(row[:stop])  # behind it is padding
    return found
