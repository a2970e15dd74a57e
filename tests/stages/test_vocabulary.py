"""The stage vocabulary: rows, ids and texts of the trimmed folder against the original's, on random and real models."""

import json
import math

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tasks import vocabulary as stage_module
from tasks.algorithms.errors import InputError
from tasks.algorithms.scoring import likelihood, perplexity, protocols
from tasks.algorithms.text import vocabulary
from tasks.models import dense_folder, model_files
from tasks.runtime import files
from tests.support.paths import SHARED, STORIES, STORIES_TEXT

TEXTS = ["The pump must stop at once, and the pumps too.", "Pumping stops the pump!", "<|end|> naïve pumps"]
UNSEEN = ["Zażółć 😀👩‍👩‍👧 <|end|>x", "  \t\n\r\n ", "Quantum jumps: 12,345", "", "\u0000\ufffde\u0301"]


@pytest.fixture
def folder(tmp_path, make_model):
    """folder(architecture, **config) -> a random model with 40 rows without a token and a byte-level BPE."""

    def make(architecture="LlamaForCausalLM", dtype=torch.float32, **config):
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
        core.train_from_iterator([*TEXTS, "jumping quantum understood misunderstanding quanta"], trainer)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
        )
        end, pad = tokenizer.convert_tokens_to_ids(["<|end|>", "<|pad|>"])
        sizes = {"vocab_size": len(tokenizer) + 40, "eos_token_id": end, "pad_token_id": pad, "bos_token_id": end}
        model = make_model(architecture, **{**sizes, **config}).to(dtype)
        model.generation_config.eos_token_id = [end, 350]  # the second has no token
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


@pytest.fixture
def make(tmp_path, make_stage):
    """make(model folder, corpus file or texts, **params) -> the stage, ready to run."""

    def make(model, corpus=TEXTS, out="out", **params):
        corpora = tmp_path / "corpora"
        corpora.mkdir(exist_ok=True)
        rows = "".join(json.dumps({"text": text}) + "\n" for text in corpus)
        (corpora / "train.jsonl").write_text(rows, encoding="utf-8")
        params = {"corpus": "train", "min_count": 1, **params}
        return make_stage({"vocabulary": params}, {"fetch/model": model, "fetch/corpora": corpora}, out)

    return make


def run(stage):
    stage_module.run(stage)
    return stage.output("model"), json.loads(stage.output("tokens.json").read_text())


def stories(name):
    path = STORIES if name == "stories260k" else SHARED / "models" / name
    if not path.exists():
        pytest.skip(f"needs ../shared: {name}, 2.7 MB")
    rows = STORIES_TEXT.read_text(encoding="utf-8").splitlines()
    return path, [json.loads(row)["text"] for row in rows[:20]]


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def compare(before, after, record, texts):
    """Everything that must be as it was, from the two folders alone."""
    keep = torch.tensor(record["kept"])
    old, new = dense_folder.load_tokenizer(before), dense_folder.load_tokenizer(after)
    if record["min_count"] == 1:
        joined = "\n".join(texts)
        assert keep[encode(new, joined)].tolist() == encode(old, joined)
    assert [new.convert_ids_to_tokens(i) for i in range(len(keep))] == old.convert_ids_to_tokens(keep.tolist())
    for text in [*texts, *UNSEEN]:
        assert new.decode(encode(new, text)) == old.decode(encode(old, text))
    large, small = dense_folder.load_dense(before), dense_folder.load_dense(after)
    ids = torch.tensor([encode(new, "\n".join(texts))[:64]])
    with torch.no_grad():
        expected, found = large(keep[ids]).logits[..., keep], small(ids).logits
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    hidden = [model.model(each).last_hidden_state for model, each in ((large, keep[ids]), (small, ids))]
    assert torch.equal(*hidden)
    same = small.get_input_embeddings().weight is small.get_output_embeddings().weight
    assert same == large.config.tie_word_embeddings


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "PhiForCausalLM"])
def test_the_trimmed_model_answers_as_the_original(architecture, dtype, tied, folder, make):
    before = folder(architecture, dtype, tie_word_embeddings=tied)
    after, record = run(make(before))
    compare(before, after, record, TEXTS)
    keep = torch.tensor(record["kept"])
    tensors, smaller = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert tensors.keys() == smaller.keys()
    for name, tensor in tensors.items():
        rows = name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # Phi's head has a bias
        expected = tensor[keep] if rows else tensor
        assert smaller[name].dtype == dtype
        assert torch.equal(smaller[name].view(torch.uint8), expected.view(torch.uint8))
    with safe_open(before / "model.safetensors", "pt") as one, safe_open(after / "model.safetensors", "pt") as other:
        assert one.metadata() == other.metadata()


def test_counts_and_ids_are_those_of_the_corpus(folder, make):
    before = folder()
    after, record = run(make(before))
    old, new = dense_folder.load_tokenizer(before), dense_folder.load_tokenizer(after)
    ids = encode(old, "\n".join(TEXTS))
    assert record["counts"] == [ids.count(number) for number in record["kept"]]
    assert set(ids) | {350} <= set(record["kept"])  # 350: a row that generation_config.json names
    assert set(range(len(old), len(old) + 40)) & set(record["kept"]) == {350} - set(range(len(old)))
    config, generation = (json.loads((after / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    end, pad = new.convert_tokens_to_ids(["<|end|>", "<|pad|>"])
    assert (new.eos_token_id, new.pad_token_id) == (end, pad)
    assert (config["vocab_size"], config["eos_token_id"]) == (len(record["kept"]), end)
    assert (config["bos_token_id"], config["pad_token_id"]) == (end, pad)
    assert generation["eos_token_id"] == [end, record["kept"].index(350)]
    assert record["kept"][end] == old.eos_token_id != end
    assert record["corpus_tokens"] == {"before": len(ids), "after": len(ids)}


def test_bytes_saved_are_those_of_the_files(folder, make):
    before = folder(tie_word_embeddings=False)
    after, record = run(make(before))
    rows = record["tokens"]["before"] - record["tokens"]["after"]
    assert rows > 40
    assert record["bytes_saved"]["embedding"] == rows * 2 * 32 * 4
    sizes = {
        when: sum(path.stat().st_size for path in at.iterdir()) for when, at in (("before", before), ("after", after))
    }
    assert record["bytes"] == sizes
    files = [(each / "tokenizer.json").stat().st_size for each in (before, after)]
    assert record["bytes_saved"]["tokenizer"] == files[0] - files[1] > 0


def test_rare_tokens_go_and_texts_still_come_back(folder, make, tmp_path):
    before = folder()
    after, record = run(make(before, min_count=2))
    usual = run(make(before, out="usual"))[1]
    assert set(record["kept"]) < set(usual["kept"])
    assert record["corpus_tokens"]["after"] > record["corpus_tokens"]["before"]
    compare(before, after, record, TEXTS)
    new = dense_folder.load_tokenizer(after)
    for text in [*TEXTS, *UNSEEN]:
        assert new.decode(encode(new, text)) == text
    assert math.isfinite(bits(after, TEXTS, 16))


def bits(folder, texts, length):
    """Bits per byte of a folder's model on texts."""
    model, tokenizer = dense_folder.load_dense(folder), dense_folder.load_tokenizer(folder)
    prepared = likelihood.prepare(protocols.protocol("joined", length, length), tokenizer, texts)
    return likelihood.score(model, prepared).bits_per_byte


@pytest.mark.parametrize("min_count", [1, 2])
@pytest.mark.parametrize("name", ["stories260k", "story-656k"])
def test_real_models(name, min_count, make):
    before, texts = stories(name)
    after, record = run(make(before, texts, min_count=min_count))
    assert record["bytes_saved"]["embedding"] > 0
    compare(before, after, record, texts)
    known, found = (bits(each, texts[:6], 128) for each in (before, after))
    if min_count == 1:  # the same tokens with fewer to choose from: the probability of the others is shared out
        assert known - 0.05 < found <= known
    else:  # the model sees text in smaller tokens than it was trained on
        assert 0.9 * known < found < 2 * known


def test_shards_without_embedding_are_passed_on(folder, make):
    before = folder()
    tensors = load_file(before / "model.safetensors")
    (before / "model.safetensors").unlink()
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        parts["a.safetensors" if "embed" in name or ".0." in name else "b.safetensors"][name] = tensor
    for name, part in parts.items():
        save_file(part, before / name, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files.write_json(before / "model.safetensors.index.json", index)
    after, record = run(make(before))
    compare(before, after, record, TEXTS)
    assert (after / "b.safetensors").read_bytes() == (before / "b.safetensors").read_bytes()
    index = json.loads((after / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == weight_map
    assert index["metadata"]["total_size"] == total - record["bytes_saved"]["embedding"]


def test_stale_copies_of_the_vocabulary_are_left_out(folder, make):
    before = folder()
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"):
        (before / name).write_text("{}")
    after, _ = run(make(before))
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in after.iterdir()} == names


def test_the_same_inputs_give_the_same_bytes_and_a_second_trim_nothing(folder, make, tmp_path):
    before = folder()
    after, record = run(make(before, out="a"))
    run(make(before, out="b"))
    again, second = run(make(after, out="c"))
    for path in after.iterdir():
        assert (tmp_path / "b/model" / path.name).read_bytes() == path.read_bytes()
        if path.name != "tokenizer_config.json":  # notes that it was loaded from a folder
            assert (again / path.name).read_bytes() == path.read_bytes()
    assert second["kept"] == list(range(len(record["kept"])))
    assert second["bytes_saved"] == {"embedding": 0, "tokenizer": 0}


def test_off_passes_the_bytes_on(model_folder, make, tmp_path):
    stage_module.skip(make(model_folder))
    for path in model_folder.iterdir():
        assert (tmp_path / "out/model" / path.name).read_bytes() == path.read_bytes()
    record = json.loads((tmp_path / "out/tokens.json").read_text())
    size = model_files.stored_bytes(model_folder)
    assert record == {
        "enabled": False,
        "tokens": {"before": 96, "after": 96},
        "bytes": {"before": size, "after": size},
        "bytes_saved": {"embedding": 0, "tokenizer": 0},
    }


def test_another_tokenizer_is_refused_before_the_weights_are_read(model_folder, make):
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="WordLevel, only BPE can be trimmed: set vocabulary.enabled to false"):
        stage_module.run(make(model_folder))


def test_a_tokenizer_in_python_is_refused(folder, make, monkeypatch):
    class Own:
        is_fast = False

    before = folder()
    monkeypatch.setattr(dense_folder, "load_tokenizer", lambda path: Own())
    with pytest.raises(InputError, match="Own is no tokenizer of the tokenizers library"):
        stage_module.run(make(before))


def without_merges(trimmed):
    trimmed["model"]["merges"] = []


def without_decoder(trimmed):
    trimmed["decoder"] = None


@pytest.mark.parametrize(
    "harm, min_count, match",
    [
        (without_merges, 1, "encodes the corpus to"),
        (without_decoder, 1, "of a text of which"),
        (without_merges, 2, None),
    ],
)
def test_the_stage_compares_its_result(harm, min_count, match, folder, make, monkeypatch):
    trim = vocabulary.trim

    def harmed(content, keep):
        trimmed = trim(content, keep)
        harm(trimmed)
        return trimmed

    monkeypatch.setattr(vocabulary, "trim", harmed)
    stage = make(folder(), min_count=min_count)
    if match is None:  # other tokens, but the same text
        return stage_module.run(stage)
    with pytest.raises(InputError, match=match):
        stage_module.run(stage)


def test_other_tokens_other_texts_and_other_logits_are_noticed(folder, make):
    before = folder()
    after, record = run(make(before))
    keep = torch.tensor(record["kept"])
    old, new = dense_folder.load_tokenizer(before), dense_folder.load_tokenizer(after)
    ids = perplexity.tokenise(new, TEXTS)
    wrong = ids.clone()
    wrong[3] = 0
    with pytest.raises(InputError, match="encodes the corpus"):
        stage_module.check_tokens(perplexity.tokenise(old, TEXTS), wrong, keep)
    with pytest.raises(InputError, match="encodes the corpus"):
        stage_module.check_tokens(perplexity.tokenise(old, TEXTS), ids[:-1], keep)
    new.backend_tokenizer.decoder = decoders.Fuse()
    with pytest.raises(InputError, match="of a text of which the original makes 'The pump"):
        stage_module.check_texts(old, new, TEXTS[:1])
    tensors = load_file(after / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] *= 1.01
    save_file(tensors, after / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="logits differ from the original's by"):
        stage_module.check_logits(before, after, ids, keep)
