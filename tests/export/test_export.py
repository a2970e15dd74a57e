"""Exports run in their engines and compared with the PyTorch model; what they hold, with the package's codes."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.quantisation import rounding
from tasks.export import export, source_model
from tasks.models import dense_folder
from tasks.models.tokenizer_files import copy_tokenizer
from tasks.packed import packed_folder, reader
from tasks.packed.model_config import clean
from tasks.packed.sizes import component_bytes
from tasks.packed.stored_model import Linear, Model
from tasks.packed.writer import save
from tasks.runners import engines
from tests.benchmarks import engines as benchmark
from tests.support.paths import ROOT

PACKAGE, TEST = ROOT / "data/package/model", ROOT / "data/corpus/test.jsonl"
BASE = ROOT / "data/base_model/model"
LENGTH, NEW = 48, 24
CASES = {
    "plain": {},
    "adapter": {"rank": 3, "pattern": "2:4"},
    "three bits": {"bits": 3, "group": 64, "embedding": 8},
    "eight bits": {"bits": 8, "group": 16, "embedding": 16},
    "zero points": {"zeros": True, "rank": 2, "pattern": "unstructured"},
    "odd groups": {"group": 8, "order": True},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "tied": False, "rank": 1},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "bits": 2, "config": {"head_dim": 32}},
    "mistral": {"architecture": "MistralForCausalLM", "bits": 5, "config": {"sliding_window": None}},
    "stretched": {
        "config": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        }
    },
}
"""What a random package holds -> how it differs from 4 bits in groups of 32 with a tied embedding of 4 bits."""


@pytest.fixture(scope="module")
def tokenizer(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pack(tokenizer, tmp_path_factory):
    """pack(case) -> a packed folder of a random model of two blocks."""
    made = {}

    def make(case):
        if case not in made:
            made[case] = _random_package(tmp_path_factory.mktemp("packed"), tokenizer, **CASES[case])
        return made[case]

    return make


def _random_package(folder, tokenizer, architecture="LlamaForCausalLM", tied=True, embedding=4, config=(), **settings):
    kind = getattr(transformers, architecture)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 257,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**sizes | dict(config))).eval()
        for name, tensor in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # transformers starts them at 0 and 1
                tensor.data += 0.1 * torch.randn_like(tensor)
        blocks = [
            {name: _linear(linear, **settings) for name, linear in block.items()}
            for block in families.linears_by_block(model)
        ]
    described = families.of_model(model)
    tables = [model.get_submodule(name).weight.detach().half() for name in (described.embedding, described.head)]
    coded = [table if embedding == 16 else rounding.quantise(table, embedding, 32) for table in tables]
    content = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [architecture]}
    taken = {f"{name}.{part}" for block in blocks for name in block for part in ("weight", "bias")}
    taken |= {f"{described.embedding}.weight", f"{described.head}.weight"}
    rest = {name: tensor.detach().half() for name, tensor in model.named_parameters() if name not in taken}
    save(Model(clean(content), blocks, coded[0], None if tied else coded[1], rest), folder)
    copy_tokenizer(tokenizer, folder)
    return folder


def _linear(linear, bits=4, group=32, pattern="dense", zeros=False, order=False, rank=0):
    weight = linear.weight.detach()
    rows, cols = weight.shape
    keep = None
    if pattern == "2:4":
        top = weight.abs().view(rows, -1, 4).topk(2).indices
        keep = torch.zeros(rows, cols // 4, 4, dtype=torch.bool).scatter_(2, top, True).view(rows, cols)
    elif pattern == "unstructured":
        keep = weight.abs() > 0.1
    coded = rounding.quantise(weight if keep is None else weight * keep, bits, group)
    codes = (coded.codes.short() + 2 ** (bits - 1)).to(torch.uint8)
    made = Linear(codes=codes, scales=coded.scales, bits=bits, group_size=group, keep=keep, pattern=pattern)
    if zeros:
        made.zeros = torch.randint(0, 2**bits, made.scales.shape, dtype=torch.uint8)
        made.codes[~keep] = made.zeros.repeat_interleave(group, dim=1)[~keep]
    if order:
        made.group_index = (torch.arange(cols) // group).flip(0).to(torch.int32)
    if linear.bias is not None:
        made.bias = linear.bias.detach().half()
    if rank:
        factors = torch.randn(rank, cols) / 20, torch.randn(rank, rows) / 20
        made.adapter = tuple(rounding.quantise(factor, 8, 32) for factor in factors)
    return made


@pytest.fixture(scope="module")
def exported(pack, tmp_path_factory):
    """exported(case, kind) -> (package, exported folder)."""
    made = {}

    def make(case, kind):
        if (case, kind) not in made:
            out = tmp_path_factory.mktemp("exported") / "model"
            report = export.export(pack(case), kind, out)
            assert report == json.loads((out / "export.json").read_text(encoding="utf-8"))
            made[case, kind] = pack(case), out
        return made[case, kind]

    return make


def windows_of(folder, count=3):
    size = packed_folder.config(folder)["vocab_size"]
    return list(np.random.default_rng(0).integers(0, size, (count, LENGTH)))


def packages(kind):
    """Skip where the engine of an export isn't installed."""
    names = ("gguf", "llama_cpp") if kind.startswith("gguf") else ("onnx", "onnxruntime_genai", "onnxscript")
    for name in names:
        pytest.importorskip(name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["onnx-int4", "gguf-f32"])
def test_engines_that_compute_in_float32_give_the_same_logits_and_greedy_tokens(exported, case, kind):
    packages(kind)
    folder, out = exported(case, kind)
    ours, theirs = engines.load(folder), engines.load(out)
    for window in windows_of(folder):
        a, b = ours.logits(window), theirs.logits(window)
        # the head's values are rounded to float16 in PyTorch, and not in MatMulNBits
        assert np.abs(a - b).max() < 2e-3 * np.abs(a).max()
    prompts = np.random.default_rng(1).integers(0, 257, (20, 8))
    same = (ours.generate(prompts, NEW) == theirs.generate(prompts, NEW)).all(axis=1)
    for prompt in prompts[~same]:  # a tie, but for what float32 rounds
        assert export._gap(ours, theirs, prompt) < 1e-2


@pytest.mark.parametrize("kind", ["onnx-int4", "onnx-int8", "gguf"])
def test_perplexity_is_within_1_percent(exported, kind):
    packages(kind)
    folder, out = exported("adapter", kind)
    ours, theirs = engines.load(folder), engines.load(out)
    windows = [ours.generate(window[None, :4], LENGTH)[0] for window in windows_of(folder)]  # likely text
    assert engines.perplexity(theirs, windows) == pytest.approx(engines.perplexity(ours, windows), rel=0.01)


def test_perplexity_is_that_of_pytorch_s_cross_entropy(pack):
    folder = pack("adapter")
    engine, windows = engines.load(folder), windows_of(folder)
    model, losses = reader.load_model(folder), []
    for window in torch.tensor(np.stack(windows)):
        with torch.no_grad():
            losses.append(F.cross_entropy(model(window[None]).logits[0, :-1], window[1:], reduction="none"))
    assert engines.perplexity(engine, windows) == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)


def test_greedy_tokens_are_those_of_generate(pack):
    folder = pack("adapter")
    ids = np.random.default_rng(2).integers(1, 257, (4, 8))
    model = reader.load_model(folder)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(torch.tensor(ids), **settings)[:, 8:]
    assert np.array_equal(engines.load(folder).generate(ids, NEW), expected)


@pytest.mark.parametrize("kind", ["onnx-int4", "gguf-f32"])
def test_sequences_generated_side_by_side_are_those_generated_alone(exported, kind):
    packages(kind)
    _, out = exported("adapter", kind)
    engine = engines.load(out)
    ids = np.random.default_rng(2).integers(1, 257, (4, 8))
    alone = [engine.generate(row[None], NEW)[0] for row in ids]
    assert np.array_equal(engine.generate(ids, NEW), alone)


@pytest.mark.parametrize("case", ["plain", "adapter", "three bits", "eight bits", "zero points", "qwen3"])
def test_the_graph_holds_the_package_s_codes(exported, case):
    packages("onnx-int4")
    from tasks.export import onnx_format

    folder, out = exported(case, "onnx-int4")
    found = onnx_format.codes(out)
    for index, block in reader.stream(folder):
        name = f"model.layers.{index}"
        attention = [block[f"{name}.self_attn.{side}_proj"] for side in "qkv"]
        expected = {f"/{name.replace('model.', 'model/')}/attn/qkv_proj/MatMul": attention}
        for part, module in (("attn/o", "self_attn.o"), *((f"mlp/{x}", f"mlp.{x}") for x in ("gate", "up", "down"))):
            expected[f"/{name.replace('model.', 'model/')}/{part}_proj/MatMul"] = [block[f"{name}.{module}_proj"]]
        for place, linears in expected.items():
            codes = np.concatenate([linear.codes.numpy().astype(int) for linear in linears])
            bits, wide = linears[0].bits, 4 if linears[0].bits <= 4 else 8
            shift = 0 if linears[0].zeros is not None else 2 ** (wide - 1) - 2 ** (bits - 1)
            assert np.array_equal(found[place], codes + shift), place


@pytest.mark.parametrize("case", ["plain", "adapter", "three bits", "zero points", "qwen3", "mistral"])
def test_the_gguf_file_holds_the_package_s_codes(exported, case):
    packages("gguf")
    from tasks.export import gguf_format

    folder, out = exported(case, "gguf")
    found, config = gguf_format.steps(out), packed_folder.config(folder)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    places = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    places |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down"}
    for index, block in reader.stream(folder):
        for module, place in places.items():
            linear = block[f"model.layers.{index}.{module}"]
            exact = np.rint((linear.values() / linear.scales.float().repeat_interleave(linear.group_size, 1)).numpy())
            got = found[f"blk.{index}.{place}.weight"]
            if place in ("attn_q", "attn_k") and case != "qwen3":  # neighbours of a pair go to the two halves of a head
                back = np.empty_like(got)
                for row in range(len(got)):
                    head, inside = divmod(row, size)
                    back[head * size + inside // 2 + (inside % 2) * size // 2] = got[row]
                got = back
            assert np.array_equal(got, exact), place


def test_rounding_activations_to_8_bits_explains_what_llama_cpp_computes_otherwise(exported):
    """The engine's logits after one token against those of PyTorch whose linears round their inputs as Q8_0 does.

    After one: with more, a value that lies on the other side of a rounding boundary changes all that follows.
    """
    packages("gguf")
    import gguf

    folder, out = exported("plain", "gguf")
    model = reader.load_model(folder)

    def rounded(module, arguments):
        x = arguments[0]
        blob = gguf.quantize(x.numpy().reshape(-1, x.shape[-1]), gguf.GGMLQuantizationType.Q8_0)
        return torch.from_numpy(gguf.dequantize(blob, gguf.GGMLQuantizationType.Q8_0)).reshape(x.shape)

    tokens = np.arange(1, 40)
    plain = np.concatenate([engines.load(folder).logits(token[None]) for token in tokens])
    for module in [*families.block_linears(model).values(), model.get_output_embeddings()]:
        module.register_forward_pre_hook(rounded)
    with torch.inference_mode():
        expected = model(torch.tensor(tokens)[:, None]).logits[:, 0].numpy()
    engine = engines.load(out)
    found = np.concatenate([engine.logits(token[None]) for token in tokens])
    ratio = np.abs(found - expected).mean(axis=1) / np.abs(found - plain).mean(axis=1)
    assert np.median(ratio) < 0.1


@pytest.mark.parametrize("kind", ["onnx-int4", "onnx-int8", "gguf"])
def test_bytes_are_those_of_the_files_and_the_same_each_time(exported, tmp_path, kind):
    packages(kind)
    folder, out = exported("adapter", kind)
    report = json.loads((out / "export.json").read_text(encoding="utf-8"))
    sizes = {path.name: path.stat().st_size for path in out.iterdir() if path.name != "export.json"}
    assert {name: file["bytes"] for name, file in report["files"].items()} == sizes
    assert report["bytes"]["export"] == sum(sizes.values()) == sum(report["components"]["export"].values())
    assert report["bytes"]["source"] == sum(path.stat().st_size for path in folder.iterdir())
    assert min(report["components"]["export"].values()) >= 0
    again = export.export(folder, kind, tmp_path / "again")
    assert again["files"] == report["files"]


EXACT = {
    "onnx-int4": {"zeros at 2:4": True, "scales": True, "head": False, "adapter": True, "rotary embedding": True},
    "onnx-int8": {"zeros at 2:4": True, "codes and scales": False, "adapter": False},
    "gguf": {"zeros at 2:4": True, "scales": True, "activations": False, "adapter": True},
    "gguf-f32": {"zeros at 2:4": True, "codes and scales": True, "adapter": True},
}


@pytest.mark.parametrize("kind", EXACT)
def test_what_was_densified_or_merged_is_said_with_its_bytes(exported, kind):
    packages(kind)
    folder, out = exported("adapter", kind)
    report = json.loads((out / "export.json").read_text(encoding="utf-8"))
    found, stored = report["changes"], component_bytes(folder)
    assert EXACT[kind].items() <= {what: change["exact"] for what, change in found.items()}.items()
    ours = report["components"]["export"]
    assert found["zeros at 2:4"]["bytes"] == ours["values"] - stored["values"] - stored["positions"] > 0
    assert found["adapter"]["bytes"] == ours["adapter"] - stored["adapter"]
    if kind == "onnx-int8":
        assert found["adapter"]["bytes"] == -stored["adapter"] < 0  # it is merged
        assert found["tied head"]["bytes"] == ours["embedding"] - stored["embedding"] > 0
    if kind == "gguf":
        assert found["activations"]["bytes"] == 0


def test_codes_of_4_bits_take_half_a_byte_and_scales_two(exported):
    packages("onnx-int4")
    folder, out = exported("adapter", "onnx-int4")
    report = json.loads((out / "export.json").read_text(encoding="utf-8"))
    weights = sum(linear.codes.numel() for _, block in reader.stream(folder) for linear in block.values())
    assert report["components"]["export"]["values"] == weights // 2
    assert report["components"]["export"]["scales"] == 2 * weights // 32


def test_a_check_compares_both_on_a_text(pack, tmp_path):
    packages("onnx-int4")
    rows = [{"text": f"The pump {n} shall start within {n} seconds and report to the operator."} for n in range(40)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = export.export(pack("adapter"), "onnx-int4", tmp_path / "out", text)
    found = report["check"]
    assert found["prompts"] == 20 and abs(found["perplexity"]["change"]) < 1e-3
    assert found["widest_gap"] < 1e-2 and found["largest_logit_difference"] > 0


def test_llama_cpp_tokenises_as_the_model_does(tmp_path):
    packages("gguf")
    import llama_cpp

    out = tmp_path / "out"
    export.export(BASE, "gguf", out)
    model = llama_cpp.Llama(str(out / engines.GGUF), vocab_only=True, verbose=False)
    tokenizer = dense_folder.load_tokenizer(BASE)
    for text in ("The pump shall stop within 250 ms.", "it's 3.5 °C;  two  blanks\n\nand lines", "naïve – ½ %"):
        assert model.tokenize(text.encode(), add_bos=False) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_genai_tokenises_as_the_model_does(tmp_path):
    packages("onnx-int4")
    import onnxruntime_genai

    export.export(BASE, "onnx-int4", tmp_path / "out")
    engine = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(tmp_path / "out")))
    tokenizer = dense_folder.load_tokenizer(BASE)
    for text in ("The pump shall stop within 250 ms.", "it's 3.5 °C;  two  blanks\n\nand lines"):
        assert list(engine.encode(text)) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(export.FORMATS))
def test_the_built_in_model_s_exports(tmp_path, kind):
    packages(kind)
    if not PACKAGE.exists():
        pytest.skip("the built-in model isn't packed here: dvc repro package")
    found = export.export(PACKAGE, kind, tmp_path / "out", TEST)["check"]
    assert abs(found["perplexity"]["change"]) < 0.01
    if kind in ("onnx-int4", "gguf-f32"):
        assert found["same_prompts"] == found["prompts"] == 20
    else:  # activations are rounded to 8 bits: other tokens only where two are nearly as likely
        assert found["widest_gap"] < 0.1


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(pack, tmp_path, monkeypatch):
    packages("gguf")
    with pytest.raises(InputError, match="'onnx' is not known"):
        export.export(pack("plain"), "onnx", tmp_path / "out")
    with pytest.raises(InputError, match="is no folder"):
        export.export(tmp_path / "nothing", "gguf", tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    with pytest.raises(InputError, match="isn't empty"):
        export.export(pack("plain"), "gguf", full)
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "too short"}\n')
    with pytest.raises(InputError, match="where a check needs"):
        export.export(pack("plain"), "gguf", tmp_path / "out", short)
    for content in ("no JSON", '{"txt": "x"}', '{"text": 1}', "[]"):
        short.write_text(content + "\n")
        with pytest.raises(InputError, match="is no JSONL of"):
            export.export(pack("plain"), "gguf", tmp_path / "out", short)
    with pytest.raises(InputError, match="cannot write to"):
        export.export(pack("plain"), "gguf", short / "out")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match="needs the package llama_cpp.*pip install llama-cpp-python"):
        export.export(pack("plain"), "gguf", tmp_path / "out", short)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "short.jsonl"]


def test_an_unknown_family_or_a_sliding_window_is_refused(tokenizer, tmp_path, make_model):
    packages("gguf")
    make_model("GPT2LMHeadModel", hidden_size=32, n_head=4, n_layer=1).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="GPT2LMHeadModel"):
        export.export(tmp_path / "gpt2", "gguf", tmp_path / "out")
    windowed = _random_package(tmp_path / "windowed", tokenizer, "MistralForCausalLM", config={"sliding_window": 16})
    with pytest.raises(InputError, match="sliding window of 16"):
        export.export(windowed, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_heads_that_the_engine_cannot_run_are_refused(model_folder, tmp_path):
    packages("onnx-int4")
    with pytest.raises(InputError, match="heads of 8"):
        export.export(model_folder, "onnx-int4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_constants_too_large_for_one_file_lie_beside_the_graph(pack, exported, tmp_path, monkeypatch):
    packages("onnx-int4")
    from tasks.export import onnx_format

    monkeypatch.setattr(onnx_format, "_ONE_FILE", 0)
    export.export(pack("adapter"), "onnx-int4", tmp_path / "out")
    assert (tmp_path / "out/model.onnx.data").stat().st_size > 10_000
    ids = np.arange(1, 20)
    together = engines.load(exported("adapter", "onnx-int4")[1]).logits(ids)
    assert np.array_equal(engines.load(tmp_path / "out").logits(ids), together)


def test_a_benchmark_s_row_is_of_what_its_processes_measured(pack):
    figures = {"import_seconds": 1.0, "load_seconds": 0.5, "first_token_seconds": 0.02, "cpu_seconds_per_token": 0.003}
    figures |= {"peak_bytes": 3 * 2**20, "above_libraries_bytes": 2**20, "joules_per_token": None}
    found = [figures | {"generation_seconds": [s, 9.0, s], "together_seconds": 8.0} for s in (1.0, 2.0, 4.0)]
    rows = []
    benchmark.show(SimpleNamespace(add=lambda **row: rows.append(row)), "x", pack("plain"), found, 8.0)
    assert list(rows[0]) == list(benchmark.COLUMNS)
    assert rows[0]["times the fp32 original"] == 4.0 and rows[0]["largest"] == benchmark.NEW
    assert rows[0]["tokens/s at batch 4"] == rows[0]["tokens/s"] == benchmark.NEW / 2
    assert rows[0]["load, s"] == 1.5 and rows[0]["peak, MiB"] == 3
    assert rows[0]["energy, mJ per token"] == "not available"


def test_a_dense_folder_can_be_exported(tokenizer, tmp_path):
    packages("onnx-int4")
    export.export(tokenizer, "onnx-int4", tmp_path / "out")  # the fixture's folder holds a model, too
    ours, theirs = engines.load(tokenizer), engines.load(tmp_path / "out")
    window = np.arange(1, 40)
    assert np.abs(ours.logits(window) - theirs.logits(window)).max() < 1e-3


def test_blocks_are_the_largest_power_of_two_that_divides_a_group():
    def size(group, order=None, least=16, most=256):
        linear = Linear(codes=torch.zeros(1, 1), group_size=group, group_index=order)
        return source_model.block_size(linear, least, most)

    assert [size(group) for group in (32, 48, 96, 128, 1024, 8, 20)] == [32, 16, 32, 128, 256, None, None]
    assert size(32, order=torch.zeros(1)) is None and size(64, least=32, most=32) == 32
    assert source_model.block_size(Linear(weight=torch.zeros(1, 1)), 16, 256) is None
