"""Each family that a format has a row for, as a tiny random model: packed, exported, run in its engine and compared.

And each family, or config, that it hasn't: refused by name, before anything is written.
"""

from __future__ import annotations

import numpy as np
import pytest
import transformers

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.export import export
from tasks.runners import engines
from tests.support import random_package
from tests.support.command import edgepress
from tests.support.exports import check_same, needs_engine, needs_writer
from tests.support.family_list import CONTEXT, FAMILIES, LLAMA3

gguf_families = pytest.importorskip("tasks.export.gguf_families")
onnx_families = pytest.importorskip("tasks.export.onnx_families")

KINDS = {"gguf-f32": gguf_families, "gguf": gguf_families, "onnx-int4": onnx_families}
_PLAIN = {"rope_type": "default", "rope_theta": 20000.0}
_ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]
CHANGES = {
    "Gemma 2": {"query_pre_attn_scalar": 32, "layer_types": _ALTERNATE},
    "Gemma 3": {"query_pre_attn_scalar": 32, "final_logit_softcapping": None},
    "Mistral": {"sliding_window": None},
    "StarCoder2": {"sliding_window": None},
    "StableLM": {"tie_word_embeddings": False},
    "OLMo 2": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "Jais 2": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "Phi": {"num_attention_heads": 2},
    "Nemotron": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    "SmolLM 3": {"no_rope_layers": [1, 1, 1]},
}
"""What the engines compute of a family, where the listed config has something else: that is refused below."""
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
STRETCHED = [
    ("gguf-f32", "Qwen 3", {"rope_parameters": LINEAR}),
    ("gguf-f32", "Gemma 3", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": _PLAIN}}),
    ("gguf-f32", "Gemma 3", {"sliding_window": CONTEXT}),
    ("gguf-f32", "Gemma 2", {"sliding_window": CONTEXT}),
    ("onnx-int4", "Gemma 3", {"sliding_window": CONTEXT}),
    ("gguf-f32", "GPT-NeoX, Pythia", {"use_parallel_residual": False}),
]
"""Other configs of a family, which the engine computes, too."""
LEFT_OUT = ("Falcon, new decoder",)
PROVEN = [
    (kind, name)
    for kind, module in KINDS.items()
    for name, listed in FAMILIES.items()
    if listed.architecture in module.ROWS and name not in LEFT_OUT
]
NEW = 16


def make(name):
    return FAMILIES[name].make(**CHANGES.get(name, {}))


@pytest.fixture(scope="module")
def packed(tokenizer, tmp_path_factory):
    """packed(name) -> the package of a family: 4 bit, 2:4, without the adapter that cyllama can't switch on."""
    made = {}

    def pack(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("packed")
            made[name] = random_package.pack(make(name), folder, tokenizer, pattern="2:4")
        return made[name]

    return pack


@pytest.mark.parametrize(("kind", "name"), PROVEN)
def test_the_engine_computes_what_the_package_does(packed, tmp_path, kind, name):
    needs_engine(kind)
    folder, out = packed(name), tmp_path / "out"
    export.export(folder, kind, out)
    ours, theirs = engines.load(folder), engines.load(out)
    starts = np.random.default_rng(0).integers(0, 257, (12, 4))
    text = ours.generate(starts, random_package.LENGTH)
    assert engines.perplexity(theirs, text) == pytest.approx(engines.perplexity(ours, text), rel=0.01)
    if kind == "gguf":  # rounds activations to 8 bits: its tokens can be others
        return
    check_same(ours, theirs, random_package.windows_of(folder), prompts=8, new=NEW)


@pytest.mark.parametrize(("kind", "name", "changes"), STRETCHED)
def test_what_a_config_says_reaches_the_engine(tokenizer, tmp_path, kind, name, changes):
    needs_engine(kind)
    model = FAMILIES[name].make(**CHANGES.get(name, {}) | changes)
    folder = random_package.pack(model, tmp_path / "packed", tokenizer)
    export.export(folder, kind, tmp_path / "out")
    window = random_package.windows_of(folder)[0]
    a, b = (engines.load(each).logits(window) for each in (folder, tmp_path / "out"))
    assert np.abs(a - b).max() < 2e-3 * np.abs(a).max()


@pytest.mark.parametrize(
    ("kind", "name"), [("gguf-f32", "GPT-NeoX, Pythia"), ("gguf-f32", "Phi-3"), ("onnx-int4", "Phi-3")]
)
def test_an_adapter_of_a_matrix_that_the_engine_cuts_or_orders_otherwise(tokenizer, runnable, tmp_path, kind, name):
    needs_engine(kind)
    folder = random_package.pack(make(name), tmp_path / "packed", tokenizer, rank=3)
    export.export(folder, kind, tmp_path / "out")
    ours, theirs = engines.load(folder), engines.load(runnable(tmp_path / "out"))
    window = random_package.windows_of(folder)[0]
    a, b = ours.logits(window), theirs.logits(window)
    assert np.abs(a - b).max() < 2e-3 * np.abs(a).max()


@pytest.mark.parametrize("module", {module.__name__: module for module in KINDS.values()}.values())
def test_every_row_is_proven_and_every_other_family_is_refused_by_name(module):
    needs_writer("gguf")
    listed = {each.architecture for each in FAMILIES.values()}
    assert set(module.ROWS) <= listed
    for architecture in listed - set(module.ROWS):
        config = getattr(transformers, architecture).config_class().to_dict() | {"architectures": [architecture]}
        with pytest.raises(InputError, match=f"^{architecture} can't be exported to .*: take another format, or ship"):
            module.check(config)


NOT_IN_GGUF = [
    ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True of GPT2LMHeadModel"),
    ("GPT-2", {"activation_function": "relu"}, "activation_function = 'relu' of GPT2LMHeadModel"),
    ("GPT-NeoX, Pythia", {"attention_bias": False}, "attention_bias = False of GPTNeoXForCausalLM"),
    ("Gemma 3", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar = 16 of Gemma3ForCausalLM"),
    ("Gemma 3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 of Gemma3ForCausalLM"),
    ("Gemma 3", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}, r"in the blocks \[0\]"),
    ("Gemma 3", {"layer_types": ["full_attention"] * 3}, r"in the blocks \[0, 1, 2\]"),
    ("Phi-3", {"sliding_window": 16}, "a sliding window of 16 tokens"),
    ("Falcon, new decoder", {}, "new_decoder_architecture = True of FalconForCausalLM"),
    ("Mistral", {"sliding_window": 16}, "a sliding window of 16 tokens"),
    ("OLMo 2", {"num_key_value_heads": 2}, "num_key_value_heads = 2 of Olmo2ForCausalLM"),
]
NOT_IN_ONNX = [
    ("Mistral", {"sliding_window": 16}, "a sliding window of 16 tokens of MistralForCausalLM can't be exported"),
    ("Gemma 3", {"layer_types": ["sliding_attention"] * 3}, "a sliding window of 16 tokens of Gemma3ForCausalLM can't"),
    ("Phi", {"num_attention_heads": 4}, "rotary embeddings of 8 don't run in ONNX Runtime GenAI"),
    ("Qwen 3", {"rope_parameters": LINEAR}, "a rotary embedding of the type 'linear' of Qwen3ForCausalLM can't"),
]


@pytest.mark.parametrize(("name", "changes", "sentence"), NOT_IN_GGUF)
def test_a_config_that_llama_cpp_would_compute_otherwise_is_refused(name, changes, sentence):
    needs_writer("gguf")
    config = families.described(FAMILIES[name].make(**CHANGES.get(name, {}) | changes))
    with pytest.raises(
        InputError, match=f"{sentence}.* can't be exported to GGUF, as llama.cpp.*: take another format"
    ):
        gguf_families.check(config)


@pytest.mark.parametrize(("name", "changes", "sentence"), NOT_IN_ONNX)
def test_a_config_that_onnx_runtime_would_compute_otherwise_is_refused(name, changes, sentence):
    config = families.described(FAMILIES[name].make(**CHANGES.get(name, {}) | changes))
    with pytest.raises(InputError, match=sentence):
        onnx_families.check(config)


def test_a_rotary_embedding_that_gguf_has_no_words_for_is_refused(tokenizer, tmp_path):
    """By its frequencies, which transformers computes."""
    needs_writer("gguf")
    model = FAMILIES["Qwen 3"].make(rope_parameters=LLAMA3)
    folder = random_package.pack(model, tmp_path / "packed", tokenizer)
    with pytest.raises(InputError, match="a rotary embedding of the type 'llama3' can't be exported to GGUF"):
        export.export(folder, "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_what_a_row_looks_at_is_in_the_family_s_config():
    for architecture, row in gguf_families.ROWS.items():
        config = getattr(transformers, architecture).config_class()
        for key in (row.epsilon, *row.computes, *row.equal, *row.equal.values(), *row.writes.values()):
            assert hasattr(config, key), (architecture, key)


@pytest.mark.parametrize("kind", ["gguf", "onnx-int4"])
def test_a_family_without_an_export_leaves_nothing_behind(tmp_path, capsys, kind):
    needs_writer(kind)
    folder = FAMILIES["OPT"].save(tmp_path / "model")
    code, out, errors = edgepress(
        capsys, "export", "--format", kind, "--model", str(folder), "--out", str(tmp_path / "out")
    )
    assert (code, out) == (1, "") and errors.startswith("error: OPTForCausalLM can't be exported to ")
    assert errors.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_engines_have_no_opt_and_the_builder_no_gpt_2(tokenizer, tmp_path, monkeypatch):
    """A refusal that is no longer true: the next version of an engine may have them."""
    import gguf

    from tasks.export import onnx_format

    assert "opt" not in gguf.MODEL_ARCH_NAMES.values()
    monkeypatch.setattr(onnx_format, "check", lambda config: None)
    for name in ("GPT-2", "GPT-NeoX, Pythia", "OPT"):
        folder = random_package.pack(make(name), tmp_path / name, tokenizer)
        with pytest.raises(InputError, match=f"can't draw {FAMILIES[name].architecture} .*not currently supported"):
            export.export(folder, "onnx-int4", tmp_path / "out")
