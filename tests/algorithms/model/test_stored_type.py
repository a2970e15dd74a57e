"""Weights in bfloat16 under computation in float32, against the same model with all of them in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.algorithms.model import stored_type
from tasks.models import dense_folder, streamed_folder
from tests.support import project

IDS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(1))


def folder(path: Path, kind: str, tied: bool = True) -> Path:
    project.save_byte_level_tokenizer(path, 300)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300}
    config = AutoConfig.for_model(
        kind, **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=0
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():  # biases and norms, too
        nn.init.normal_(weight, std=0.3)
    dense_folder.save_dense(model.bfloat16(), dense_folder.load_tokenizer(path), path)
    return path


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_half_the_bytes_says_the_same_to_the_bit(tmp_path, kind, tied):
    path = folder(tmp_path / "model", kind, tied)
    stored, whole = streamed_folder.load_stored(path), dense_folder.load_dense(path)
    large = [weight for weight in stored.parameters() if weight.ndim > 1]
    assert {weight.dtype for weight in large} == {torch.bfloat16} and len(large) == 15 + (not tied)
    states = []
    for model in (stored, whole):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits.square().sum(), embedded)
        states.append((model(IDS, use_cache=False).logits, logits, gradient))
    for ours, theirs in zip(*states, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_what_two_models_have_in_common_is_held_once(tmp_path):
    path = folder(tmp_path / "model", "llama", tied=False)
    one, other = streamed_folder.load_stored(path), streamed_folder.open_dense(path, stored=True)
    one.lm_head.weight.data[3, 3] += 1
    stored_type.share(other, one)
    assert other.model.embed_tokens is one.model.embed_tokens
    assert other.lm_head.weight is not one.lm_head.weight
    whole = dense_folder.load_dense(path)  # in another type
    stored_type.share(whole, one)
    assert whole.model.embed_tokens is not one.model.embed_tokens


def test_a_weight_is_float32_for_a_while():
    linear = stored_type._stored_linear(nn.Linear(4, 3).bfloat16())
    before = linear.weight
    with stored_type.widened(linear), stored_type.widened(linear):
        assert linear.weight.dtype == torch.float32 and torch.equal(linear.weight, before.float())
    assert linear.weight is before
    third = torch.full((3, 4), 1 / 3)
    with stored_type.rounded_afterwards([linear]):
        linear.weight.data.copy_(third)
    assert linear.weight.dtype == torch.bfloat16 and torch.equal(linear.weight, third.bfloat16())
    with stored_type.taken_for_float32([linear]):
        assert linear.weight.dtype == torch.float32 and linear.weight.shape == (3, 4)
        assert linear.weight.untyped_storage().nbytes() == 4
    assert torch.equal(linear.weight, third.bfloat16())
