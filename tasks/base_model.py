"""Train the built-in model: a small Llama or GPT-2 with its own byte-level BPE, from scratch, on the built-in corpus.

Run once; the stage is frozen and its weights are committed. How it is trained says `tasks.built_in_model.training`.
Documents are joined by a newline and no bos is set, as in the evaluation.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from tasks.algorithms.scoring import perplexity
from tasks.built_in_model import tokenizer, training
from tasks.models import dense_folder, skeleton
from tasks.runtime import files
from tasks.sources import json_lines

if TYPE_CHECKING:
    from tasks.runtime.stage import Stage

SPLITS = ("calibration", "test")
MEASURED = 24
"""Windows of a split that a point of the curve is measured on."""


def run(stage: Stage) -> None:
    """Write the model folder and training.csv (step, tokens, loss in nats per token, perplexities)."""
    p = stage.params.base_model
    texts = {name: json_lines.read(stage.input("corpus") / f"{name}.jsonl") for name in ("train", *SPLITS)}
    bpe = tokenizer.train_tokenizer(texts["train"], p.vocabulary, p.context)
    tokens = perplexity.tokenise(bpe, texts["train"]).long()
    held_out = {
        name: perplexity.windows(perplexity.tokenise(bpe, texts[name]), p.context, p.context, MEASURED)
        for name in SPLITS
    }
    made = training.model(p, bpe)
    model = skeleton.with_linears(copy.deepcopy(made))
    print(f"{sum(w.numel() for w in model.parameters()):,} parameters, {len(tokens):,} distinct training tokens")
    curve = training.train(model, tokens, held_out, p, stage)
    turned = skeleton.turned(made)
    made.load_state_dict({name: w.T if name in turned else w for name, w in model.state_dict().items()})
    dense_folder.save_dense(made, bpe, stage.output("model"))
    files.write_csv(stage.output("training.csv"), curve, "%.6g")
