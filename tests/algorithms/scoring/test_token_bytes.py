"""Bytes per token: byte-level BPE whose merges cross characters, byte fallback, prepended spaces."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tasks.algorithms.errors import InputError
from tasks.algorithms.scoring import token_bytes


def byte_level(trim_offsets: bool) -> PreTrainedTokenizerFast:
    """Merges of it join bytes of neighbouring characters: a space with the first byte of the next one."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([" żółw łoś", "the pumps", " żaba żuraw"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def byte_fallback() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for token in ("▁", "t", "h", "e", "ż", "▁t", "he", "▁the"):
        vocabulary[token] = len(vocabulary)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core)


TEXT = "\n".join(
    [
        "the żółty żuraw  łoś 😀\u200d👩 e\u0301",
        "the  the\tżżż日本 the",
        "\x7f\x80\u07ff\u0800\uffff\U00010000",
        " end ",
    ]
)


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_the_bytes_of_a_byte_level_token_are_its_characters(trim_offsets: bool) -> None:
    tokenizer = byte_level(trim_offsets)
    tokens = tokenizer.convert_ids_to_tokens(token_bytes.encode(tokenizer, TEXT).ids.tolist())
    assert any("Ġ" in token and not token.lstrip("Ġ").isascii() for token in tokens)  # " " and a part of "ż"
    found = token_bytes.encode(tokenizer, TEXT).spans.tolist()
    assert found == [len(token) for token in tokens]
    assert sum(found) == len(TEXT.encode())


def test_the_bytes_of_a_token_with_byte_fallback() -> None:
    tokenizer = byte_fallback()
    tokens = tokenizer.convert_ids_to_tokens(token_bytes.encode(tokenizer, TEXT).ids.tolist())
    found = token_bytes.encode(tokenizer, TEXT).spans.tolist()
    expected = [1 if token.startswith("<0x") else len(token.replace("▁", " ").encode()) for token in tokens]
    assert {"▁the", "ż", "<0xF0>", "<0x80>"} <= set(tokens)
    assert (tokens[0], found[0], expected[0]) == ("▁the", 3, 4)  # the text has no space there
    assert found[1:] == expected[1:]
    assert sum(found) == len(TEXT.encode())


def test_a_prepended_space_has_no_bytes() -> None:
    assert token_bytes.encode(byte_fallback(), "é").spans.tolist() == [0, 1, 1]


def test_a_tokenizer_without_offsets_is_a_sentence() -> None:
    with pytest.raises(InputError, match="SimpleNamespace doesn't say which text a token stands for"):
        token_bytes.encode(SimpleNamespace(is_fast=False), "text")
