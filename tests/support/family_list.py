"""One list: the decoder families that go through the whole DAG as tiny random models, and models that are refused.

A new family is one line of `FAMILIES`: the class of transformers and what its config is to have besides the sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.project import save_byte_level_tokenizer

CONTEXT = 128
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
"""By transformers' names; a config that has others keeps a table of them."""


@dataclass(frozen=True)
class Listed:
    """A family.

    Attributes:
        architecture: the class of transformers.
        config: entries of the config besides `SIZES`.
    """

    architecture: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def make(self, seed: int = 0, vocabulary: int = 257, **changes: Any) -> transformers.PreTrainedModel:
        """A random model in evaluation mode, whose biases and norms are random, too."""
        kind = getattr(transformers, self.architecture)
        names = kind.config_class.attribute_map
        values = {**SIZES, "vocab_size": vocabulary, **self.config, **changes}
        config = kind.config_class(**{names.get(key, key): value for key, value in values.items()})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = kind(config)
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight.data += 0.1 * torch.randn_like(weight)
        return model.eval()

    def save(self, folder: Path, **changes: Any) -> Path:
        """Fill the folder with the model and a byte-level tokenizer."""
        vocabulary = save_byte_level_tokenizer(folder, CONTEXT) + 7
        self.make(vocabulary=vocabulary, **changes).save_pretrained(folder)
        return folder


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GATED = {"intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True}
_PLAIN = {"intermediate_size": 128, "tie_word_embeddings": False}
_HEADS = {"head_dim": 32}
_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}

FAMILIES: dict[str, Listed] = {
    "GPT-2": Listed("GPT2LMHeadModel"),
    "GPT-Neo": Listed("GPTNeoForCausalLM", {"attention_types": [[["global", "local", "local"], 1]], "window_size": 16}),
    "GPT-NeoX, Pythia": Listed("GPTNeoXForCausalLM", _PLAIN),
    "GPT-J": Listed("GPTJForCausalLM", {"rotary_dim": 8}),
    "GPT-BigCode": Listed("GPTBigCodeForCausalLM"),
    "CodeGen": Listed("CodeGenForCausalLM", {"rotary_dim": 8}),
    "OPT": Listed("OPTForCausalLM", {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    "XGLM": Listed("XGLMForCausalLM", {"ffn_dim": 128, "pad_token_id": 1}),
    "BLOOM": Listed("BloomForCausalLM"),
    "MPT": Listed("MptForCausalLM", {"max_seq_len": CONTEXT}),
    "Falcon": Listed("FalconForCausalLM"),
    "Falcon, new decoder": Listed("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Persimmon": Listed("PersimmonForCausalLM", _PLAIN),
    "Phi": Listed("PhiForCausalLM", _PLAIN),
    "Phi-3": Listed("Phi3ForCausalLM", _GATED),
    "StableLM": Listed("StableLmForCausalLM", _GATED),
    "StarCoder2": Listed("Starcoder2ForCausalLM", {**_GATED, "sliding_window": 16}),
    "OLMo": Listed("OlmoForCausalLM", _GATED),
    "OLMo 2": Listed("Olmo2ForCausalLM", _GATED),
    "OLMo 3": Listed("Olmo3ForCausalLM", {**_GATED, **_SLIDING}),
    "Llama 2": Listed("LlamaForCausalLM", _GATED),
    "Llama 3": Listed(
        "LlamaForCausalLM",
        {
            **_GATED,
            "rope_parameters": LLAMA3,
        },
    ),
    "Mistral": Listed("MistralForCausalLM", {**_GATED, "sliding_window": 16}),
    "Ministral 3": Listed("Ministral3ForCausalLM", _GATED),
    "Qwen 2, 2.5": Listed("Qwen2ForCausalLM", _GATED),
    "Qwen 3": Listed("Qwen3ForCausalLM", {**_GATED, **_HEADS}),
    "SmolLM 3": Listed("SmolLM3ForCausalLM", {**_GATED, "no_rope_layers": [1, 1, 0]}),
    "Gemma": Listed("GemmaForCausalLM", {**_GATED, **_HEADS}),
    "Gemma 2": Listed("Gemma2ForCausalLM", {**_GATED, **_HEADS, **_SLIDING}),
    "Gemma 3": Listed("Gemma3ForCausalLM", {**_GATED, **_HEADS, **_SLIDING, "final_logit_softcapping": 30.0}),
    "Granite": Listed("GraniteForCausalLM", {**_GATED, "logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "Cohere": Listed("CohereForCausalLM", _GATED),
    "Cohere 2": Listed("Cohere2ForCausalLM", {**_GATED, **_SLIDING}),
    "EXAONE 4": Listed("Exaone4ForCausalLM", {**_GATED, **_SLIDING}),
    "GLM": Listed("GlmForCausalLM", {**_GATED, "head_dim": 16}),
    "GLM-4": Listed("Glm4ForCausalLM", {**_GATED, "head_dim": 16}),
    "Nemotron": Listed("NemotronForCausalLM", {**_PLAIN, "num_key_value_heads": 2, "head_dim": 16}),
    "Helium": Listed("HeliumForCausalLM", {**_GATED, "head_dim": 16}),
    "Arcee": Listed("ArceeForCausalLM", _GATED),
    "ERNIE 4.5": Listed("Ernie4_5ForCausalLM", _GATED),
    "Seed-OSS": Listed("SeedOssForCausalLM", {**_GATED, "head_dim": 16}),
    "HunYuan": Listed("HunYuanDenseV1ForCausalLM", {**_GATED, "head_dim": 16}),
    "Jais 2": Listed("Jais2ForCausalLM", _GATED),
}

_EXPERTS, _STATES, _FAILS = "is a mixture of experts", "is a state-space model", "is not supported: the check"
REFUSED: dict[str, tuple[str, str]] = {
    "Mixtral": ("MixtralForCausalLM", _EXPERTS),
    "Qwen 3 MoE": ("Qwen3MoeForCausalLM", _EXPERTS),
    "GPT-OSS": ("GptOssForCausalLM", _EXPERTS),
    "OLMoE": ("OlmoeForCausalLM", _EXPERTS),
    "Jamba": ("JambaForCausalLM", _EXPERTS),
    "Mamba": ("MambaForCausalLM", _STATES),
    "Mamba 2": ("Mamba2ForCausalLM", _STATES),
    "Falcon Mamba": ("FalconMambaForCausalLM", _STATES),
    "RecurrentGemma": ("RecurrentGemmaForCausalLM", _STATES),
    "LFM 2": ("Lfm2ForCausalLM", _STATES),
    "Gemma 3, with images": ("Gemma3ForConditionalGeneration", "is multimodal"),
    "Phi-4, with images": ("Phi4MultimodalForCausalLM", "is multimodal"),
    "BERT": ("BertLMHeadModel", "its head cls is more than one matrix"),
    "BART": ("BartForCausalLM", "reads an encoder's states"),
    "T5": ("T5ForConditionalGeneration", "is no language model that transformers"),
    "Gemma 3n": ("Gemma3nForCausalLM", "its blocks differ in their matrices"),
    "Apertus": ("ApertusForCausalLM", f"{_FAILS} `pruned, packed and read back it is the same` fails"),
    "DiffLlama": ("DiffLlamaForCausalLM", f"{_FAILS} `without a block it says what it says where that does nothing`"),
}
"""Class of transformers, of which the config is the default one, and what the sentence says."""


def refused_config(architecture: str) -> dict[str, Any]:
    """The default config.json of a class of transformers, with few layers."""
    config = getattr(transformers, architecture).config_class().to_dict()
    return {**config, "architectures": [architecture]}
