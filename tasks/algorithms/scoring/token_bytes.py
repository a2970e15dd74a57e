"""Tokenise a text and say how many of its UTF-8 bytes each token stands for.

Perplexity per token can't be compared between vocabularies; bits per byte can, and needs the bytes of exactly those
tokens that were predicted. It does not re-encode tokens one by one: a byte-level token may be a part of a character.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tasks.algorithms.errors import InputError
from tasks.algorithms.scoring import token_stream

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""This is how sentencepiece names the token of a single byte."""
CONTINUATION = "".join(bytes_to_unicode()[byte] for byte in range(0x80, 0xC0))
"""A byte-level BPE writes the bytes of a character, from its second on, as these characters."""


class Encoded(NamedTuple):
    """A text's tokens, int64 [tokens], and the bytes that each stands for, int64 [tokens]."""

    ids: Tensor
    spans: Tensor


def joined(tokenizer: Any, documents: Iterable[str], join: str, least: int | None = None) -> Encoded:
    """Encode the documents joined by `join`, a window at a time.

    Args:
        least: stop at so many tokens or somewhat more; None: at the end.

    Raises:
        InputError: the tokenizer gives no offsets.
    """
    found, held = [], 0
    for part in token_stream.pieces(lambda text: piece(tokenizer, text), documents, join):
        found.append((part.ids, part.spans))  # not the offsets
        held += len(part.ids)
        if least is not None and held >= least:
            break
    ids, spans = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return Encoded(torch.from_numpy(ids).long(), torch.from_numpy(spans))


def encode(tokenizer: Any, text: str) -> Encoded:
    """Encode a text as a whole.

    Raises:
        InputError: the tokenizer gives no offsets.
    """
    found = piece(tokenizer, text)
    return Encoded(torch.from_numpy(found.ids).long(), torch.from_numpy(found.spans))


def piece(tokenizer: Any, text: str) -> token_stream.Piece:
    """Tokenise a text without special tokens, and count the bytes that each token stands for.

    A token stands for the text from the end of the token before it to its own end (so for a space that its offsets
    leave out, too). Of a character that several tokens share, each has its own bytes where tokens are made of bytes
    (byte-level BPE, byte fallback); the first has all of them elsewhere. A character that the tokenizer drops for want
    of an unknown token counts for nothing. The bytes' sum is that of the text up to the end of its last token.

    Raises:
        InputError: the tokenizer gives no offsets.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} doesn't say which text a token stands for, so bits per byte can't be measured;"
            " take a model with a tokenizer.json"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)  # characters: [tokens, (start, end)]
    ids = encoded["input_ids"]
    # UTF-8 takes 1, 2, 3 or 4 bytes for a code point below 2^7, 2^11, 2^16 or above
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    until = np.concatenate([[0], np.cumsum(widths)])  # bytes before each character, and all
    ends = np.maximum.accumulate(np.concatenate([[0], offsets[:, 1]]))
    spans = np.diff(until[ends])  # a shared character is its first token's
    # for each token, the last one up to it that has bytes: it began the character that is shared
    started = np.maximum.accumulate(np.where(spans > 0, np.arange(len(spans)), 0))
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    for at in (offsets[:, 0] < ends[:-1]).nonzero()[0]:  # it starts within what the tokens before it cover
        continued = _continued(tokenizer.convert_ids_to_tokens(ids[at]), byte_level)
        spans[at] += continued
        spans[started[at - 1]] -= continued
    return token_stream.Piece(np.array(ids, dtype=np.int32), offsets, spans)


def _continued(token: str, byte_level: bool) -> int:
    """Count the bytes with which a token goes on with a character that another token began."""
    if byte_level:
        return len(token) - len(token.lstrip(CONTINUATION))
    return 1 if BYTE.fullmatch(token) else 0
