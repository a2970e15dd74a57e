"""Perplexity against closed forms, loops, and a published convention."""

import json
import math

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.scoring import perplexity
from tasks.models import dense_folder
from tests.support.paths import STORIES, STORIES_TEXT
from tests.support.stand_in import StandIn


def uniform(vocabulary):
    return StandIn(vocabulary, lambda input_ids: torch.full((*input_ids.shape, vocabulary), 0.7))


@pytest.mark.parametrize("vocabulary", [2, 96, 50257])
def test_uniform_logits_give_the_vocabulary_size(vocabulary, make_windows):
    assert perplexity.perplexity(uniform(vocabulary), make_windows(3, 9, 2)) == pytest.approx(vocabulary, rel=1e-6)


def test_a_model_that_knows_the_next_token_has_perplexity_one():
    oracle = StandIn(96, lambda input_ids: 1000.0 * torch.nn.functional.one_hot(input_ids.roll(-1, dims=1), 96))
    assert perplexity.perplexity(oracle, torch.arange(40).reshape(2, 20)) == 1


def test_nll_equals_a_loop_and_the_model_s_own_loss(make_model, make_windows):
    model, ids = make_model(), make_windows(3, 8)
    nll = perplexity.token_nll(model, ids)
    assert nll.shape == (3, 7)
    assert nll.dtype == torch.float64
    logits = model(input_ids=ids).logits.detach().double()
    for window in range(3):
        for position in range(7):
            row = logits[window, position].tolist()
            expected = math.log(sum(map(math.exp, row))) - row[ids[window, position + 1]]
            assert float(nll[window, position]) == pytest.approx(expected, abs=1e-4)
    loss = float(model(input_ids=ids, labels=ids).loss.detach())
    assert perplexity.perplexity(model, ids) == pytest.approx(math.exp(loss), rel=1e-5)


def test_the_batch_size_changes_nothing(make_model, make_windows):
    model, ids = make_model(), make_windows(5, 8)
    values = [perplexity.perplexity(model, ids, batch) for batch in (1, 2, 3, 5, 50)]
    assert values == pytest.approx([values[0]] * 5, rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "length", "stride"), [(20, 5, 5), (23, 5, 5), (23, 6, 2), (6, 6, 3), (30, 8, 7), (30, 8, 1)]
)
def test_windows_equal_a_loop(tokens, length, stride):
    expected = []
    for start in range(0, tokens, stride):
        if start + length <= tokens:
            expected.append(list(range(start, start + length)))
    assert perplexity.windows(torch.arange(tokens), length, stride).tolist() == expected
    assert perplexity.windows(torch.arange(tokens), length, stride, 2).tolist() == expected[:2]


@pytest.mark.parametrize(("length", "stride"), [(8, 3), (8, 7), (8, 1), (8, 8)])
def test_no_prediction_counts_twice(length, stride):
    windows = perplexity.windows(torch.arange(40), length, stride)
    predicted = perplexity.counted(windows[:, 1:], stride).tolist()
    first_tokens = set(windows[:, 0].tolist()) if stride == length else {0}
    assert predicted == [token for token in range(windows[-1, -1] + 1) if token not in first_tokens]


def test_a_text_shorter_than_a_window_is_refused_with_both_counts():
    with pytest.raises(InputError, match=r"7 tokens.*needs 8"):
        perplexity.windows(torch.arange(7), 8, 8)


def test_nan_is_refused(make_windows):
    broken = StandIn(96, lambda input_ids: torch.full((*input_ids.shape, 96), math.nan))
    with pytest.raises(InputError, match="not finite"):
        perplexity.perplexity(broken, make_windows(1, 4))


def test_documents_are_joined_by_one_newline_without_special_tokens(model_folder):
    tokenizer = dense_folder.load_tokenizer(model_folder)
    tokens = perplexity.tokenise(tokenizer, ["ab", "c"])
    assert tokens.tolist() == [ord("a") - 30, ord("b") - 30, 1, ord("c") - 30]


def test_tokens_take_four_bytes_and_windows_are_indices(model_folder):
    tokens = perplexity.tokenise(dense_folder.load_tokenizer(model_folder), iter(["ab", "c"]))
    assert tokens.dtype == torch.int32
    assert perplexity.windows(tokens, 2, 2).dtype == torch.int64


def test_the_protocol_s_name_says_length_and_stride():
    assert perplexity.protocol(512, 256) == "joined-512-256-nobos-fp32"


def test_stories260k_has_its_published_perplexity():
    with STORIES_TEXT.open(encoding="utf-8") as lines:
        tokens = perplexity.tokenise(dense_folder.load_tokenizer(STORIES), [json.loads(line)["text"] for line in lines])
    windows = perplexity.windows(tokens, 512, 512, 60)
    assert windows.shape == (60, 512)
    assert perplexity.perplexity(dense_folder.load_dense(STORIES), windows, batch=4) == pytest.approx(5.230, abs=0.005)
