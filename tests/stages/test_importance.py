"""Block scores: an identity block, closed forms, autograd, and models built without the block."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from tasks import importance as stage_module
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, families
from tasks.algorithms.pruning import depth_prune, importance
from tasks.algorithms.scoring.perplexity import perplexity
from tasks.models import dense_folder, skeleton, tensor_files

METHODS = [*importance.SCORES, importance.COMPOUND]
IDENTITY = 2


@pytest.fixture
def identity(make_model):
    """A model whose block 2 adds nothing to its input."""
    model = make_model()
    block = families.blocks(model)[IDENTITY]
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize("method", ["taylor", "perplexity", "block_influence"])
def test_an_identity_block_scores_zero_and_no_other_does(method, identity, make_windows):
    scores = importance.score(identity, make_windows(3, 16), method)
    assert float(scores[IDENTITY]) == pytest.approx(0, abs=1e-12)
    assert all(abs(float(score)) > 1e-6 for index, score in enumerate(scores) if index != IDENTITY)


def test_removing_the_identity_block_leaves_the_logits_equal(identity, make_windows):
    ids = make_windows(3, 16)
    smaller = depth_prune.without(identity, [IDENTITY])
    assert torch.equal(smaller(input_ids=ids).logits, identity(input_ids=ids).logits)


def test_magnitude_is_the_sum_of_absolute_weights(make_model, make_windows):
    model = make_model()
    for index, score in enumerate(importance.score(model, make_windows(1, 4), "magnitude")):
        weights = [w for name, w in model.named_parameters() if f"layers.{index}." in name and w.ndim == 2]
        assert len(weights) == 7
        assert float(score) == pytest.approx(sum(abs(x) for w in weights for x in w.flatten().tolist()), rel=1e-9)


def test_taylor_is_the_gradient_of_the_model_s_own_loss_times_the_weight(make_model, make_windows):
    model, ids = make_model(), make_windows(4, 12)
    weights = [linear.weight for linear in families.block_linears(model).values()]
    gradients = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weights)
    products = [float((g * w).detach().abs().sum()) for g, w in zip(gradients, weights, strict=True)]
    expected = [sum(products[7 * index : 7 * index + 7]) for index in range(4)]
    for batch in (1, 3, 4):
        assert importance.taylor(model, ids, batch).tolist() == pytest.approx(expected, rel=1e-4)


def test_taylor_leaves_gradients_and_their_switches_as_they_were(make_model, make_windows):
    model = make_model()
    embedding = model.get_input_embeddings().weight
    embedding.grad = torch.ones_like(embedding)
    frozen = families.blocks(model)[0].mlp.up_proj.weight.requires_grad_(False)
    importance.taylor(model, make_windows(1, 8))
    assert torch.equal(embedding.grad, torch.ones_like(embedding))
    assert frozen.grad is None
    assert not frozen.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.parameters() if p is not frozen and p is not embedding)


def test_perplexity_is_the_rise_when_the_block_is_bypassed(make_model, make_windows):
    model, ids = make_model(), make_windows(3, 16)
    whole = perplexity(model, ids)
    for index, score in enumerate(importance.perplexity(model, ids)):
        block = families.blocks(model)[index]
        block.forward = lambda hidden, *_, **__: hidden
        assert float(score) == pytest.approx(perplexity(model, ids) - whole, rel=1e-9)
        del block.forward


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_perplexity_is_that_of_the_model_built_without_the_block(batch, make_model, make_windows):
    model, ids = make_model(num_hidden_layers=6), make_windows(5, 16)
    naive = [perplexity(depth_prune.without(model, [index]), ids, batch) for index in range(6)]
    expected = [value - perplexity(model, ids, batch) for value in naive]
    assert importance.perplexity(model, ids, batch).tolist() == pytest.approx(expected, abs=1e-5, rel=1e-9)


def runs(model):
    """How often each block runs from now on, in passes of one batch."""
    counts = [0] * len(families.blocks(model))

    def count(index):
        def hook(*_):
            counts[index] += 1

        return hook

    for index, block in enumerate(families.blocks(model)):
        block.mlp.down_proj.register_forward_hook(count(index))
    return counts


def test_a_score_runs_each_block_no_more_often_than_it_must(make_model, make_windows):
    model, ids = make_model(num_hidden_layers=6), make_windows(4, 16)
    counts = runs(model)
    importance.magnitude(model, ids)
    assert counts == [0] * 6
    importance.block_influence(model, ids, batch=2)
    assert counts == [2] * 6
    importance.perplexity(model, ids, batch=4)  # the whole model, and those without a block before this one
    assert [count - 2 for count in counts] == [1, 2, 3, 4, 5, 6]


def test_block_influence_equals_a_loop_over_tokens(make_model, make_windows):
    model, ids = make_model(), make_windows(3, 6)
    states, last = [], []
    families.blocks(model)[-1].register_forward_hook(lambda _, __, output: last.append(output))
    states = model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
    states = [state.detach() for state in (*states, last[0])]
    for batch in (1, 2):
        for index, score in enumerate(importance.block_influence(model, ids, batch)):
            cosines = []
            tokens = (states[position].flatten(0, 1).tolist() for position in (index, index + 1))
            for x, y in zip(*tokens, strict=True):
                product = sum(a * b for a, b in zip(x, y, strict=True))
                cosines.append(product / (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5)
            assert float(score) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-4)


def test_equal_scores_share_the_mean_of_their_ranks():
    assert importance.ranks(torch.tensor([5.0, 1.0, 5.0, 7.0, 5.0])).tolist() == [3, 1, 3, 5, 3]
    scores = torch.randint(0, 9, (50,), generator=torch.Generator().manual_seed(0)).double()
    assert importance.ranks(scores).tolist() == pd.Series(scores.numpy()).rank(method="average").tolist()


def test_compound_is_the_mean_rank(make_model, make_windows):
    model, ids = make_model(), make_windows(2, 10)
    table = pd.DataFrame({name: importance.score(model, ids, name).numpy() for name in importance.SCORES})
    expected = table.rank(method="average").mean(axis=1).tolist()
    assert importance.score(model, ids, "compound").tolist() == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_broken_model_is_refused(method, make_model, make_windows):
    model = make_model()
    families.blocks(model)[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        importance.score(model, make_windows(1, 8), method)


@pytest.mark.parametrize("method", importance.SCORES)
def test_the_stage_computes_the_score_that_ranks_and_no_other(
    method, model_folder, make_stage, make_windows, tmp_path, monkeypatch
):
    """And from blocks on disk."""
    ids, elsewhere = make_windows(3, 16), []
    tensor_files.save_tensors(tmp_path / "windows.safetensors", {"input_ids": ids.int()}, {})
    inputs = {"vocabulary/model": model_folder, "windows.safetensors": tmp_path / "windows.safetensors"}
    original = importance.SCORES[method]

    def watched(model, *rest):
        elsewhere.append(len(skeleton.missing(model)))
        return original(model, *rest)

    monkeypatch.setitem(importance.SCORES, method, watched)
    stage_module.run(make_stage({"importance": {"windows": 2, "method": method}}, inputs))
    table = pd.read_csv(tmp_path / "out/scores.csv")
    assert table.columns.tolist() == ["layer", method]
    expected = original(dense_folder.load_dense(model_folder), ids[:2], 1, checkpoints.NOTHING)
    assert table[method].tolist() == pytest.approx(expected.tolist(), rel=1e-7)
    assert elsewhere == [4 * 9]


def test_the_stage_writes_a_compound_with_its_parts_of_the_first_windows(
    model_folder, make_stage, make_windows, tmp_path, capsys
):
    ids = make_windows(4, 16)
    tensor_files.save_tensors(tmp_path / "windows.safetensors", {"input_ids": ids.int()}, {})
    inputs = {"vocabulary/model": model_folder, "windows.safetensors": tmp_path / "windows.safetensors"}
    params = {"importance": {"windows": 2, "method": "compound"}}
    for out in ("a", "b"):
        stage_module.run(make_stage(params, inputs, out))
    assert (tmp_path / "a/scores.csv").read_bytes() == (tmp_path / "b/scores.csv").read_bytes()
    table = pd.read_csv(tmp_path / "a/scores.csv")
    assert table.columns.tolist() == ["layer", "magnitude", "taylor", "perplexity", "block_influence", "compound"]
    assert table["layer"].tolist() == [0, 1, 2, 3]
    model = dense_folder.load_dense(model_folder)
    for method in METHODS:
        assert table[method].tolist() == pytest.approx(importance.score(model, ids[:2], method).tolist(), rel=1e-6)
    assert "4 layers scored on 2 windows of 16 tokens" in capsys.readouterr().out


def test_switched_off_it_writes_a_table_without_rows(make_stage, tmp_path):
    for method, columns in (("compound", METHODS), ("taylor", ["taylor"])):
        stage_module.skip(make_stage({"importance": SimpleNamespace(method=method)}, {}))
        table = pd.read_csv(tmp_path / "out/scores.csv")
        assert len(table) == 0
        assert table.columns.tolist() == ["layer", *columns]
