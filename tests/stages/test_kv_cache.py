"""The quantised cache against a naive model that rounds keys and values itself; its bytes against arithmetic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from tasks import kv_cache
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import head, streaming
from tasks.algorithms.model.shape import shape_of_model
from tasks.algorithms.scoring import kv_cache as algorithm
from tasks.algorithms.scoring import perplexity
from tasks.models import dense_folder
from tasks.parameters import schema
from tasks.runtime import journal

LENGTH, PIECE = 36, 8


@pytest.fixture
def model(make_model: Any) -> Any:
    """Two heads of keys for four of queries, 8 values each."""
    return make_model(num_hidden_layers=2)


@pytest.fixture
def ids(make_windows: Any) -> Tensor:
    return make_windows(1, LENGTH)


def logits_of(cached: algorithm.Cached, ids: Tensor) -> Tensor:
    return torch.cat([logits for _, logits in head.logits(cached, head.states(cached, ids))])


def read(model: Any, bits: int, ids: Tensor, group: int | None = None, piece: int = PIECE) -> Tensor:
    with torch.no_grad():
        return logits_of(algorithm.Cached(model, bits, group, piece), ids)


def quantised(x: Tensor, bits: int, group: int) -> Tensor:
    """HQQ in its paper's words: scale and zero point of each group's range, then zero points by half-quadratic steps
    until the mean error of all groups stops falling; scale and zero point are kept in float16."""
    rows, top = x.half().float().reshape(-1, group), 2**bits - 1
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = (top / (high - low)).clamp(max=2e4)
    zero, beta, best = -low * scale, 10.0, math.inf
    for _ in range(20):
        codes = (rows * scale + zero).round().clamp(0, top)
        error = rows - (codes - zero) / scale
        sparse = error.sign() * (error.abs() - error.abs() ** (0.7 - 1) / beta).clamp(min=0)
        zero = (codes - (rows - sparse) * scale).mean(1, keepdim=True)
        if error.abs().mean() >= best:
            break
        best = error.abs().mean()
    codes = (rows * scale + zero).round().clamp(0, top)
    return ((codes.half() - zero.half()) * (1 / scale).half()).float().reshape(x.shape)


def naive(model: Any, ids: Tensor, bits: int, group: int, residual: int) -> Tensor:
    """Logits of a Llama, token by token in plain torch; the cache is quantised whenever `residual` tokens are new."""
    config, layers = model.config, model.model.layers
    heads, size = config.num_attention_heads, config.head_dim
    shared = heads // config.num_key_value_heads
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + config.rms_norm_eps).sqrt() * weight

    def rotate(x: Tensor, place: int) -> Tensor:
        angle = torch.cat([place * frequencies] * 2)
        half = torch.cat([-x[:, size // 2 :], x[:, : size // 2]], dim=1)
        return x * angle.cos() + half * angle.sin()

    held = [([], []) for _ in layers]  # per layer: keys, values of each token, [kv_heads, head]
    out = []
    for place, token in enumerate(ids[0]):
        x = model.model.embed_tokens.weight[token]
        for layer, cache in zip(layers, held, strict=True):
            part, y = layer.self_attn, norm(x, layer.input_layernorm.weight)
            q = rotate((part.q_proj.weight @ y).view(heads, size), place)
            cache[0].append(rotate((part.k_proj.weight @ y).view(-1, size), place).half().float())
            cache[1].append((part.v_proj.weight @ y).view(-1, size).half().float())
            keys, values = (torch.stack(rows).repeat_interleave(shared, 1) for rows in cache)  # [tokens, heads, head]
            scores = (torch.einsum("hd,thd->ht", q, keys) / math.sqrt(size)).softmax(dim=1)
            x = x + part.o_proj.weight @ torch.einsum("ht,thd->hd", scores, values).flatten()
            y = norm(x, layer.post_attention_layernorm.weight)
            x = x + layer.mlp.down_proj.weight @ (
                torch.nn.functional.silu(layer.mlp.gate_proj.weight @ y) * (layer.mlp.up_proj.weight @ y)
            )
            if (place + 1) % residual == 0 and bits < 16:
                for rows in cache:
                    rows[:] = quantised(torch.stack(rows), bits, group).unbind()
        out.append(model.lm_head.weight @ norm(x, model.model.norm.weight))
    return torch.stack(out).detach()


@pytest.mark.parametrize(("bits", "group"), [(8, 8), (4, 8), (4, 4), (2, 8)])
def test_logits_are_those_of_a_model_that_rounds_its_own_keys_and_values(
    model: Any, ids: Tensor, bits: int, group: int
) -> None:
    found, expected, full = read(model, bits, ids, group), naive(model, ids, bits, group, PIECE), read(model, 16, ids)
    felt = (expected - full)[PIECE:].abs().mean()
    assert felt > 1e-4  # quantisation is felt
    assert (found - expected)[PIECE:].abs().mean() < 0.02 * felt
    assert torch.allclose(found[:PIECE], full[:PIECE], atol=1e-6)  # nothing is quantised yet


def test_16_bits_are_the_ordinary_forward_pass_but_for_float16(model: Any, ids: Tensor) -> None:
    with torch.no_grad():
        ordinary = model(ids).logits[0]
    found = read(model, 16, ids)
    felt = (found - ordinary).abs().mean()
    assert (found - naive(model, ids, 16, 8, PIECE)).abs().mean() < 0.1 * felt  # a value in a thousand rounds otherwise
    assert 0 < (found - ordinary).abs().max() < 0.02 * ordinary.abs().max()
    score = [
        perplexity.from_nll(-x[:-1].log_softmax(1).gather(1, ids[0, 1:, None]).T, LENGTH) for x in (found, ordinary)
    ]
    assert score[0] == pytest.approx(score[1], rel=1e-3)


def test_pieces_are_decoding_token_by_token_with_the_library_s_residual(model: Any, ids: Tensor) -> None:
    cached = algorithm.Cached(model, 4, None, PIECE)
    expected, cache = logits_of(cached, ids), cached.empty()
    with torch.no_grad():  # the library quantises what comes first at once, however short
        logits = [model(ids[:, :PIECE], past_key_values=cache).logits]
        logits += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(PIECE, LENGTH)]
        felt = (model(ids).logits - expected).abs().mean()
    assert (torch.cat(logits, dim=1) - expected).abs().mean() < 0.01 * felt  # but for float32's own rounding
    assert algorithm.held_bytes(cache) == algorithm.held_bytes(cached.cache)


def test_fewer_bits_are_further_from_16(model: Any, ids: Tensor) -> None:
    full = read(model, 16, ids)
    errors = [float((read(model, bits, ids) - full).square().mean()) for bits in (8, 4, 2)]
    assert 0 < errors[0] < errors[1] / 10 < errors[2] / 10


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("length", [32, 36])
def test_bytes_are_those_of_arithmetic(model: Any, ids: Tensor, bits: int, group: int | None, length: int) -> None:
    cached = algorithm.Cached(model, bits, group, PIECE)
    with torch.no_grad():
        cached.base_model(ids[:, :length])
    shape = shape_of_model(model)
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (2, 2, 8)
    found = algorithm.held_bytes(cached.cache)
    assert found == algorithm.planned_bytes(shape, length, bits, group, PIECE)
    values = 2 * 2 * 2 * 8  # keys and values, layers, heads, values of a head
    rest = length if bits == 16 else length % PIECE
    assert found["codes"] == (length - rest) * values * bits / 8 and found["float16"] == 2 * rest * values
    assert found["scales"] == (length - rest) * values // (group or 8) * 4


def test_groups_and_windows_that_the_library_cannot_take_are_refused(model: Any, make_model: Any) -> None:
    with pytest.raises(InputError, match="group of 5 values does not divide a head of 8; choose a divisor of 8"):
        algorithm.Cached(model, 4, 5, PIECE)
    with pytest.raises(InputError, match="can't quantise this model's cache"):
        algorithm.Cached(make_model("MistralForCausalLM", sliding_window=16), 4, None, PIECE)


@pytest.fixture
def staged(make_stage: Any, model_folder: Path, tmp_path: Path) -> Any:
    """staged(**params) -> kv_cache.csv of a stage on a small model."""
    text = '{"text": "The pump must stop within a second of the alarm, and say so."}\n' * 4
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora/test.jsonl").write_text(text, encoding="utf-8")

    def run(skip: bool = False, saved: Any = None, **changed: Any) -> tuple[pd.DataFrame, bytes]:
        given = {
            "enabled": True,
            "bits": [8, 4],
            "contexts": [16, 40],
            "tokens": 120,
            "group_size": None,
            "residual": 8,
        }
        section = schema.KvCache(**given | changed)
        inputs = {"model": model_folder, "corpora": tmp_path / "corpora"}
        stage = make_stage({"kv_cache": section}, inputs, journal=saved)
        (kv_cache.skip if skip else kv_cache.run)(stage)
        path = tmp_path / "out/kv_cache.csv"
        return pd.read_csv(path), path.read_bytes()

    return run


def test_the_table_has_perplexity_and_bytes_by_context_and_bits(staged: Any, model_folder: Path) -> None:
    table, content = staged()
    assert tuple(table) == kv_cache.COLUMNS
    assert table[["context", "bits", "windows"]].values.tolist() == [
        [16, 16, 7], [16, 8, 7], [16, 4, 7], [40, 16, 3], [40, 8, 3], [40, 4, 3]
    ]  # fmt: skip
    assert (table.bytes == table.codes + table.scales + table.float16).all()
    assert table.ratio.tolist() == pytest.approx([1, 16 / 12, 2, 1, 16 / 12, 2])  # 4 bytes per head of 8 for the group
    model, tokenizer = dense_folder.load_dense(model_folder), dense_folder.load_tokenizer(model_folder)
    tokens = perplexity.tokenise(tokenizer, ["The pump must stop within a second of the alarm, and say so."] * 4)
    ordinary = perplexity.perplexity(model, perplexity.windows(tokens, 40, 40, 3))
    assert table.perplexity[3] == pytest.approx(ordinary, rel=2e-3)
    assert table.nats[4] == pytest.approx(math.log(table.perplexity[4] / table.perplexity[3]), abs=1e-7)
    assert table.nats_error[3] == 0 < table.nats_error[4] < table.nats_error[5]
    assert staged()[1] == content


def test_a_run_whose_windows_are_all_in_the_journal_writes_the_same(staged: Any, tmp_path: Path) -> None:
    _, content = staged()
    staged(saved=journal.Journal(tmp_path / "journal", interval=0))
    saved = journal.Journal(tmp_path / "journal", interval=0)
    assert saved.part("40-4").load("nll").values == 3  # windows
    assert staged(saved=saved)[1] == content


def test_a_model_whose_blocks_are_opened_one_by_one_has_the_same_bytes(staged: Any, monkeypatch: Any) -> None:
    _, content = staged()
    monkeypatch.setattr(streaming, "WHOLE", 0)
    assert staged()[1] == content


def test_one_window_has_no_standard_error(staged: Any) -> None:
    table, _ = staged(contexts=[40], tokens=79)
    assert table.windows.tolist() == [1, 1, 1] and table.nats_error.isna().all()


def test_switched_off_the_table_has_no_rows(staged: Any) -> None:
    table, _ = staged(skip=True)
    assert tuple(table) == kv_cache.COLUMNS and table.empty
