"""fetch: what it refuses and in which order, what it copies, and the hub through a server of this test's own."""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy
import pandas
import pytest
import torch
from huggingface_hub import constants
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from tasks import fetch
from tasks.algorithms.errors import InputError
from tasks.models import dense_folder
from tasks.parameters import schema
from tasks.parameters.source_sections import Fetch
from tasks.sources import corpus_source, model_source, weight_check
from tests.support.paths import ROOT

OFF = {name: SimpleNamespace(enabled=False) for name in ("calibrate", "lora", "evaluate", "kv_cache")}
REVISION = "0123456789abcdef0123456789abcdef01234567"
TEXTS = ["The pump must stop.", "", "  \n", "Straße, naïve, 水"]
NO_HUB = {"hub": None, "revision": None}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "domain": "x"}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def make_fetch(tmp_path: Path, make_stage, model_folder: Path, corpus: Path):
    """make_fetch(model={…}, **corpora) -> the stage; whatever is not given is the small local one."""
    counter = iter(range(100))

    def make(model: dict | None = None, **corpora: dict):
        one = {"path": str(corpus), "field": "text", "config": None, "split": None, **NO_HUB}
        section = Fetch.model_validate(
            {
                "model": {"path": str(model_folder), **NO_HUB, **(model or {})},
                "corpora": {name: one | corpora.get(name, {}) for name in fetch.CORPORA},
            }
        )
        stage = make_stage({"fetch": section}, {}, out=f"out{next(counter)}")
        stage.input = Path  # every path is declared
        stage.everything = schema.load(ROOT / "params.yaml").model_copy(update=OFF)
        return stage

    return make


def refusal(stage) -> str:
    with pytest.raises(InputError) as caught:
        fetch.run(stage)
    message = str(caught.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture
def no_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("the weights were opened")

    monkeypatch.setattr(weight_check, "safe_open", refuse)


def test_copies_the_model_as_it_is(make_fetch, model_folder: Path) -> None:
    (model_folder / "README.md").write_text("not taken")
    (model_folder / "adapter_config.json").write_text("{}")
    (model_folder / "training_args.bin").write_bytes(b"not taken either")
    stage = make_fetch()
    fetch.run(stage)
    copied = sorted(path.name for path in stage.output("model").iterdir())
    assert copied == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in copied:
        copy, original = stage.output("model") / name, model_folder / name
        assert copy.read_bytes() == original.read_bytes()
        assert not os.path.samefile(copy, original)  # DVC makes its files read-only: not the user's
    model = dense_folder.load_dense(stage.output("model"))
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_corpora_are_normalised(make_fetch) -> None:
    stage = make_fetch()
    fetch.run(stage)
    for name in fetch.CORPORA:
        lines = (stage.output("corpora") / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [{"text": TEXTS[0]}, {"text": TEXTS[3]}]


def test_source_is_deterministic_and_true(make_fetch, model_folder: Path, corpus: Path) -> None:
    first, second = make_fetch(), make_fetch()
    fetch.run(first)
    fetch.run(second)
    text = first.output("source.json").read_text()
    assert text == second.output("source.json").read_text()
    source = json.loads(text)
    weights = (model_folder / "model.safetensors").read_bytes()
    assert source["files"]["model.safetensors"] == {
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert source["model"]["architecture"] == "LlamaForCausalLM"
    assert source["model"] | {"kind": "local", "path": str(model_folder)} == source["model"]
    test = source["corpora"]["test"]
    assert (test["rows"], test["empty_rows_dropped"], test["field"], test["path"]) == (2, 2, "text", str(corpus))


def test_a_sharded_model_stays_sharded(make_fetch, make_model, model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    make_model().save_pretrained(model_folder, max_shard_size="20KB")
    shards = sorted(path.name for path in model_folder.glob("*.safetensors"))
    assert len(shards) > 1
    stage = make_fetch()
    fetch.run(stage)
    assert sorted(path.name for path in stage.output("model").glob("*.safetensors")) == shards
    loaded, built = dense_folder.load_dense(stage.output("model")).state_dict(), make_model().state_dict()
    assert all(torch.equal(loaded[name], built[name]) for name in built)


@pytest.mark.parametrize(
    ("name", "write", "row"),
    [
        ("a.txt", lambda path: path.write_text("one\n\ntwo", encoding="utf-8"), 1),
        (
            "a.parquet",
            lambda path: pandas.DataFrame({"text": ["one", None, "two"], "n": [1, 2, 3]}).to_parquet(path),
            1,
        ),
        (
            "a.jsonl",
            lambda path: path.write_text('\ufeff{"text": "one"}\n\n{"text": null}\n{"text": "two"}', encoding="utf-8"),
            1,
        ),
    ],
)
def test_local_formats(make_fetch, tmp_path: Path, name: str, write, row: int) -> None:
    write(tmp_path / name)
    stage = make_fetch(test={"path": str(tmp_path / name)})
    fetch.run(stage)
    frame = pandas.read_json(stage.output("corpora") / "test.jsonl", lines=True)
    assert list(frame["text"]) == ["one", "two"]
    assert json.loads(stage.output("source.json").read_text())["corpora"]["test"]["empty_rows_dropped"] == row


CORPORA = {
    "missing": ("gone.jsonl", None, "fetch.corpora.test.path = {path} is no .jsonl, .parquet, .txt file; name one"),
    "suffix": ("a.csv", b"text\none\n", "fetch.corpora.test.path = {path} is no .jsonl, .parquet, .txt file; name one"),
    "no rows": ("a.jsonl", b"", "corpus test ({path}) is empty: 0 rows, none with text; name another"),
    "no text": ("a.txt", b"\n \n", "corpus test ({path}) is empty: 2 rows, none with text; name another"),
    "column": ("a.jsonl", b'{"body": "x"}\n', "{path}, line 1: no column `text`, only body; set `field`"),
    "json": ("a.jsonl", b'{"text": "x"}\n{"text": \n', "{path}, line 2: not valid JSON (Expecting value"),
    "list": ("a.jsonl", b'["x"]\n', "{path}, line 1: holds list, expected an object with `text`"),
    "type": ("a.jsonl", b'{"text": 5}\n', "line 1 of corpus test: `text` is int, expected text"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 of corpus test is no valid Unicode"),
    "latin-1": ("a.txt", "Straße".encode("latin-1"), "{path}: not valid UTF-8 after line 0; save it as UTF-8"),
    "parquet": ("a.parquet", b"PAR1", "{path} is no valid parquet file"),
}


@pytest.mark.parametrize("kind", CORPORA)
def test_bad_corpora(make_fetch, tmp_path: Path, no_weights_read, kind: str) -> None:
    name, content, sentence = CORPORA[kind]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refusal(make_fetch(test={"path": str(tmp_path / name)}))
    asked, declared = str(tmp_path / name), os.path.relpath(tmp_path / name)  # as in params.yaml, as in dvc.yaml
    assert message.startswith((sentence.format(path=asked), sentence.format(path=declared)))


def test_wrong_column_of_a_parquet_file(make_fetch, tmp_path: Path) -> None:
    pandas.DataFrame({"body": ["x"]}).to_parquet(tmp_path / "a.parquet")
    assert "no column `text`, only body; set `field`" in refusal(make_fetch(test={"path": str(tmp_path / "a.parquet")}))


CONFIGS = {
    "none": (lambda folder: (folder / "config.json").unlink(), "has no config.json, so it is no model folder"),
    "invalid": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds list, expected an object"),
    "architecture": (
        lambda folder: edit(folder / "config.json", architectures=["GPT2LMHeadModel"]),
        "the model's config.json names GPT2LMHeadModel; supported are LlamaForCausalLM, MistralForCausalLM",
    ),
    "code": (
        lambda folder: edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}),
        "the model's config.json has `auto_map`: it wants to run Python code of its own, which is never done",
    ),
    "nested code": (lambda folder: edit(folder / "config.json", text_config={"auto_map": {}}), "has `auto_map`"),
    "kernel": (
        lambda folder: edit(folder / "config.json", _attn_implementation="someone/kernel"),
        "the model's config.json asks for attention code from elsewhere",
    ),
    "tokenizer code": (
        lambda folder: edit(folder / "tokenizer_config.json", auto_map={}),
        "tokenizer_config.json has `auto_map`: it wants to run Python code, which is never done",
    ),
    "quantised": (
        lambda folder: edit(folder / "config.json", quantization_config={"bits": 4}),
        "the model is quantised already (`quantization_config` in its config.json)",
    ),
    "quantised beside": (
        lambda folder: (folder / "quantize_config.json").write_text("{}"),
        "the model is quantised already (quantize_config.json beside its weights)",
    ),
    "size": (
        lambda folder: edit(folder / "config.json", hidden_size="big"),
        "has hidden_size = 'big', expected a whole",
    ),
    "heads": (
        lambda folder: edit(folder / "config.json", num_attention_heads=0),
        "has num_attention_heads = 0, expected",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "the tokenizer can't be loaded"),
    "large tokenizer": (
        lambda folder: edit(folder / "config.json", vocab_size=95),
        "the tokenizer has 96 tokens, the model's embedding 95 rows (vocab_size)",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_refused_before_weights_are_read(make_fetch, model_folder: Path, no_weights_read, kind: str) -> None:
    alter, sentence = CONFIGS[kind]
    alter(model_folder)
    assert sentence in refusal(make_fetch())


def test_pickles_and_no_weights(make_fetch, model_folder: Path, no_weights_read) -> None:
    (model_folder / "model.safetensors").unlink()
    assert refusal(make_fetch()).endswith(
        "holds no model.safetensors and no model.safetensors.index.json; take a model with safetensors weights"
    )
    (model_folder / "pytorch_model.bin").write_bytes(b"\x80")
    assert "holds only pickled weights (pytorch_model.bin), which can run code" in refusal(make_fetch())


def test_a_folder_that_is_none(make_fetch, tmp_path: Path) -> None:
    assert refusal(make_fetch({"path": str(tmp_path / "gone")})).endswith("is no folder; name a folder with a model")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_no_link_out_of_the_folder(make_fetch, model_folder: Path, tmp_path: Path, no_weights_read, name: str) -> None:
    (model_folder / name).rename(tmp_path / "elsewhere")
    (model_folder / name).symlink_to(tmp_path / "elsewhere")
    assert "is a link out of the model folder" in refusal(make_fetch())


def test_a_link_within_the_folder_is_followed(make_fetch, model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "real")
    (model_folder / "model.safetensors").symlink_to("real")
    stage = make_fetch()
    fetch.run(stage)
    assert not (stage.output("model") / "model.safetensors").is_symlink()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/x.safetensors", "weights.bin", "*.safetensors", 5])
def test_an_index_that_leads_elsewhere(make_fetch, model_folder: Path, no_weights_read, name) -> None:
    (model_folder / model_source.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    message = refusal(make_fetch())
    assert "expected safetensors files of the model folder itself" in message or "has no `weight_map`" in message


def test_an_index_of_missing_shards(make_fetch, model_folder: Path, no_weights_read) -> None:
    (model_folder / model_source.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    assert "model.safetensors.index.json names gone.safetensors, which is not there" in refusal(make_fetch())


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP][3, :2] = torch.tensor([float("nan"), float("inf")])


WEIGHTS = {
    "nan": (poison, f"the weights hold NaN or infinity in {UP} (2 of 1536 values); fetch or train the model again"),
    "missing": (
        lambda tensors: tensors.pop(UP),
        f"the weights lack {UP}; weights and config.json don't belong together",
    ),
    "extra": (
        lambda tensors: tensors.update(extra=torch.ones(2)),
        "the weights have unexpected extra; weights and config",
    ),
    "shape": (
        lambda tensors: tensors.update({UP: torch.ones(4, 4)}),
        f"the weights' {UP} is [4, 4], config.json makes it [48, 32]; weights and config don't belong together",
    ),
    "type": (
        lambda tensors: tensors.update({UP: torch.ones(48, 32, dtype=torch.int8)}),
        f"the weights' {UP} is stored as I8, expected F64, F32, F16, BF16",
    ),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_bad_weights(make_fetch, model_folder: Path, kind: str) -> None:
    change, sentence = WEIGHTS[kind]
    rewrite(model_folder, change)
    assert refusal(make_fetch()).startswith(sentence)


def test_weights_that_are_no_safetensors(make_fetch, model_folder: Path) -> None:
    whole = (model_folder / "model.safetensors").read_bytes()
    (model_folder / "model.safetensors").write_bytes(whole[:-100])
    assert refusal(make_fetch()).startswith("model.safetensors is no whole safetensors file")


def test_tied_head_and_old_buffers_are_welcome(make_fetch, model_folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(model_folder, change)
    stage = make_fetch()
    fetch.run(stage)
    written, original = (load_file(folder / "model.safetensors") for folder in (stage.output("model"), model_folder))
    assert written.keys() == original.keys() > {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert all(torch.equal(tensor, original[name]) for name, tensor in written.items())


def test_a_tied_matrix_may_be_stored_under_the_heads_name(make_fetch, model_folder: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    before = dense_folder.load_dense(model_folder)
    rewrite(model_folder, rename)
    stage = make_fetch()
    fetch.run(stage)
    after = dense_folder.load_dense(stage.output("model"))
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    rewrite(model_folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert refusal(make_fetch()).startswith("the weights lack model.embed_tokens.weight, lm_head.weight")


def test_an_untied_head_must_be_there(make_fetch, model_folder: Path) -> None:
    edit(model_folder / "config.json", tie_word_embeddings=False)
    assert refusal(make_fetch()).startswith("the weights lack lm_head.weight")


@pytest.mark.parametrize("length, enough", [(36, True), (37, False)])  # one token per character, one for the newline
def test_a_corpus_shorter_than_one_window(make_fetch, no_weights_read, monkeypatch, length: int, enough: bool) -> None:
    stage = make_fetch()
    evaluate = SimpleNamespace(enabled=True, protocol="joined", length=length, stride=length)
    stage.everything = stage.everything.model_copy(update={"evaluate": evaluate})
    if enough:
        with pytest.raises(AssertionError, match="the weights were opened"):
            fetch.run(stage)
        return
    assert refusal(stage) == "corpus test has 36 tokens, 37 are needed; name a longer one, or lower evaluate.length"


def test_a_long_corpus_is_tokenised_only_as_far_as_needed(tmp_path: Path) -> None:
    corpus, asked = tmp_path / "train.jsonl", []

    def tokenizer(text: str, **_) -> dict:
        asked.append(text.count("\n") + 1)
        return {"input_ids": text.split()}

    corpus.write_text(json.dumps({"text": "two words"}) + "\n", encoding="utf-8")
    corpus.write_text(corpus.read_text(encoding="utf-8") * 10_000, encoding="utf-8")
    corpus_source.check_length(corpus, tokenizer, 300, "lora.length")
    assert asked == [64, 256]
    with pytest.raises(InputError, match="has 20000 tokens, 20001 are needed"):
        corpus_source.check_length(corpus, tokenizer, 20_001, "lora.length")
    assert asked[-1] == 10_000


class Hub(ThreadingHTTPServer):
    """As much of the hub's protocol as a snapshot needs: the tree of a commit, and its files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.status, self.gated = folder, 200, False
        self.asked: list[str] = []
        self.sent: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        self.server.sent.append(self.headers.get("user-agent"))
        if self.server.status != 200:
            self.reply(b"{}", self.server.status, {"X-Error-Code": "GatedRepo"} if self.server.gated else {})
        elif path == f"/api/models/a/model/tree/{REVISION}":
            self.reply(
                json.dumps([self.entry(file) for file in sorted(self.server.folder.iterdir())]).encode(), 200, {}
            )
        elif path == f"/api/models/a/model/revision/{REVISION}":
            names = [{"rfilename": file.name} for file in sorted(self.server.folder.iterdir())]
            self.reply(json.dumps({"id": "a/model", "sha": REVISION, "siblings": names}).encode(), 200, {})
        elif path.startswith(f"/a/model/resolve/{REVISION}/"):
            content = (self.server.folder / Path(path).name).read_bytes()
            self.reply(content, 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": REVISION})
        else:
            self.reply(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})

    def entry(self, file: Path) -> dict:
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}

    def reply(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Hub(model_folder)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


AT_HUB = {"hub": "a/model", "revision": REVISION}


@pytest.fixture
def no_preflight(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The small model fits no params.yaml of the project; what preflight was asked is kept."""
    asked: list[dict] = []
    monkeypatch.setattr(fetch.preflight, "check", lambda _, config, **named: asked.append({"config": config, **named}))
    return asked


def test_hub_equals_local(make_fetch, hub: Hub, model_folder: Path, no_preflight: list[dict]) -> None:
    (model_folder / "pytorch_model.bin").write_bytes(b"\x80")
    (model_folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    stage, local = make_fetch(AT_HUB), make_fetch()
    fetch.run(stage)
    fetch.run(local)
    source, expected = (json.loads(one.output("source.json").read_text()) for one in (stage, local))
    assert source["files"] == expected["files"]
    assert source["model"] | {"kind": "hub", **AT_HUB} == source["model"]
    assert "hf_secret" not in stage.output("source.json").read_text()
    asked = [line for line in hub.asked if "/resolve/" in line]
    assert not any(name in line for line in asked for name in (".bin", "consolidated"))
    first_weight = next(index for index, line in enumerate(asked) if ".safetensors" in line)
    assert sum("config.json" in line or "tokenizer.json" in line for line in asked[:first_weight]) >= 2
    assert no_preflight == [
        {"config": json.loads((model_folder / "config.json").read_text()), "tokenizer_size": 96, "stage": "fetch"}
    ]
    assert not any("torch" in (agent or "") for agent in hub.sent)  # telemetry names the libraries in use


def test_a_refused_hub_model_is_not_downloaded(make_fetch, hub: Hub, model_folder: Path) -> None:
    edit(model_folder / "config.json", architectures=["GPT2LMHeadModel"])
    assert "names GPT2LMHeadModel" in refusal(make_fetch(AT_HUB))
    assert not any("model.safetensors" in line and "index" not in line for line in hub.asked if "/resolve/" in line)


def test_pickles_on_the_hub(make_fetch, hub: Hub, model_folder: Path, no_preflight) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    assert refusal(make_fetch(AT_HUB)).startswith("a/model holds only pickled weights (pytorch_model.bin)")
    assert not any(".bin" in line for line in hub.asked)


def test_an_unknown_commit(make_fetch, hub: Hub) -> None:
    assert refusal(make_fetch(AT_HUB | {"revision": "f" * 40})) == (
        f"model a/model has no commit {'f' * 40}; copy the 40-digit one from its history"
    )


@pytest.mark.parametrize(
    ("status", "gated", "sentence"),
    [
        (401, True, "model a/model is gated: ask for access on its page, then `hf auth login`"),
        (403, True, "model a/model is gated: ask for access on its page, then `hf auth login`"),
        (401, False, f"the hub has no model a/model at {REVISION}, or it is private or gated"),
        (404, False, f"the hub has no model a/model at {REVISION}, or it is private or gated"),
        (418, False, "the hub answered 418 for model a/model; try again later"),
    ],
)
def test_a_hub_that_refuses(make_fetch, hub: Hub, status: int, gated: bool, sentence: str) -> None:
    hub.status, hub.gated = status, gated
    assert refusal(make_fetch(AT_HUB)).startswith(sentence)


def test_offline(make_fetch, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(make_fetch(AT_HUB)) == (
        "the hub can't be reached for model a/model; go online, or name a local folder or file"
    )


def test_offline_with_a_filled_cache(make_fetch, hub: Hub, no_preflight, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_fetch(AT_HUB), make_fetch(AT_HUB)
    fetch.run(first)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    fetch.run(second)
    assert len(hub.asked) == asked > 0
    assert second.output("source.json").read_bytes() == first.output("source.json").read_bytes()
    assert (second.output("model") / "model.safetensors").stat().st_size > 0


DATA = {"hub": "a/data", "revision": REVISION, "config": "small", "split": "test", "field": "body"}


def test_hub_data_sets_are_pinned(make_fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*positional, **named):
        calls.append((positional, named))
        return datasets.Dataset.from_dict({"body": TEXTS, "n": [1, 2, 3, 4]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    stage = make_fetch(test=DATA)
    fetch.run(stage)
    assert not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    assert calls == [(("a/data", "small"), {"split": "test", "revision": REVISION})]
    source = json.loads(stage.output("source.json").read_text())["corpora"]
    assert source["test"]["rows"] == 2 and source["test"]["hub"] == "a/data" and source["test"]["revision"] == REVISION
    assert source["test"]["sha256"] == source["train"]["sha256"]
    assert "no column `text`, only body, n" in refusal(make_fetch(test=DATA | {"field": "text"}))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (datasets.exceptions.DatasetNotFoundError("not there"), f"the hub has no data set a/data at {REVISION}"),
        (ConnectionError("no network"), "the hub can't be reached for data set a/data"),
        (
            ValueError("BuilderConfig 'small' not found.\nmore"),
            "data set a/data can't be loaded: BuilderConfig 'small' not found.",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "data set a/data can't be loaded: Dataset scripts"),
    ],
)
def test_data_sets_that_fail(
    make_fetch, monkeypatch: pytest.MonkeyPatch, no_weights_read, error: Exception, sentence: str
) -> None:
    def load(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert refusal(make_fetch(test=DATA)).startswith(sentence)


def test_telemetry_is_off() -> None:
    assert constants.HF_HUB_DISABLE_TELEMETRY


def test_a_type_that_torch_does_not_know(make_fetch, model_folder: Path) -> None:
    save_numpy({UP: numpy.ones(3, dtype=numpy.uint16)}, model_folder / "model.safetensors")
    assert "is stored as U16" in refusal(make_fetch())
