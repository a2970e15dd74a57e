"""Stage vocabulary: the fetched model with the tokens alone that a corpus uses, as an ordinary smaller checkpoint.

Tokenizer, embedding and an untied head shrink together; every row that stays keeps its bits and its type, all other
tensors their bytes. Before the stage ends it compares the result with the original: how the corpus encodes, how other
text comes back, and what the model answers.

Files that hold the vocabulary once more (vocab.json, merges.txt, tokenizer.model) are left out, tokenizer.json has it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, head
from tasks.algorithms.model.shape import shape_of_config
from tasks.algorithms.scoring import perplexity
from tasks.algorithms.text import vocabulary
from tasks.models import (
    dense_folder,
    generations,
    model_files,
    stored_tensors,
    streamed_folder,
    tensor_files,
    tensor_headers,
)
from tasks.runtime import files
from tasks.sources import json_lines

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tasks.runtime.stage import Stage

WINDOW = 128
"""Tokens on which the answers of both models are compared."""
TOLERANCE = 1e-5
"""Of the largest logit: float32 products with fewer rows may be summed in another order."""
DOCUMENTS = 256
"""How many documents of the corpus are decoded, too."""
UNSEEN = (
    "Zażółć gęślą jaźń; naïve façade, Ærøskøbing, Москва, Ελλάδα.",
    "東京とソウル 서울, العربية, עברית, हिन्दी, ไทย",
    "😀👩‍👩‍👧‍👦🇪🇺 👍🏽 \U0001f9ff ∑∫√∞ ≠ ≤ “quotes” – — …",
    "def f(x):\n\treturn x**2  # 1,234.50 e-10\r\n\n\n  <b>&nbsp;</b>",
    " leading and trailing  spaces   ",
    "e\u0301 versus \u00e9, \u200b\u00a0\ufeff\u0000\u0007, \ufffd, \U0010ffff",
    "",
)
"""Text of many scripts, mostly of characters that no corpus of ours has."""


def run(stage: Stage) -> None:
    """Write the smaller model and tokens.json.

    Raises:
        InputError: the tokenizer is no BPE of the tokenizers library, or trimming would change what it may not.
    """
    source, target, p = stage.model_in, stage.output("model"), stage.params.vocabulary
    tokenizer = dense_folder.load_tokenizer(source)
    content = _content(tokenizer)
    texts = json_lines.read(stage.input("fetch/corpora") / f"{p.corpus}.jsonl")
    tokens = perplexity.tokenise(tokenizer, texts).long()
    counts = tokens.bincount(minlength=shape_of_config(dense_folder.config(source)).vocabulary)
    tokenizer.save_pretrained(target)  # and makes the folder
    described = _described(source, target)
    named = [number for each in described.values() for number in vocabulary.named_ids(each)]
    keep = vocabulary.kept(content, counts, p.min_count, named)
    saved = _write_tokenizer(content, target, keep)
    _write_configs(described, target, keep)
    _write_weights(stage, source, target, keep)

    trimmed = dense_folder.load_tokenizer(target)
    ids = perplexity.tokenise(trimmed, texts).long()
    if p.min_count == 1:
        check_tokens(tokens, ids, keep)
    check_texts(tokenizer, trimmed, [*UNSEEN, *texts[:DOCUMENTS]])
    difference = check_logits(source, target, ids[:WINDOW], keep)
    record = {"enabled": True, "corpus": p.corpus, "min_count": p.min_count} | _sizes(source, target, saved)
    record |= {"kept": keep.tolist(), "counts": counts[keep].tolist()}
    record["corpus_tokens"] = {"before": len(tokens), "after": len(ids)}
    files.write_json(stage.output("tokens.json"), record)
    print(f"{len(keep)} of {len(counts)} tokens stay, bytes saved: {record['bytes_saved']}")
    print(f"the corpus has {len(ids):,} tokens, {len(tokens):,} before; logits differ by {difference:.2g} at most")


def skip(stage: Stage) -> None:
    """The fetched model as it is."""
    source = stage.model_in
    stage.pass_on(source, stage.output("model"))
    files.write_json(stage.output("tokens.json"), {"enabled": False, **_sizes(source, source, 0)})


def check_tokens(before: Tensor, after: Tensor, keep: Tensor) -> None:
    """Refuse a trimmed tokenizer that encodes the corpus in another way.

    Args:
        before: int64 [tokens], old ids.
        after: int64 [tokens], new ids.
        keep: int64 [kept], the old id of each new one.

    Raises:
        InputError: the tokens aren't the same.
    """
    if not keep[after].equal(before):
        raise InputError(
            f"the trimmed tokenizer encodes the corpus to {len(after)} tokens that are not the original's"
            f" {len(before)}: {vocabulary.WAY_OUT}"
        )


def check_texts(original: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Refuse a trimmed tokenizer whose texts come back in another way than the original's.

    Raises:
        InputError: decode(encode(text)) of a text isn't the same.
    """
    for text in texts:
        expected, found = (_round_trip(tokenizer, text) for tokenizer in (original, trimmed))
        if found != expected:
            raise InputError(
                f"the trimmed tokenizer makes {found[:60]!r} of a text of which the original makes {expected[:60]!r}:"
                f" {vocabulary.WAY_OUT}"
            )


def check_logits(source: Path, target: Path, ids: Tensor, keep: Tensor) -> float:
    """Compare the answers of both models, a block of one in memory at a time.

    Args:
        ids: int64 [tokens], new ids.
        keep: int64 [kept], the old id of each new one.

    Returns:
        The largest difference between the trimmed model's logits and the original's of the kept tokens.

    Raises:
        InputError: it is above `TOLERANCE` of the largest logit.
    """
    expected = _logits(source, keep[ids])[:, keep]
    found = _logits(target, ids)
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * largest:
        raise InputError(
            f"the trimmed model's logits differ from the original's by {difference:.3g} (the largest is {largest:.3g}),"
            f" expected none beyond rounding: {vocabulary.WAY_OUT}"
        )
    return difference


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json says of the tokenizer, as transformers loads it."""
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} is no tokenizer of the tokenizers library, only such can be trimmed:"
            f" {vocabulary.WAY_OUT}"
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary.check(content)
    return content


def _described(source: Path, target: Path) -> dict[str, dict[str, Any]]:
    """The files beside tokenizer.json that may name ids: name -> content."""
    found = {name: _json(source / name) for name in ("config.json", "generation_config.json")}
    found["tokenizer_config.json"] = _json(target / "tokenizer_config.json")
    return {name: content for name, content in found.items() if content}


def _write_tokenizer(content: dict[str, Any], target: Path, keep: Tensor) -> int:
    """Write the trimmed tokenizer.json over the whole one, in the same format; the bytes that this saves."""
    file = target / "tokenizer.json"
    before = file.stat().st_size
    from tokenizers import Tokenizer

    Tokenizer.from_str(json.dumps(vocabulary.trim(content, keep))).save(str(file))
    return before - file.stat().st_size


def _write_configs(described: dict[str, dict[str, Any]], target: Path, keep: Tensor) -> None:
    renumbered = {name: vocabulary.renumber(content, keep) for name, content in described.items()}
    renumbered["config.json"]["vocab_size"] = len(keep)
    for name, content in renumbered.items():
        files.write_json(target / name, content)
    generations.rewrite(target)


def _write_weights(stage: Stage, source: Path, target: Path, keep: Tensor) -> None:
    """Embedding and head, its bias too, with the kept rows; a shard with neither is passed on."""
    described = families.family(dense_folder.config(source))
    names = {f"{described.embedding}.weight", f"{described.head}.weight", f"{described.head}.bias"}
    tensors = stored_tensors.StoredTensors(source)
    for path in model_files.tensors(source):
        metadata, entries = tensor_headers.header(path)
        if names.isdisjoint(entries):
            stage.pass_on(path, target / path.name)
            continue
        rewritten = {name: entry for name, entry in tensors.entries.items() if name in entries}
        for name in names & entries.keys():
            rows, *rest = rewritten[name].shape
            size = rewritten[name].size // rows * len(keep)
            rewritten[name] = rewritten[name]._replace(shape=[len(keep), *rest], size=size)
        with tensor_files.writing(target / path.name, rewritten, metadata) as write:
            for name in rewritten:
                tensor = tensors.read(name)
                write(name, tensor[keep] if name in names else tensor)
    index = _json(source / model_files.INDEX)
    if index:
        files.write_json(target / model_files.INDEX, index)  # which names the files whose sizes are summed
        index["metadata"] = {**index.get("metadata", {}), "total_size": _stored(target)}
        files.write_json(target / model_files.INDEX, index)


def _sizes(source: Path, target: Path, tokenizer: int) -> dict[str, Any]:
    """Rows of the embedding and bytes before and after, the folders' by `stat`.

    Args:
        tokenizer: bytes by which tokenizer.json is smaller, both in the format of the tokenizers library.
    """
    folders = {"before": source, "after": target}
    shapes = {when: shape_of_config(dense_folder.config(folder)) for when, folder in folders.items()}
    tables = [tensor_headers.component_bytes(folder)["embedding"] for folder in folders.values()]
    return {
        "tokens": {when: shape.vocabulary for when, shape in shapes.items()},
        "bytes": {when: model_files.stored_bytes(folder) for when, folder in folders.items()},
        "bytes_saved": {"embedding": tables[0] - tables[1], "tokenizer": tokenizer},
    }


def _stored(folder: Path) -> int:
    return sum(entry.size for entry in tensor_headers.entries(folder).values())


def _logits(folder: Path, ids: Tensor) -> Tensor:
    """float32 [tokens, vocabulary]."""
    import torch

    model = streamed_folder.open_dense(folder)
    with torch.no_grad():
        (hidden,) = head.states_of(model, [ids.unsqueeze(0)])
        return torch.cat([each for _, each in head.logits(model, hidden)])


def _round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _json(path: Path) -> dict[str, Any]:
    """A file's object; empty where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
