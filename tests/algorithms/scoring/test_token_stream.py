"""Tokens of windows against those of the whole text, of tokenizers that look at their text in different ways."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tasks.algorithms.scoring import perplexity, token_bytes, token_stream
from tasks.models import dense_folder
from tasks.sources import json_lines
from tests.support.paths import ROOT, STORIES

CL100K = (  # Llama 3's and Qwen's: newlines stick to what is before them, numbers go by three
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ALPHABET = [
    "the",
    " pump",
    " shall",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "12345",
    "7",
    ".",
    "…",
    "ß",
    "水",
    "👩‍👩‍👧",
    "e\u0301",
    "\r\n",
    "xyzzy",
]


def byte_level(pattern: str | None) -> Tokenizer:
    core = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return trained(core, pre_tokenizers.ByteLevel.alphabet())


def sentencepiece() -> Tokenizer:
    """Llama 2's: one word for the whole text, and a space before it."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return trained(core, [])


def unigram() -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.normalizer, core.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    core.train_from_iterator([text(seed, 200) for seed in range(20)], trainer)
    return core


def trained(core: Tokenizer, alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<unk>"], show_progress=False
    )
    core.train_from_iterator([text(seed, 200) for seed in range(20)], trainer)
    return core


def text(seed: int, parts: int) -> str:
    generator = random.Random(seed)
    return "".join(generator.choice(ALPHABET) for _ in range(parts))


TOKENIZERS = {
    "byte level": lambda: byte_level(None),
    "cl100k": lambda: byte_level(CL100K),
    "sentencepiece": sentencepiece,
    "unigram": unigram,
}


def encoder(core: Tokenizer, asked: list[int]):
    def encode(given: str) -> token_stream.Piece:
        asked.append(len(given))
        encoded = core.encode(given, add_special_tokens=False)
        offsets = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)
        return token_stream.Piece(np.array(encoded.ids, dtype=np.int32), offsets)

    return encode


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_are_those_of_the_whole_text(kind: str) -> None:
    core, asked = TOKENIZERS[kind](), []
    for seed in range(6):
        documents = [text(100 * seed + number, 40) for number in range(60)]
        whole = core.encode("\n".join(documents), add_special_tokens=False).ids
        parts = list(token_stream.pieces(encoder(core, asked), iter(documents), "\n", piece=700, overlap=200))
        assert np.concatenate([part.ids for part in parts]).tolist() == whole
        assert len(parts) > 5
    assert max(asked) < 4 * 700


def test_a_window_grows_where_two_do_not_agree() -> None:
    core, asked = byte_level(CL100K), []
    documents = [text(1, 200), "".join(str(digit % 7) for digit in range(5000)), text(2, 200)]  # groups of three digits
    whole = core.encode("\n".join(documents), add_special_tokens=False).ids
    parts = list(token_stream.pieces(encoder(core, asked), documents, "\n", piece=500, overlap=101))
    assert np.concatenate([part.ids for part in parts]).tolist() == whole
    assert max(asked) > 1100  # of 601 where no window grows


@pytest.mark.parametrize("documents", [[], [""], ["", "", ""], ["a"], ["a" * 3000], ["x y " * 500, "", "z"]])
def test_few_and_empty_documents(documents: list[str]) -> None:
    core = byte_level(CL100K)
    parts = token_stream.pieces(encoder(core, []), documents, "\n\n", piece=100, overlap=40)
    found = np.concatenate([part.ids for part in parts]).tolist()
    assert found == core.encode("\n\n".join(documents), add_special_tokens=False).ids


@pytest.mark.parametrize("folder", [ROOT / "data/base_model/model", STORIES])
def test_real_tokenizers(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = dense_folder.load_tokenizer(folder)
    documents = json_lines.read(ROOT / "data/grammar/prose.jsonl")
    whole = tokenizer("\n".join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    expected = token_bytes.encode(tokenizer, "\n".join(documents))
    monkeypatch.setattr(token_stream.pieces, "__defaults__", (3000, 400))
    assert perplexity.tokenise(tokenizer, documents).tolist() == whole == expected.ids.tolist()
    found = token_bytes.joined(tokenizer, documents, "\n")
    assert found.ids.tolist() == whole and found.spans.tolist() == expected.spans.tolist()
    first = token_bytes.joined(tokenizer, documents, "\n", least=2000)
    assert 2000 <= len(first.ids) < 3 * 2000 and first.ids.tolist() == whole[: len(first.ids)]


def test_memory_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream.pieces, "__defaults__", (10_000, 1000))
    core = byte_level(CL100K)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    peaks = []
    for documents in (20, 80):
        tracemalloc.start()
        tokens = perplexity.tokenise(tokenizer, (text(number, 2000) for number in range(documents)))
        peaks.append(tracemalloc.get_traced_memory()[1] - 2 * tokens.nbytes)  # the pieces, and the whole
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
