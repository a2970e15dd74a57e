"""What a GGUF file holds, with the package's codes, and what llama.cpp makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.export import export
from tasks.models import dense_folder
from tasks.packed import packed_folder, reader
from tasks.runners import engines, llama_bindings
from tests.support import random_package
from tests.support.exports import needs_engine, needs_writer
from tests.support.paths import ROOT

BASE = ROOT / "data/base_model/model"


@pytest.mark.parametrize("case", ["plain", "adapter", "three bits", "zero points", "qwen3", "mistral"])
def test_the_gguf_file_holds_the_package_s_codes(exported, case):
    needs_writer("gguf")
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


def test_a_sliding_window_is_refused_where_the_engine_has_none(tokenizer, tmp_path):
    needs_writer("gguf")
    windowed = random_package.write(
        tmp_path / "windowed", tokenizer, "MistralForCausalLM", config={"sliding_window": 16}
    )
    with pytest.raises(InputError, match="sliding window of 16"):
        export.export(windowed, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rounding_activations_to_8_bits_explains_what_llama_cpp_computes_otherwise(exported):
    """The engine's logits after one token against those of PyTorch whose linears round their inputs as Q8_0 does.

    After one: with more, a value that lies on the other side of a rounding boundary changes all that follows.
    """
    needs_engine("gguf")
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


def test_llama_cpp_tokenises_as_the_model_does(tmp_path):
    needs_engine("gguf")
    out = tmp_path / "out"
    export.export(BASE, "gguf", out)
    tokenise = _tokenise(str(out / engines.GGUF))
    tokenizer = dense_folder.load_tokenizer(BASE)
    for text in ("The pump shall stop within 250 ms.", "it's 3.5 °C;  two  blanks\n\nand lines", "naïve – ½ %"):
        assert tokenise(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def _tokenise(path):
    """text -> token ids, by the tokenizer of the installed binding."""
    library = llama_bindings.import_library()
    if llama_bindings.installed() == "llama_cpp":
        model = library.Llama(path, vocab_only=True, verbose=False)
        return lambda text: model.tokenize(text.encode(), add_bos=False)
    library.disable_logging()
    model = library.LlamaModel(path, verbose=False)
    return lambda text: model.get_vocab().tokenize(text, add_special=False, parse_special=False)


@pytest.mark.parametrize("case", ["adapter", "zero points", "qwen2"])
def test_llama_cpp_accepts_the_adapter_for_the_model(exported, case):
    needs_engine("gguf")
    _, out = exported(case, "gguf")
    if llama_bindings.installed() == "llama_cpp":
        engines.load(out)  # switches it on
        return
    library = llama_bindings.import_library()
    library.disable_logging()
    model = library.LlamaModel(str(out / engines.GGUF), verbose=False)
    adapter = model.lora_adapter_init(str(out / engines.LORA))  # it compares names and shapes with the model's
    assert adapter.meta_val_str("adapter.type") == "lora"
