"""Evaluate one model on one task with lm-evaluation-harness (lm_eval 0.4.13): its prompts, its scoring, its metrics.

An item of the stage's matrix is `<model>-<task>`, cached by DVC on its own; data/harness_tasks/<task>.yaml is the task,
`harness_data` brought its documents. Written are samples.jsonl, a line per document with prompt, answer and prediction,
and scores.json:

    {"model": "package", "task": "hellaswag", "evaluated": true,
     "samples": documents asked, "documents": documents there are, "limit": int | null,
     "truncated": requests that were cut from the left to fit the model's context,
     "num_fewshot": 0, "version": of the task, "lm_eval": version of the library, "output_type": "multiple_choice",
     "metrics": {name: {"value": float, "stderr": float | null, "higher_is_better": bool | null}},
     "agreement": null | {"protocol", "documents", "log_likelihood", "relative_difference"}}

or {"model", "task", "evaluated": false} where the stage is switched off. `agreement` is of tasks that score whole
texts: our own log-likelihood of the first of them (`tasks.algorithms.scoring.likelihood`, protocol rolling; nats,
summed) and how far lm_eval's is from it. Standard errors are lm_eval's, null where it has none.

`lm_eval.evaluate` seeds nothing (it draws a task's name from `random`, which nothing else here uses); `simple_evaluate`
would seed random, numpy and torch for the whole process, and run git and pip for a report of its own: so it is the
former. Nothing is fetched and nothing sent. It compares no models.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import layers
from tasks.algorithms.scoring import likelihood, protocols
from tasks.algorithms.text import triviaqa
from tasks.models import dense_folder
from tasks.runners import any_folder
from tasks.runtime import files
from tasks.sources import json_lines

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from tasks.evaluation.lm_eval_model import Model
    from tasks.runtime.stage import Stage

COMPARED = 8
"""Documents whose log-likelihood is computed a second time, for `agreement`: the whole of it would double the work."""


def run(stage: Stage) -> None:
    """Write scores.json and samples.jsonl.

    Raises:
        InputError: the task has no documents, or the model can't be asked.
    """
    model_name, _, task_name = stage.item.partition("-")
    own, folder = stage.params.harness, stage.model_in
    documents = _documents(stage.input("documents.jsonl"), task_name)
    task = load_task(stage.input(f"{task_name}.yaml"), documents)
    from lm_eval import evaluate

    from tasks.evaluation import lm_eval_model

    model, tokenizer = any_folder.load_or_stream(folder, stage.params.device), dense_folder.load_tokenizer(folder)
    lm = lm_eval_model.Model(model, tokenizer, own.batch, stage.progress, stage.answers)
    with layers.opening_themselves(model):
        results = evaluate(lm, {"tasks": {task_name: task}}, limit=own.limit, log_samples=True)
    samples = results["samples"][task_name]
    scores = {
        "model": model_name,
        "task": task_name,
        "evaluated": True,
        "samples": results["n-samples"][task_name]["effective"],
        "documents": results["n-samples"][task_name]["original"],
        "limit": own.limit,
        "truncated": lm.truncated,
        "num_fewshot": results["n-shot"][task_name],
        "version": str(results["versions"][task_name]),
        "lm_eval": metadata.version("lm_eval"),
        "output_type": task.OUTPUT_TYPE,
        "metrics": _metrics(results["results"][task_name], results["higher_is_better"][task_name]),
        "agreement": _agreement(lm, samples, own.batch) if task.OUTPUT_TYPE == "loglikelihood_rolling" else None,
    }
    _write_samples(stage.output("samples.jsonl"), task, samples)
    files.write_json(stage.output("scores.json"), scores)
    print("; ".join(f"{name} {found['value']:.4f}" for name, found in scores["metrics"].items()))
    print(f"{scores['samples']} of {scores['documents']} documents, the model was asked {lm.asked} requests")


def skip(stage: Stage) -> None:
    """Say that nothing was evaluated."""
    model_name, _, task_name = stage.item.partition("-")
    stage.output("samples.jsonl").touch()
    files.write_json(stage.output("scores.json"), {"model": model_name, "task": task_name, "evaluated": False})


def load_task(path: Path, documents: Sequence[dict[str, Any]]) -> Task:
    """The task of a YAML file on these documents, none of which are written to a cache of `datasets`."""
    import datasets
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is done here on purpose
    given = {"task": path.stem, "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(list(documents))}}
    manager = TaskManager(include_path=path.parent, include_defaults=False)
    # values of one's own can be given to a task of a file only as a member of a group (0.4.13)
    return manager.load({"group": "edgepress", "task": [given]})["tasks"][path.stem]


def _documents(path: Path, task_name: str) -> list[dict[str, Any]]:
    documents = [row for _, row in json_lines.rows(path)]
    if not documents:
        raise InputError(f"task {task_name} has no documents; switch harness_data on")
    return documents


def _metrics(results: dict[str, Any], higher_is_better: dict[str, bool]) -> dict[str, dict[str, Any]]:
    """lm_eval's "acc,none" and "acc_stderr,none" as {"acc": {"value", "stderr", "higher_is_better"}}."""
    found = {}
    for name, better in sorted(higher_is_better.items()):
        value, stderr = (
            next(v for k, v in results.items() if k.split(",")[0] == key) for key in (name, f"{name}_stderr")
        )
        if not math.isfinite(value):
            raise InputError(f"the model's {name} is {value}: its log-likelihoods aren't finite; look at its weights")
        found[name] = {
            "value": float(value),
            "stderr": None if stderr == "N/A" else float(stderr),
            "higher_is_better": better,
        }
    return found


def _agreement(lm: Model, samples: Sequence[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Our own log-likelihood of the first texts that lm_eval scored."""
    protocol = protocols.protocol("rolling", lm.max_length, lm.max_length)
    samples = sorted(samples, key=lambda sample: sample["doc_id"])[:COMPARED]
    texts = [sample["arguments"][0][0] for sample in samples]
    own = -float(likelihood.score(lm.model, likelihood.prepare(protocol, lm.tokenizer, texts), batch).nll.sum())
    theirs = sum(sample["filtered_resps"][0] for sample in samples)
    return {
        "protocol": protocol.label,
        "documents": len(texts),
        "log_likelihood": own,
        "relative_difference": abs(theirs - own) / abs(own),
    }


def _write_samples(path: Path, task: Task, samples: Sequence[dict[str, Any]]) -> None:
    describe = {
        "multiple_choice": _choice,
        "generate_until": _generated,
        "loglikelihood_rolling": _scored,
    }[task.OUTPUT_TYPE]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            row = {"document": sample["doc_id"], **describe(task, sample)}
            file.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")


def _choice(task: Task, sample: dict[str, Any]) -> dict[str, Any]:
    """Answer and predictions are indices of the choices; `prediction_norm` is by log-likelihood per character."""
    nats = [answer[0] for answer in sample["filtered_resps"]]
    choices = task.doc_to_choice(sample["doc"])
    per_character = [own / len(choice) for own, choice in zip(nats, choices, strict=True)]
    answer = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    return {
        "prompt": None if task.multiple_input else sample["arguments"][0][0],
        "choices": choices,
        "answer": int(answer),
        "prediction": nats.index(max(nats)),
        "prediction_norm": per_character.index(max(per_character)),
        "log_likelihoods": nats,
    }


def _generated(task: Task, sample: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": sample["arguments"][0][0],
        "answer": sample["target"],
        "prediction": sample["filtered_resps"][0],
        "tier": next((tier for tier in triviaqa.TIERS if sample[tier]), None),
    }


def _scored(task: Task, sample: dict[str, Any]) -> dict[str, Any]:
    return {
        "log_likelihood": sample["filtered_resps"][0],
        "words": sample["word_perplexity"][1],
        "bytes": sample["byte_perplexity"][1],
    }
