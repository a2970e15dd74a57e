"""Trim a byte-pair vocabulary to the tokens that a corpus uses, so that the embedding needs fewer rows.

A small model spends much of its size on the embedding, and a text of one domain uses a part of it. A token stays that
occurs often enough, and with it every token that byte-pair encoding passes through on the way to it; a merge stays if
both its parts and its result do. So a text whose tokens all stay encodes exactly as before: each merge that happened is
still there, in the old order, and none was added. Other text falls back to smaller tokens, down to single characters
and bytes, which always stay. Ids are renumbered in the old order. It follows vocabulary trimming (Ushio et al. 2023,
arXiv 2305.15020); dropping rare tokens too (min_count above 1) is studied by Cognetta et al. 2024 (arXiv 2404.00397).

It works on the parsed `tokenizer.json` of the tokenizers library: byte-level BPE (GPT-2, Llama 3, Qwen) and
sentencepiece's BPE with or without byte fallback (Llama 2, Mistral). It does not learn new merges or tokens, knows no
Unigram, WordPiece or WordLevel model, and reads no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tasks.algorithms.errors import InputError

WAY_OUT = "set vocabulary.enabled to false, or take another model"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""This is how sentencepiece names the token of a single byte."""
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
"""These entries of generation_config.json hold lists of ids, at any depth."""
MIXED = ("forced_decoder_ids", "sequence_bias")
"""These entries mix ids with other numbers."""
PROCESSORS = ("ByteLevel", "TemplateProcessing", "Sequence", "BertProcessing", "RobertaProcessing")


def check(tokenizer: Mapping[str, Any]) -> None:
    """Refuse a tokenizer whose vocabulary can't be trimmed.

    Args:
        tokenizer: the content of tokenizer.json.

    Raises:
        InputError: its model is no BPE, or a BPE with dropout, or with prefixes or suffixes of subwords.
    """
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise InputError(f"the tokenizer's model is {model.get('type')}, only BPE can be trimmed: {WAY_OUT}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise InputError(f"the tokenizer's BPE has {key} = {model[key]!r}, expected none: {WAY_OUT}")
    _rewritten(tokenizer, lambda token: token)


def kept(tokenizer: Mapping[str, Any], counts: Tensor, min_count: int, named: Iterable[int] = ()) -> Tensor:
    """Choose the ids that stay.

    Args:
        tokenizer: the content of tokenizer.json.
        counts: int64 [rows], how often each id of the embedding occurs in the corpus.
        min_count: a token stays that occurs at least this often.
        named: ids that stay whatever their count, from `named_ids`.

    Returns:
        int64 [kept], ascending. Position = new id.

    Raises:
        InputError: `check` refuses the tokenizer, or an id has no row in the embedding.
    """
    check(tokenizer)
    model = tokenizer["model"]
    vocabulary: dict[str, int] = model["vocab"]
    tokens = {number: token for token, number in vocabulary.items()}
    ranks = {pair: rank for rank, pair in enumerate(map(_pair, model["merges"]))}
    stay = {*named, *_tokenizer_ids(tokenizer), *_alphabet(vocabulary)}
    if model.get("unk_token") in vocabulary:
        stay.add(vocabulary[model["unk_token"]])
    # a token is reached through the tokens that its merges make on the way: they stay whatever their own count
    for number in (counts >= min_count).nonzero().flatten().tolist():
        stay.add(number)
        stay.update(vocabulary[token] for token in derivation(tokens.get(number, ""), ranks))
    if not 0 <= min(stay) <= max(stay) < len(counts):
        raise InputError(
            f"ids from {min(stay)} to {max(stay)} are in use, but the embedding has {len(counts)} rows: tokenizer and"
            " model don't belong together, fetch both from one place"
        )
    return torch.tensor(sorted(stay))


def derivation(token: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """List what byte-pair encoding merges on the way from a token's characters to the token, the token itself last.

    Encoding merges the adjacent pair of the lowest rank, the leftmost of equals, until none is left. No merge reaches
    across the ends of a token in the result, so within any text the token comes about in just this way.

    Args:
        ranks: (left, right) -> position of the merge.

    Returns:
        Tokens of two or more characters; empty if the merges lead elsewhere (or there is none to do).
    """
    parts, made = list(token), []
    while len(parts) > 1:  # the encoder's own rule (Sennrich et al. 2016, BPE): the earliest learnt merge first
        order = [ranks.get(pair, math.inf) for pair in zip(parts, parts[1:], strict=False)]
        at = order.index(min(order))
        if order[at] == math.inf:
            return []
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        made.append(parts[at])
    return made


def trim(tokenizer: Mapping[str, Any], keep: Tensor) -> dict[str, Any]:
    """Return the content of tokenizer.json with the kept tokens alone, under their new ids.

    Args:
        keep: int64 [kept], from `kept`.
    """
    new = positions(keep)
    model = tokenizer["model"]
    vocabulary = {token: new[number] for token, number in model["vocab"].items() if number in new}

    def stays(merge: str | list[str]) -> bool:
        left, right = _pair(merge)
        return left in vocabulary and right in vocabulary and left + right in vocabulary

    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    smaller = {**model, "vocab": ordered, "merges": [merge for merge in model["merges"] if stays(merge)]}
    return {**_rewritten(tokenizer, new.__getitem__), "model": smaller}


def renumber(config: Mapping[str, Any], keep: Tensor) -> dict[str, Any]:
    """Return a config.json, generation_config.json or tokenizer_config.json with the new ids.

    Args:
        keep: int64 [kept], from `kept`, with all of `named_ids` among them.

    Raises:
        InputError: an entry holds ids in a form that isn't supported.
    """
    return _renamed(config, positions(keep).__getitem__)


def named_ids(config: Mapping[str, Any]) -> list[int]:
    """List the ids that a config.json, generation_config.json or tokenizer_config.json names.

    Raises:
        InputError: as `renumber`.
    """
    ids: list[int] = []
    _renamed(config, lambda token: ids.append(token) or token)  # renames nothing, sees every id
    return ids


def positions(keep: Tensor) -> dict[int, int]:
    """Return old id -> new id."""
    return {number: position for position, number in enumerate(keep.tolist())}


def _alphabet(vocabulary: Mapping[str, int]) -> list[int]:
    """List the ids of single characters (in a byte-level BPE: of all bytes) and of sentencepiece's single bytes."""
    return [number for token, number in vocabulary.items() if len(token) == 1 or BYTE.fullmatch(token)]


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Return a merge's parts; older files hold it as one string with a space between them."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _tokenizer_ids(tokenizer: Mapping[str, Any]) -> list[int]:
    """List the ids that a tokenizer.json names outside its model: added tokens, the post-processor's, padding."""
    ids: list[int] = []
    _rewritten(tokenizer, lambda token: ids.append(token) or token)
    return ids


def _rewritten(tokenizer: Mapping[str, Any], new: Callable[[int], int]) -> dict[str, Any]:
    """Return a tokenizer.json with `new` applied to every id outside its model."""
    result = dict(tokenizer)
    result["added_tokens"] = [{**added, "id": new(added["id"])} for added in tokenizer.get("added_tokens") or ()]
    if tokenizer.get("post_processor"):
        result["post_processor"] = _processor(tokenizer["post_processor"], new)
    if tokenizer.get("padding"):
        result["padding"] = {**tokenizer["padding"], "pad_id": new(tokenizer["padding"]["pad_id"])}
    return result


def _processor(processor: Mapping[str, Any], new: Callable[[int], int]) -> dict[str, Any]:
    kind = processor["type"]
    if kind not in PROCESSORS:
        raise InputError(
            f"the tokenizer's post-processor is {kind}, expected one of {', '.join(PROCESSORS)}: {WAY_OUT}"
        )
    result = dict(processor)
    if kind == "Sequence":
        result["processors"] = [_processor(part, new) for part in processor["processors"]]
    elif kind == "TemplateProcessing":
        special = processor["special_tokens"]
        result["special_tokens"] = {
            name: {**entry, "ids": [new(token) for token in entry["ids"]]} for name, entry in special.items()
        }
    elif kind != "ByteLevel":
        result |= {key: [processor[key][0], new(processor[key][1])] for key in ("sep", "cls")}
    return result


def _renamed(config: Mapping[str, Any], new: Callable[[int], int]) -> dict[str, Any]:
    """Apply `new` to every id of a config; a negative one stands for none and stays."""

    def apply(value: Any) -> Any:
        if isinstance(value, list):
            return [apply(entry) for entry in value]
        return value if value is None or value < 0 else new(value)

    result = dict(config)
    for key, value in config.items():
        if key.endswith("_token_id") or key in LISTS:
            result[key] = apply(value)
        elif key in MIXED and value:
            raise InputError(f"generation_config.json has {key} = {value!r}, which can't be renumbered: remove it")
        elif key == "added_tokens_decoder":
            result[key] = {str(new(int(number))): added for number, added in value.items()}
    return result
