"""Scores under each protocol against loops, closed forms, and lm-evaluation-harness's own code on the same text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.scoring import likelihood, perplexity, protocols
from tasks.models import dense_folder
from tests.support.paths import ROOT, SHARED, STORIES, STORIES_TEXT
from tests.support.stand_in import StandIn

BUILT_IN = ROOT / "data/base_model/model"
DOCUMENTS = ["The pump must stop.", "", "x", "It rained all day, and then some more.", "naïve 😀", "End"]
SHORT = {"gptq-2048": ("\n\n", 16, 16), "thesis-512": (None, 16, None)}


def own(name: str, length: int = 16, stride: int = 16) -> protocols.Protocol:
    """A protocol; the two of fixed length with windows of 16."""
    made = protocols.protocol(name, length, stride)
    return made if not made.fixed else protocols.Protocol(name, *SHORT[name], partial=made.partial, fixed=True)


@pytest.fixture
def loaded(model_folder: Path) -> tuple[Any, Any]:
    tokenizer = dense_folder.load_tokenizer(model_folder)
    tokenizer.bos_token = "A"
    return dense_folder.load_dense(model_folder), tokenizer


def naive(model: Any, ids: list[int], at: int, start: int) -> float:
    """Nats of token `at`, given those from `start` on, in double precision."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[start:at]])).logits[0, -1].double()
    return float(-logits.log_softmax(-1)[ids[at]])


@pytest.mark.parametrize("name", protocols.NAMES)
def test_a_score_equals_a_loop_over_single_predictions(name: str, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    protocol = own(name, 16, 16 if name != "sliding" else 5)
    prepared = likelihood.prepare(protocol, tokenizer, DOCUMENTS)
    expected, sizes = [], []
    for text, start, stop, first in prepared.windows:
        ids = prepared.ids[text].tolist()
        texts = DOCUMENTS if protocol.join is None else [protocol.join.join(DOCUMENTS)]
        piece = texts[text]  # a token is a character
        for at in range(first, stop):
            expected.append(naive(model, ids, at, start))
            sizes.append(len(piece[at - protocol.prefix].encode()))
    score = likelihood.score(model, prepared, batch=3)
    assert len(expected) > 35
    assert score.nll.tolist() == pytest.approx(expected, abs=2e-5)
    assert score.spans.tolist() == sizes
    assert score.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / sum(sizes), rel=1e-5)


@pytest.mark.parametrize("name", protocols.NAMES)
def test_the_batch_size_changes_nothing(name: str, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prepared = likelihood.prepare(own(name), tokenizer, DOCUMENTS)
    scores = [likelihood.score(model, prepared, batch) for batch in (1, 2, 3, 50)]
    assert [s.perplexity for s in scores] == pytest.approx([scores[0].perplexity] * 4, rel=1e-6)
    assert [s.bits_per_byte for s in scores] == pytest.approx([scores[0].bits_per_byte] * 4, rel=1e-6)


def test_padding_is_never_counted_and_never_seen(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    together = likelihood.score(model, likelihood.prepare(own("thesis-512"), tokenizer, DOCUMENTS), batch=9)
    alone = [
        likelihood.score(model, likelihood.prepare(own("thesis-512"), tokenizer, [document])).nll
        for document in DOCUMENTS
        if len(document) > 1
    ]
    assert len(together.nll) == sum(min(len(document), 16) - 1 for document in DOCUMENTS if len(document) > 1)
    assert together.nll.tolist() == pytest.approx(torch.cat(alone).tolist(), abs=1e-5)


@pytest.mark.parametrize("stride", [16, 5])
def test_joined_is_what_it_always_was(stride: int, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    windows = perplexity.windows(perplexity.tokenise(tokenizer, DOCUMENTS), 16, stride, 3)
    before = perplexity.token_nll(model, windows, 2)
    score = likelihood.score(model, likelihood.prepare(own("joined", 16, stride), tokenizer, DOCUMENTS, 3), 2)
    assert score.label == perplexity.protocol(16, stride)
    assert score.perplexity == perplexity.from_nll(before, stride)
    assert torch.equal(score.nll, perplexity.counted(before, stride))


@pytest.mark.parametrize("name", protocols.NAMES)
def test_a_model_that_knows_nothing_has_the_vocabulary_s_size(name: str, loaded: tuple[Any, Any]) -> None:
    uniform = StandIn(96, lambda input_ids: torch.zeros(*input_ids.shape, 96))
    score = likelihood.score(uniform, likelihood.prepare(own(name), loaded[1], ["the tin " * 9]), 2)
    assert score.perplexity == pytest.approx(96, rel=1e-6)
    assert score.bits_per_byte == pytest.approx(math.log2(96), rel=1e-6)  # a token is a byte


@pytest.mark.parametrize("name", protocols.NAMES)
def test_the_documents_sums_are_those_of_their_own_characters(name: str, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    protocol = own(name)
    prepared = likelihood.prepare(protocol, tokenizer, DOCUMENTS)
    score = likelihood.score(model, prepared)
    rows = score.by_document()
    assert rows["nll"].sum() == pytest.approx(float(score.nll.sum()))
    assert rows["predictions"].sum() == len(score.nll) and rows["bytes"].sum() == int(score.spans.sum())
    ends = np.cumsum([len(document) + len(protocol.join or "") for document in DOCUMENTS])
    counted = [0] * len(DOCUMENTS)
    for text, _, stop, first in prepared.windows:
        for at in range(first, stop):
            counted[text if protocol.join is None else int((ends <= at).sum())] += 1
    assert dict(zip(rows["document"].tolist(), rows["predictions"].tolist(), strict=True)) == {
        document: count for document, count in enumerate(counted) if count
    }


def test_a_prefix_needs_a_token(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="rolling-16 begins each document with .*bos or eos token"):
        likelihood.prepare(own("rolling"), tokenizer, DOCUMENTS)


MODELS = {
    "built-in": BUILT_IN,
    "stories260k": STORIES,
    "story-656k": SHARED / "models/story-656k",
}


@pytest.fixture(scope="module", params=MODELS)
def harness(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """lm-evaluation-harness's wrapper of a real model, the model, its tokenizer."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    folder = MODELS[request.param]
    if not folder.exists():
        pytest.skip("needs ../shared: story-656k, 2.7 MB")
    model, tokenizer = dense_folder.load_dense(folder), dense_folder.load_tokenizer(folder)
    return huggingface.HFLM(model, tokenizer=tokenizer, batch_size=2, add_bos_token=False), model, tokenizer


# Not periodic: two windows of equal inputs in one batch got another sum from the harness than each in its own batch.
TEXTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her ball.",
    " ".join(f"{n}. The system must log in each user within {n} seconds, say 'at once'." for n in range(60)),
]


def test_rolling_agrees_with_lm_evaluation_harness(harness: tuple[Any, Any, Any]) -> None:
    from lm_eval.api.instance import Instance

    lm, model, tokenizer = harness
    requests = [Instance("loglikelihood_rolling", {}, (text,), at) for at, text in enumerate(TEXTS)]
    expected = [-total for total in lm.loglikelihood_rolling(requests, disable_tqdm=True)]
    prepared = likelihood.prepare(protocols.protocol("rolling", lm.max_length, 1), tokenizer, TEXTS)
    assert len(prepared.windows) > 2
    found = likelihood.score(model, prepared, batch=2)
    assert found.by_document()["nll"].tolist() == pytest.approx(expected, rel=1e-4)
    total = sum(len(text.encode()) for text in TEXTS)
    assert found.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / total, rel=1e-4)


@pytest.mark.parametrize("name", ["joined", "sliding", "thesis-512"])
def test_the_other_protocols_agree_with_lm_evaluation_harness_s_token_scores(
    name: str, harness: tuple[Any, Any, Any]
) -> None:
    lm, model, tokenizer = harness
    prepared = likelihood.prepare(protocols.protocol(name, 256, 128), tokenizer, TEXTS)
    requests = []
    for text, start, stop, first in prepared.windows:
        ids = prepared.ids[text].tolist()
        requests.append((("", f"{text} {start}"), ids[start:first], ids[first:stop]))
    expected = [-total for total, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]
    found = likelihood.score(model, prepared, batch=3)
    assert found.nll.sum() == pytest.approx(sum(expected), rel=1e-4)
    assert math.log(found.perplexity) == pytest.approx(sum(expected) / len(found.nll), rel=1e-4)


def test_stories260k_has_its_published_perplexity() -> None:
    with STORIES_TEXT.open(encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    prepared = likelihood.prepare(
        protocols.protocol("joined", 512, 512), dense_folder.load_tokenizer(STORIES), documents, 60
    )
    assert len(prepared.windows) == 60
    assert likelihood.score(dense_folder.load_dense(STORIES), prepared, 4).perplexity == pytest.approx(5.230, abs=0.005)
