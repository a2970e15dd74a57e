"""harness: scores against plain loops and lm_eval's own tasks, what is remembered, and every refusal."""

from __future__ import annotations

import json
import random
import shutil
import socket
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks import harness
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import head, streaming
from tasks.algorithms.scoring import likelihood, protocols
from tasks.algorithms.text import task_documents, triviaqa
from tasks.models import dense_folder
from tasks.models.tokenizer_files import copy_tokenizer
from tasks.runtime.journal import Journal
from tests.stages.test_evaluate import pack
from tests.stages.test_harness_data import HUB_ROWS
from tests.support.paths import DATA, ROOT, SHARED, STORIES, STORIES_TEXT

TASKS = ROOT / "data/harness_tasks"
BUILT_IN = ROOT / "data/base_model/model"

QUERIES = ["The pump", "It rained all day", "A user, once logged in,", "Stop", "Report the state"]
ENDINGS = ["stops at once.", "is late.", "shall report 7 states to the operator.", "no"]
HELLASWAG = [{"query": query, "endings": ENDINGS, "label": at % 4} for at, query in enumerate(QUERIES)]
TEXTS = ["The pump must stop.", " ".join(f"{n} log in within {n} seconds." for n in range(30)), "naïve 😀 end"]
QUESTIONS = [{"question": f"{query}?", "answer": "x", "aliases": ["y"]} for query in QUERIES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("harness") / "model")


@pytest.fixture
def make(make_stage, tmp_path: Path, folder: Path):
    """make(task, documents, model=…, limit=None, batch=2, answers=None, out="out") -> the stage."""

    def made(task, documents, model=folder, limit=None, batch=2, answers=None, out="out"):
        path = tmp_path / "documents.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        inputs = {"model": model, path.name: path, f"{task}.yaml": TASKS / f"{task}.yaml"}
        params = {"harness": {"limit": limit, "batch": batch}}
        return make_stage(params, inputs, out, item=f"package-{task}", answers=answers)

    return made


def written(stage: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the stage; scores and samples."""
    harness.run(stage)
    lines = stage.output("samples.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(stage.output("scores.json").read_text()), [json.loads(line) for line in lines]


def read(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:most]]


def naive(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    """Nats of a choice after a prompt, token by token, in double precision."""
    ids, start = tokenizer(f"{prompt} {choice}")["input_ids"], len(tokenizer(prompt)["input_ids"])
    total = 0.0
    for at in range(start, len(ids)):
        with torch.no_grad():
            total += float(model(torch.tensor([ids[:at]])).logits[0, -1].double().log_softmax(-1)[ids[at]])
    return total


def as_loops(
    scores: dict[str, Any], samples: list[dict[str, Any]], documents: list[dict[str, Any]], model: Path
) -> None:
    """acc and acc_norm, and what they are made of, are those of plain loops."""
    loaded, tokenizer = dense_folder.load_dense(model), dense_folder.load_tokenizer(model)
    right, right_norm = [], []
    for document, sample in zip(documents, samples, strict=True):
        nats = [naive(loaded, tokenizer, document["query"], ending) for ending in document["endings"]]
        assert sample["log_likelihoods"] == pytest.approx(nats, rel=1e-4)
        norm = [own / len(ending) for own, ending in zip(nats, document["endings"], strict=True)]
        right.append(nats.index(max(nats)) == document["label"])
        right_norm.append(norm.index(max(norm)) == document["label"])
        assert (sample["prediction"] == sample["answer"], sample["prediction_norm"] == sample["answer"]) == (
            right[-1],
            right_norm[-1],
        )
    assert scores["metrics"]["acc"]["value"] == np.mean(right)
    assert scores["metrics"]["acc_norm"]["value"] == np.mean(right_norm)
    assert scores["metrics"]["acc"]["stderr"] == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5)


def test_hellaswag_is_what_plain_loops_say(make, folder: Path) -> None:
    scores, samples = written(make("hellaswag", HELLASWAG))
    as_loops(scores, samples, HELLASWAG, folder)
    assert (scores["model"], scores["task"], scores["evaluated"]) == ("package", "hellaswag", True)
    assert (scores["samples"], scores["documents"], scores["limit"], scores["truncated"]) == (5, 5, None, 0)
    assert (scores["num_fewshot"], scores["lm_eval"], scores["agreement"]) == (0, "0.4.13", None)
    assert samples[1] | {"document": 1, "prompt": QUERIES[1], "choices": ENDINGS, "answer": 1} == samples[1]


def test_a_real_model_on_hellaswag_is_what_plain_loops_say(make) -> None:
    documents = read(DATA / "hellaswag/validation.jsonl")
    scores, samples = written(make("hellaswag", documents, STORIES, limit=4, batch=8))
    assert (scores["samples"], scores["documents"], scores["limit"]) == (4, 12, 4)
    as_loops(scores, samples, documents[:4], STORIES)


OWN = {"hellaswag": "hellaswag", "arc_easy": "arc", "piqa": "piqa", "winogrande": "winogrande", "wikitext": "wikitext"}
"""Tasks that lm_eval has, too, and the folders it has them in."""


@pytest.mark.parametrize("name", OWN)
def test_requests_and_targets_are_those_of_lm_eval_s_own_task(name: str, tmp_path: Path) -> None:
    import datasets
    from lm_eval.tasks import TaskManager

    rows = HUB_ROWS.get(name, [{"page": ' = A = \n \n He said : " it \'s @-@ so . " \n'}])
    installed = Path(util.find_spec("lm_eval").origin).parent / "tasks" / OWN[name]
    data = dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(rows))
    given = {"task": name, "custom_dataset": lambda **_: data}
    manager = TaskManager(include_path=installed, include_defaults=False)
    theirs = manager.load({"group": "theirs", "task": [given]})["tasks"][name]
    documents = list(task_documents.documents(name, rows))
    ours = harness.load_task(TASKS / f"{name}.yaml", documents)
    for task in (ours, theirs):
        task.build_all_requests(limit=None, rank=0, world_size=1)
    assert ours.instances
    assert [own.args for own in ours.instances] == [own.args for own in theirs.instances]
    assert ours.OUTPUT_TYPE == theirs.OUTPUT_TYPE and ours.VERSION == theirs.VERSION
    answers = [(-1.0 - own.idx, False) if "rolling" not in ours.OUTPUT_TYPE else -7.0 for own in ours.instances]
    judged = [task.process_results(doc, answers) for task, doc in ((ours, documents[0]), (theirs, theirs.eval_docs[0]))]
    assert judged[0] and judged[0] == judged[1]


def test_winogrande_is_scored_after_each_option(make) -> None:
    rows = [{"sentence": "It is _ at last .", "option1": "he", "option2": "she", "answer": "2"}] * 2
    scores, samples = written(make("winogrande", rows))
    assert samples[0]["answer"] == 1 and samples[0]["choices"] == ["It is he", "It is she"]
    assert scores["metrics"]["acc"]["value"] == float(samples[0]["prediction"] == 1)


@pytest.mark.parametrize("name", ["triviaqa_closed", "triviaqa_open"])
def test_answers_are_the_greedy_ones_of_a_plain_loop(name: str, make, folder: Path) -> None:
    model, tokenizer = dense_folder.load_dense(folder), dense_folder.load_tokenizer(folder)
    documents = [{**row, "context": "Tea."} if name == "triviaqa_open" else row for row in QUESTIONS]
    scores, samples = written(make(name, documents))
    for row, sample in zip(documents, samples, strict=True):
        prompt = f"Question: {row['question']}\nAnswer:"
        prompt = f"Context: Tea.\n{prompt}" if name == "triviaqa_open" else prompt
        ids = tokenizer(prompt)["input_ids"]
        assert sample["prompt"] == prompt and len(ids) + 50 <= 128
        said: list[int] = []
        while len(said) < 50 and "\n" not in tokenizer.decode(said):
            with torch.no_grad():
                logits = model(torch.tensor([ids + said])).logits[0, -1]
            logits[0] = logits[0] if said else -torch.inf  # the end, not as the first token
            said.append(int(logits.argmax()))
            if said[-1] == 0:
                break
        assert sample["prediction"] == tokenizer.decode(said, skip_special_tokens=True).partition("\n")[0]
        assert sample["tier"] == triviaqa.tier(sample["prediction"], ["x", "y"])
    shares = {tier: np.mean([sample["tier"] == tier for sample in samples]) for tier in triviaqa.TIERS}
    metrics = {metric: found["value"] for metric, found in scores["metrics"].items()}
    assert metrics == pytest.approx(shares | {"correct": sum(shares.values())})


def test_each_tier_s_share_is_reported(make, folder: Path) -> None:
    """The model's own answers as aliases: whole, in part, and shuffled."""
    _, samples = written(make("triviaqa_closed", QUESTIONS))
    said = [triviaqa.normalise(sample["prediction"]) for sample in samples]
    first = next(at for at, text in enumerate(said) if len(text.split()) > 2)
    words = said[first].split()
    aliases = [said[first], said[first][1:], " ".join([*words[1:], words[0]]), "unheard of"]
    documents = [QUESTIONS[first] | {"answer": "zzzzz", "aliases": [alias]} for alias in aliases]
    scores, again = written(make("triviaqa_closed", documents, out="again"))
    assert [sample["tier"] for sample in again] == ["exact", "substring", "words", None]
    values = {name: found["value"] for name, found in scores["metrics"].items()}
    assert values == {"exact": 0.25, "substring": 0.25, "words": 0.25, "correct": 0.75}


def test_long_prompts_are_cut_from_the_left_and_counted(make, folder: Path) -> None:
    long = {**QUESTIONS[0], "context": "tea " * 60}
    scores, samples = written(make("triviaqa_open", [long, {**long, "context": "Tea."}]))
    assert scores["truncated"] == 1
    _, shorter = written(make("triviaqa_open", [{**long, "context": "tea " * 50}], out="shorter"))
    assert shorter[0]["prediction"] == samples[0]["prediction"]  # the same last 78 tokens
    assert written(make("hellaswag", [HELLASWAG[0] | {"query": "tea " * 40}], out="c"))[0]["truncated"] == 4


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared: TriviaQA has no licence to pass on")
@pytest.mark.parametrize("task, file", [("triviaqa_closed", "closed_book"), ("triviaqa_open", "with_context")])
def test_triviaqa_runs_on_real_questions(task: str, file: str, make) -> None:
    rows = read(SHARED / f"data/triviaqa/{file}.jsonl")
    documents = [document for document in task_documents.documents(task, rows) if document]
    scores, samples = written(make(task, documents, STORIES, limit=8, batch=8))
    assert (scores["samples"], scores["documents"]) == (8, {"closed_book": 150, "with_context": 24}[file])
    assert all(sample["prediction"] and "\n" not in sample["prediction"] for sample in samples)
    assert set(scores["metrics"]) == {"exact", "substring", "words", "correct"}


ROLLING = {
    "built-in": (BUILT_IN, ROOT / "data/grammar/prose.jsonl", 8),
    "stories260k": (STORIES, STORIES_TEXT, 6),
}


@pytest.mark.parametrize("name", ROLLING)
def test_our_perplexity_agrees_with_lm_eval_s(name: str, make) -> None:
    model, path, most = ROLLING[name]
    texts = [row["text"] for row in read(path, most)]
    texts.append(" ".join(texts))  # longer than the model's context
    scores, samples = written(make("corpus", [{"text": text} for text in texts], model, batch=4))
    agreed = scores["agreement"]
    assert (agreed["protocol"], agreed["documents"]) == ("rolling-512", min(8, len(texts)))
    assert agreed["relative_difference"] < 1e-4
    prepared = likelihood.prepare(protocols.protocol("rolling", 512, 512), dense_folder.load_tokenizer(model), texts)
    assert len(prepared.windows) > len(texts)
    own = likelihood.score(dense_folder.load_dense(model), prepared, 4)
    assert -own.by_document()["nll"] == pytest.approx([sample["log_likelihood"] for sample in samples], rel=1e-4)
    assert scores["metrics"]["bits_per_byte"]["value"] == pytest.approx(own.bits_per_byte, rel=1e-4)
    size = sum(len(text.encode()) for text in texts)
    assert scores["metrics"]["byte_perplexity"]["value"] == pytest.approx(np.exp(float(own.nll.sum()) / size), rel=1e-4)


@pytest.mark.parametrize(("task", "documents"), [("hellaswag", HELLASWAG), ("corpus", [{"text": t} for t in TEXTS])])
def test_the_batch_size_changes_nothing(task: str, documents: list[dict[str, Any]], make) -> None:
    found = [written(make(task, documents, batch=batch, out=f"b{batch}")) for batch in (1, 3, 50)]
    key = "log_likelihoods" if task == "hellaswag" else "log_likelihood"
    nats = [np.array([sample[key] for sample in samples]) for _, samples in found]
    for other, own in zip(found[1:], nats[1:], strict=True):
        assert own == pytest.approx(nats[0], rel=1e-6)
        for name, metric in found[0][0]["metrics"].items():
            assert other[0]["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-6)


def test_a_packed_model_has_the_scores_of_its_original(make, folder: Path, tmp_path: Path) -> None:
    other = pack(dense_folder.load_dense(folder), tmp_path / "packed")
    copy_tokenizer(folder, other)
    assert written(make("hellaswag", HELLASWAG, other)) == written(make("hellaswag", HELLASWAG))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Forward passes of scored texts, by their number of rows."""
    made, ask = [], head.states

    def counted(model, input_ids):
        made.append(len(input_ids))
        return ask(model, input_ids)

    monkeypatch.setattr(head, "states", counted)
    return made


MANY = [HELLASWAG[at % 5] | {"query": f"{at} {HELLASWAG[at % 5]['query']}"} for at in range(40)]  # 160 requests


def test_a_repeated_run_asks_the_model_nothing(make, calls: list[int], tmp_path: Path) -> None:
    plain = make("hellaswag", MANY, out="plain")
    written(plain)
    asked = len(calls)
    for out in ("first", "second"):
        stage = make("hellaswag", MANY, answers=Journal(tmp_path / "answers", 0), out=out)
        written(stage)
        for name in ("scores.json", "samples.jsonl"):
            assert stage.output(name).read_bytes() == plain.output(name).read_bytes()
    assert len(calls) == 2 * asked


def test_the_longest_are_asked_first_and_only_what_is_scored_has_logits(make, folder: Path, monkeypatch) -> None:
    """The last document is the longest: 99 characters, of which no logits are made."""
    shapes, rows, ask = [], [], head.states
    monkeypatch.setattr(head, "states", lambda model, ids: shapes.append(tuple(ids.shape)) or ask(model, ids))
    from tasks.runners import any_folder

    model = dense_folder.load_dense(folder)
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: rows.append(len(out)))
    monkeypatch.setattr(any_folder, "load_model", lambda _: model)
    documents = [*MANY, HELLASWAG[0] | {"query": ("pump " * 20).strip(), "endings": ["x"] * 4}]
    written(make("hellaswag", documents, batch=4))
    assert shapes[0] == (4, 100)  # the choice's last character is no input
    assert rows[0] == 4 * len(" x")
    lengths = [width for _, width in shapes]
    assert lengths[:9] == sorted(lengths[:9], reverse=True)  # the last 36 of 164 requests, in batches of 4


def test_another_limit_asks_for_the_rest_alone(make, calls: list[int], tmp_path: Path) -> None:
    whole = written(make("hellaswag", MANY, out="whole"))
    calls.clear()
    assert written(make("hellaswag", MANY, limit=32, answers=Journal(tmp_path / "answers", 0)))[0]["samples"] == 32
    assert sum(calls) == 128
    assert written(make("hellaswag", MANY, answers=Journal(tmp_path / "answers", 0))) == whole
    assert sum(calls) == 160


def test_a_killed_run_goes_on_where_it_was(make, calls: list[int], tmp_path: Path, monkeypatch) -> None:
    plain = make("hellaswag", MANY, out="plain")
    written(plain)
    calls.clear()
    ask = head.states

    def killed(*given):
        if sum(calls) >= 100:
            raise KeyboardInterrupt
        return ask(*given)

    with monkeypatch.context() as patch:
        patch.setattr(head, "states", killed)
        with pytest.raises(KeyboardInterrupt):
            harness.run(make("hellaswag", MANY, answers=Journal(tmp_path / "answers", 0)))
    calls.clear()
    stage = make("hellaswag", MANY, answers=Journal(tmp_path / "answers", 0))
    written(stage)
    assert sum(calls) == 160 - 64  # one chunk was done
    assert stage.output("samples.jsonl").read_bytes() == plain.output("samples.jsonl").read_bytes()


def test_no_generator_is_seeded_or_matters_and_nothing_leaves_the_machine(make, monkeypatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    found = []
    for seed in (1, 2):
        random.seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            np.random.seed(seed)
            before = torch.get_rng_state(), np.random.get_state()[1].tolist()
            found.append(written(make("triviaqa_closed", QUESTIONS, out=str(seed))))
            assert torch.equal(torch.get_rng_state(), before[0])
            assert np.random.get_state()[1].tolist() == before[1]
    assert found[0] == found[1]


def test_no_documents_is_a_sentence_before_weights_are_read(make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="task piqa has no documents; switch harness_data on"):
        harness.run(make("piqa", [], model=tmp_path / "no model here"))


def altered(folder: Path, tmp_path: Path, change) -> Path:
    """A copy of the model's folder, after `change(folder)`."""
    copy = tmp_path / "altered"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def without_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if not key.endswith("os_token")}))


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def short(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 40}))


REFUSED = {
    "no end": ("hellaswag", HELLASWAG, without_end, "lm_eval needs a tokenizer with an eos token"),
    "not finite": ("corpus", [{"text": "x y"}], not_finite, "log-likelihoods aren't finite"),
    "no room": ("triviaqa_closed", QUESTIONS, short, "context of 40 tokens leaves no room for a prompt beside 50"),
    "a long choice": (
        "hellaswag",
        [HELLASWAG[0] | {"endings": ["no", "yes " * 40]}],
        lambda _: None,
        "the choice ' yes yes .* has 161 tokens, expected 1 to 128",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_evaluated_is_one_sentence(name: str, make, folder: Path, tmp_path: Path) -> None:
    task, documents, change, sentence = REFUSED[name]
    with pytest.raises(InputError, match=sentence) as caught:
        harness.run(make(task, documents, altered(folder, tmp_path, change)))
    assert "\n" not in str(caught.value)


def test_off_says_that_nothing_was_evaluated(make) -> None:
    stage = make("corpus", [])
    harness.skip(stage)
    expected = {"model": "package", "task": "corpus", "evaluated": False}
    assert json.loads(stage.output("scores.json").read_text()) == expected
    assert stage.output("samples.jsonl").read_text() == ""


@pytest.mark.parametrize("task", ["hellaswag", "corpus", "triviaqa_closed"])
def test_a_model_whose_blocks_are_opened_one_by_one_has_the_same_bytes(task, make, monkeypatch) -> None:
    documents = {"hellaswag": HELLASWAG, "corpus": [{"text": text} for text in TEXTS], "triviaqa_closed": QUESTIONS}[
        task
    ]
    found = []
    for out, whole, states in (("whole", 2**31, 2**26), ("streamed", 0, 2**26), ("few", 0, 64)):
        monkeypatch.setattr(streaming, "WHOLE", whole)
        monkeypatch.setattr(streaming, "STATES", states)
        stage = make(task, documents, out=out)
        harness.run(stage)
        found.append([stage.output(name).read_bytes() for name in ("scores.json", "samples.jsonl")])
    assert found[0] == found[1] == found[2]
