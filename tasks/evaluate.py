"""Measure one model of the pipeline: perplexity on both test splits, size by `stat`, zeros, and greedy completions.

The protocol is `tasks.algorithms.perplexity`'s, its name stands beside the numbers. Perplexity is per token, so it
can't be compared between vocabularies. Bits per byte can: the information of the same predictions over the UTF-8 bytes
of the text that they stand for (`token_bytes`). Each model is an item of the stage's matrix and so is cached on its
own. It judges nothing: limits and comparisons are the report's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tasks import checkpoint, corpora, models, tensor_files
from tasks.algorithms import masks, perplexity, resume
from tasks.algorithms.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from tasks.params import Evaluate
    from tasks.stage import Stage

SPLITS = ("test", "test_ood")
GROUPS = (4, 8, 16, 32)
"""Lengths of the groups of consecutive inputs whose largest number of non-zeros is stated."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""sentencepiece's token of a single byte."""
CONTINUATION = "".join(bytes_to_unicode()[byte] for byte in range(0x80, 0xC0))
"""How a byte-level BPE writes the bytes of a character from its second on."""


def run(stage: Stage) -> None:
    """Write metrics.json and completions.json."""
    folder, p = stage.input("model"), stage.params.evaluate
    model, tokenizer = models.load_model(folder), checkpoint.load_tokenizer(folder)
    metrics = {
        "model": stage.item,
        "evaluated": True,
        "protocol": perplexity.protocol(p.length, p.stride),
        "perplexity": {},
        "bits_per_byte": {},
        "predictions": {},
        **sparsity(models.block_weights(model)),
        "parameters": checkpoint.parameter_count(model),
        "bytes": sizes(folder),
    }
    for split in SPLITS:
        documents = corpora.read(stage.input("corpora") / f"{split}.jsonl")
        windows = perplexity.windows(perplexity.tokenise(tokenizer, documents), p.length, p.stride, p.max_windows)
        spans = perplexity.windows(token_bytes(tokenizer, documents), p.length, p.stride, p.max_windows)
        nll = token_nll(model, windows, p.batch, stage.journal.part(split))
        metrics["perplexity"][split] = perplexity.from_nll(nll, p.stride)
        metrics["bits_per_byte"][split] = bits_per_byte(nll, spans, p.stride)
        metrics["predictions"][split] = len(perplexity.counted(nll, p.stride))
        print(
            f"{split}: perplexity {metrics['perplexity'][split]:.4f}, {metrics['bits_per_byte'][split]:.4f} bits per"
            f" byte ({metrics['protocol']}, {len(windows)} windows)"
        )
    print(f"{metrics['bytes']['total']} bytes, {metrics['zero_fraction']:.4f} zeros in the blocks")
    checkpoint.write_json(stage.output("metrics.json"), metrics)
    checkpoint.write_json(stage.output("completions.json"), completions(model, tokenizer, p, stage.journal))


def skip(stage: Stage) -> None:
    """Say that nothing was measured."""
    checkpoint.write_json(stage.output("metrics.json"), {"model": stage.item, "evaluated": False})
    checkpoint.write_json(stage.output("completions.json"), [])


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of a model folder by `stat`: total, and by what they are for, with the names of the folder's own format."""
    return {"total": tensor_files.stored_bytes(folder), **models.component_bytes(folder)}


def token_bytes(tokenizer: Any, documents: Iterable[str]) -> Tensor:
    """UTF-8 bytes of the joined documents that each token of `perplexity.tokenise` stands for.

    A token stands for the text from the end of the token before it to its own end (so for a space that its offsets
    leave out, too). Of a character that several tokens share, each has its own bytes where tokens are made of bytes
    (byte-level BPE, byte fallback); the first has all of them elsewhere. A character that the tokenizer drops for want
    of an unknown token counts for nothing.

    Returns:
        int64 [tokens]; the sum is that of the whole text up to the end of its last token.

    Raises:
        InputError: the tokenizer gives no offsets.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} doesn't say which text a token stands for, so bits per byte can't be measured;"
            " take a model with a tokenizer.json"
        )
    text = perplexity.JOIN.join(documents)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)  # characters: [tokens, (start, end)]
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    until = np.concatenate([[0], np.cumsum(widths)])  # bytes before each character, and all
    ends = np.maximum.accumulate(np.concatenate([[0], offsets[:, 1]]))
    spans = np.diff(until[ends])  # a shared character is its first token's
    started = np.maximum.accumulate(np.where(spans > 0, np.arange(len(spans)), 0))
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    for at in (offsets[:, 0] < ends[:-1]).nonzero()[0]:  # it starts within what the tokens before it cover
        own = _continued(tokenizer.convert_ids_to_tokens(encoded["input_ids"][at]), byte_level)
        spans[at] += own
        spans[started[at - 1]] -= own
    return torch.from_numpy(spans)


def _continued(token: str, byte_level: bool) -> int:
    """With how many bytes a token goes on with a character that another token began."""
    if byte_level:
        return len(token) - len(token.lstrip(CONTINUATION))
    return 1 if BYTE.fullmatch(token) else 0


def token_nll(model: Any, windows: Tensor, batch: int, memory: resume.Memory) -> Tensor:
    """`perplexity.token_nll`, without what an interrupted run had computed."""
    begun = memory.load("nll")
    losses = [begun.tensors["nll"]] if begun else []  # [windows, length - 1] each
    first = begun.values if begun else 0
    for done, ids in enumerate(windows.split(batch)[first:], start=first + 1):
        losses.append(perplexity.token_nll(model, ids, batch))
        if memory.due():
            memory.save("nll", {"nll": torch.cat(losses)}, done)
    return torch.cat(losses)


def bits_per_byte(nll: Tensor, spans: Tensor, stride: int) -> float:
    """Information of the predictions that count, per byte of text that they stand for.

    Args:
        nll: nats, [windows, length - 1], of `perplexity.token_nll`.
        spans: bytes of each token, [windows, length]; a window's first is never predicted.
        stride: that of the windows.
    """
    counted = perplexity.counted(spans[:, 1:], stride)
    return float(perplexity.counted(nll, stride).sum()) / math.log(2) / int(counted.sum())


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


def completions(
    model: Any, tokenizer: Any, p: Evaluate, memory: resume.Memory = resume.NOTHING
) -> list[dict[str, str]]:
    """The greedy continuation of every prompt, at most `new_tokens` tokens."""
    begun = memory.load("completions")
    rows = begun.values if begun else []
    for prompt in p.prompts[len(rows) :]:
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
        if memory.due():
            memory.save("completions", {}, rows)
    return rows
