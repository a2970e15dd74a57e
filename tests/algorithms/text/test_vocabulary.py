"""Trimming a BPE vocabulary: what stays against naive definitions, and how the tokenizers library then encodes."""

import json
import random

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tasks.algorithms.errors import InputError
from tasks.algorithms.text import vocabulary

TRAINING = [
    "the pump must stop the pumps at once, stopping and pumping, then the thumping stops",
    "must they? they must: nobody understands understanding better than those who misunderstood",
    "the controller controls uncontrolled temperature controllers, temporarily temperate",
    "bananas and ananas, aaaaaaaa, abababab, mississippi sips",
]
UNSEEN = ["the 😀 jumps", "  naïve\tżółw ", "pumpstop", "<s>the</s> <s>", ""]


def byte_level(size=380, ignore_merges=False):
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TRAINING, trainer)
    return core


def sentencepiece(size=400):
    """As Llama 2: every pair of pieces that makes a piece is a merge, so a piece has several; words aren't split."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.train_from_iterator(TRAINING, trainers.BpeTrainer(vocab_size=size - 259, show_progress=False))
    pieces = sorted(core.get_vocab(), key=core.get_vocab().get)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    ids = {piece: number for number, piece in enumerate(names)}
    merges = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in ids and p[i:] in ids]
    merges.sort(key=lambda pair: ids["".join(pair)])
    full = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    full.normalizer = core.normalizer
    full.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    full.add_special_tokens(["<unk>", "<s>", "</s>"])
    full.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return full


def content(core):
    return json.loads(core.to_str())


def ids(core, text):
    return core.encode(text, add_special_tokens=False).ids


def counts(core, texts):
    return torch.bincount(torch.tensor([token for text in texts for token in ids(core, text)]), minlength=500)


CORES = [byte_level(), byte_level(ignore_merges=True), sentencepiece()]


def texts_of(seed):
    """Sentences of some of the words, and of parts of words."""
    words = " ".join(TRAINING).split()
    draw = random.Random(seed)
    chosen = draw.sample(words, 5)
    return [" ".join(draw.choices([*chosen, *(word[: draw.randint(1, 4)] for word in chosen)], k=6)) for _ in range(4)]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("seed", range(8))
def test_the_corpus_encodes_to_the_same_tokens(core, seed):
    texts = texts_of(seed)
    keep = vocabulary.kept(content(core), counts(core, texts), 1)
    trimmed = Tokenizer.from_str(json.dumps(vocabulary.trim(content(core), keep)))
    assert trimmed.get_vocab_size() == len(keep) < core.get_vocab_size()
    for text in texts:
        assert keep[ids(trimmed, text)].tolist() == ids(core, text)
    for text in [*UNSEEN, *TRAINING]:
        found, expected = ids(trimmed, text), ids(core, text)
        assert trimmed.decode(found, skip_special_tokens=False) == core.decode(expected, skip_special_tokens=False)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("min_count", [1, 2, 10**6])
def test_what_stays_is_what_was_asked_for_and_no_more(core, min_count):
    texts, names = texts_of(0), {number: token for token, number in core.get_vocab().items()}
    occurred = counts(core, texts)
    keep = vocabulary.kept(content(core), occurred, min_count, [core.token_to_id("mp")]).tolist()
    assert keep == sorted(set(keep))
    by_default = {n for n, token in names.items() if len(token) == 1 or token[0] == "<"}
    used = {number for number in names if occurred[number] >= min_count} | {core.token_to_id("mp")}
    assert by_default | used <= set(keep)
    for number in set(keep) - by_default - used:  # what is left is a part of a used token, for its merges
        assert any(names[number] in names[token] and number != token for token in used)
    if min_count == 10**6:
        assert set(keep) == by_default | {core.token_to_id("mp")}


@pytest.mark.parametrize("core", CORES)
def test_merges_stay_in_order_and_closed(core):
    keep = vocabulary.kept(content(core), counts(core, texts_of(1)), 1)
    before, after = content(core)["model"], vocabulary.trim(content(core), keep)["model"]
    stay = {token for token, number in before["vocab"].items() if number in keep.tolist()}
    assert after["merges"] == [pair for pair in before["merges"] if {*pair, "".join(pair)} <= stay]
    assert [before["vocab"][token] for token in after["vocab"]] == keep.tolist()
    assert list(after["vocab"].values()) == list(range(len(keep)))


@pytest.mark.parametrize("core", CORES)
def test_a_derivation_ends_in_the_token_that_the_library_makes(core):
    ranks = {tuple(pair): rank for rank, pair in enumerate(content(core)["model"]["merges"])}
    alone = Tokenizer(models.BPE(core.get_vocab(), [tuple(pair) for pair in content(core)["model"]["merges"]]))
    for token in core.get_vocab():
        made = vocabulary.derivation(token, ranks)
        reached = len(token) > 1 and token[0] != "<" and alone.encode(token).tokens == [token]
        assert made[-1:] == ([token] if reached else [])
        assert len(made) == (len(token) - 1 if reached else 0)


def test_of_several_ways_to_a_token_only_the_one_taken_counts():
    ranks = {("a", "b"): 0, ("b", "c"): 1, ("ab", "c"): 2, ("a", "bc"): 3, ("a", "a"): 4, ("aa", "a"): 5}
    assert vocabulary.derivation("abc", ranks) == ["ab", "abc"]
    assert vocabulary.derivation("aaa", ranks) == ["aa", "aaa"]
    assert vocabulary.derivation("aaaa", ranks) == vocabulary.derivation("cab", ranks) == []
    ranks |= {("a", "ab"): 6, ("aa", "b"): 7}
    tokens = ["a", "b", "c", "bc", "ab", "abc", "aa", "aaa", "aab", "<unk>"]
    model = {"type": "BPE", "unk_token": "<unk>", "vocab": {token: i for i, token in enumerate(tokens)}}
    model["merges"] = [" ".join(pair) for pair in ranks]  # as older files have them
    keep = vocabulary.kept({"model": model}, torch.tensor([0, 0, 0, 0, 0, 3, 0, 0, 4, 0]), 3)
    assert keep.tolist() == [0, 1, 2, 4, 5, 8, 9]
    assert vocabulary.trim({"model": model}, keep)["model"]["merges"] == ["a b", "ab c", "a ab"]


def test_ids_outside_the_model_follow():
    core = sentencepiece()
    core.add_tokens([AddedToken("<tool>", special=False), AddedToken("<pad>", special=True)])
    tool = core.token_to_id("<tool>")
    core.enable_padding(pad_id=core.token_to_id("<pad>"), pad_token="<pad>")
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(),
            processors.TemplateProcessing(single="<s> $A <tool>", special_tokens=[("<s>", 1), ("<tool>", tool)]),
        ]
    )
    text = texts_of(2)[0] + "<tool>" + texts_of(2)[1]
    keep = vocabulary.kept(content(core), counts(core, [text]), 1)
    trimmed = Tokenizer.from_str(json.dumps(vocabulary.trim(content(core), keep)))
    for name in ("<unk>", "<s>", "</s>", "<tool>", "<pad>"):
        assert keep[trimmed.token_to_id(name)] == core.token_to_id(name)
    assert trimmed.token_to_id("<pad>") == trimmed.padding["pad_id"] == len(keep) - 1
    assert keep[trimmed.encode(text).ids].tolist() == core.encode(text).ids
    assert trimmed.encode(text).ids[-1] == trimmed.token_to_id("<tool>")


@pytest.mark.parametrize("kind", ["BertProcessing", "RobertaProcessing"])
def test_the_processors_of_older_models_follow(kind):
    core = byte_level()
    core.add_special_tokens(["<cls>", "<sep>"])  # behind the model's own ids
    core.post_processor = getattr(processors, kind)(*((name, core.token_to_id(name)) for name in ("<sep>", "<cls>")))
    keep = vocabulary.kept(content(core), counts(core, texts_of(3)), 1)
    trimmed = Tokenizer.from_str(json.dumps(vocabulary.trim(content(core), keep)))
    assert trimmed.token_to_id("<sep>") == len(keep) - 1 < core.token_to_id("<sep>")
    text = texts_of(3)[0]
    assert keep[trimmed.encode(text).ids].tolist() == core.encode(text).ids
    assert trimmed.encode(text).tokens[0] == "<cls>"


def test_the_ids_of_a_config_follow():
    config = {
        "bos_token_id": 3,
        "eos_token_id": [5, 3],
        "pad_token_id": -1,
        "sep_token_id": None,
        "suppress_tokens": [9],
        "bad_words_ids": [[3, 5], [9]],
        "sequence_bias": None,
        "hidden_size": 9,
    }
    assert sorted(vocabulary.named_ids(config)) == [3, 3, 3, 5, 5, 9, 9]
    assert vocabulary.renumber(config, torch.tensor([0, 3, 5, 9])) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 1],
        "pad_token_id": -1,
        "sep_token_id": None,
        "suppress_tokens": [3],
        "bad_words_ids": [[1, 2], [3]],
        "sequence_bias": None,
        "hidden_size": 9,
    }
    described = {"added_tokens_decoder": {"5": {"content": "x"}}, "bos_token": "<s>"}
    assert vocabulary.named_ids(described) == [5]
    renumbered = vocabulary.renumber(described, torch.tensor([2, 5]))
    assert renumbered == {"added_tokens_decoder": {"1": {"content": "x"}}, "bos_token": "<s>"}


def test_ids_in_a_form_that_is_not_known_are_refused():
    with pytest.raises(InputError, match="forced_decoder_ids = .* remove it"):
        vocabulary.named_ids({"forced_decoder_ids": [[1, 5]]})


@pytest.mark.parametrize("model", ["Unigram", "WordPiece", "WordLevel", None])
def test_other_models_are_refused(model):
    with pytest.raises(InputError, match=f"model is {model}, only BPE .*vocabulary.enabled to false"):
        vocabulary.check({"model": {"type": model, "vocab": {}}})


@pytest.mark.parametrize(
    "key, value", [("continuing_subword_prefix", "##"), ("end_of_word_suffix", "</w>"), ("dropout", 0.1)]
)
def test_other_kinds_of_bpe_are_refused(key, value):
    with pytest.raises(InputError, match=f"{key} = {value!r}"):
        vocabulary.check({"model": {"type": "BPE", "vocab": {}, "merges": [], key: value}})


def test_an_unknown_post_processor_is_refused():
    with pytest.raises(InputError, match="post-processor is New"):
        vocabulary.check({"model": {"type": "BPE"}, "post_processor": {"type": "New"}})


@pytest.mark.parametrize("rows", [200, 379])
def test_ids_beyond_the_embedding_are_refused(rows):
    core = byte_level()
    with pytest.raises(InputError, match=f"ids from 0 to 379 are in use, but the embedding has {rows} rows"):
        vocabulary.kept(content(core), torch.ones(rows, dtype=torch.int64), 1, [379])
