"""A loaded model as lm_eval asks it: every answer is noted, so that a killed or repeated run asks for the rest alone.

lm_eval 0.4.13 has caches of its own, which aren't used: they are pickles, under a name that says nothing of the model,
and what was left to ask would be batched otherwise, and round otherwise. Here requests go to the model in chunks of
consecutive ones, whatever the limit, and an answer is saved under a hash of its chunk: the same bytes with and without
what is saved. That belongs to one model, one code and one set of libraries (`tasks.runtime.journal`).

`HFLM` shares logits between requests of equal inputs (`logits_cache`): where the scored parts are of unequal length it
takes the wrong ones, so that is off. It adds a bos token where the tokenizer does, as lm_eval's command; never in front
of a document that is scored whole, which has it as its prefix already.

`HFLM` makes the logits of all tokens of a batch, and its batches of texts scored as a whole follow the texts' order.
Here batches are made by length, the longest first (`tasks.algorithms.scoring.batches`), and logits for the scored
tokens alone, a few rows at a time: memory follows the length of the documents, not the model's context.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, head
from tasks.algorithms.scoring import batches

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Scored = tuple[Any, list[int], list[int]]
"""A request in tokens: what lm_eval calls it, its context, its continuation."""
CHUNK = 64
"""Requests that are asked and noted together."""


class Model(HFLM):
    """lm_eval's wrapper of a transformers model, which takes answers of earlier runs.

    Args:
        model: on its device, in evaluation mode; of any folder that `tasks.runners.any_folder` loads.
        batch: requests per forward pass.
        progress: a stage's.
        saved: answers of earlier runs with the same model, code and libraries.

    Attributes:
        asked: requests that the model was asked, whose answers were not saved.
        truncated: requests that were cut from the left to fit the model's context.

    Raises:
        InputError: the tokenizer has no eos token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch: int,
        progress: Callable[[str, int], Any],
        saved: checkpoints.Saved = checkpoints.NOTHING,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError("lm_eval needs a tokenizer with an eos token; set `eos_token` in tokenizer_config.json")
        super().__init__(model, tokenizer=tokenizer, batch_size=batch, logits_cache=False)
        self.saved, self.progress = saved, progress
        self.asked = self.truncated = 0

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each (context, continuation): nats, and whether it is the greedy one."""
        for context, continuation in (request.args for request in requests):
            before, after = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
            if not 0 < len(after) <= self.max_length:
                raise InputError(
                    f"the choice {continuation[:40]!r} has {len(after)} tokens, expected 1 to {self.max_length},"
                    " the model's context; take another task or model"
                )
            self.truncated += len(before) + len(after) > self.max_length + 1
        return [tuple(answer) for answer in self._answered("loglikelihood", super().loglikelihood, requests)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of each text: nats of all its tokens, in windows of the model's context."""
        before, self.add_bos_token = self.add_bos_token, False
        try:
            return self._answered("loglikelihood_rolling", self._rolling, requests)
        finally:
            self.add_bos_token = before

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        """Of each (context, arguments of generation): the continuation up to a stop sequence."""
        for context, how in (request.args for request in requests):
            room = self.max_length - how["max_gen_toks"]
            if room < 1:
                raise InputError(
                    f"the model's context of {self.max_length} tokens leaves no room for a prompt beside"
                    f" {how['max_gen_toks']} new tokens; take another task or model"
                )
            self.truncated += len(self.tok_encode(context)) > room
        return self._answered("generate_until", self._generated, requests)

    def _rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[float]:
        cut = [
            [
                (None, *utils.make_disjoint_window(window))
                for window in utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            for request in requests
        ]
        answers = iter(self._loglikelihood_tokens([window for windows in cut for window in windows]))
        return [sum(next(answers)[0] for _ in windows) for windows in cut]

    def _generated(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        lengths = []
        for context, how in (request.args for request in requests):
            new = how["max_gen_toks"]
            lengths.append(min(len(self.tok_encode(context)), self.max_length - new) + new)
        answers: dict[int, str] = {}
        for batch in batches.by_length(lengths, self.batch_size):
            several = [requests[at] for at in batch]
            answers |= zip(batch, super().generate_until(several, disable_tqdm=True), strict=True)
        return [answers[at] for at in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each continuation: nats, and whether it is the greedy one; what is too long is cut from the left."""
        tokens = [[*before, *after][-(self.max_length + 1) :] for _, before, after in requests]
        several = batches.by_length([len(each) - 1 for each in tokens], self.batch_size)
        inputs = [_padded([tokens[at] for at in batch]) for batch in several]
        answers: dict[int, tuple[float, bool]] = {}
        with torch.no_grad():
            states = head.states_of(self.model, [each.to(self.device) for each in inputs])
            for batch, given, said in zip(several, inputs, states, strict=True):
                hidden = said.unflatten(0, given.shape)  # [batch, length, hidden]
                scored = [len(requests[at][2]) for at in batch]
                answers |= zip(batch, self._scored(hidden, [tokens[at] for at in batch], scored), strict=True)
        return [answers[at] for at in range(len(requests))]

    def _scored(
        self, hidden: torch.Tensor, tokens: Sequence[list[int]], scored: Sequence[int]
    ) -> Iterator[tuple[float, bool]]:
        """Answers of a batch with these inputs of the head; of each text the last `scored` tokens count."""
        ends = [len(text) - 1 for text in tokens]
        parts = [one[end - count : end] for one, end, count in zip(hidden, ends, scored, strict=True)]
        wanted = torch.tensor([token for text, count in zip(tokens, scored, strict=True) for token in text[-count:]])
        nats, greedy = [], []  # of all scored tokens, in order
        for rows, logits in head.logits(self.model, torch.cat(parts)):
            logs, target = logits.float().log_softmax(dim=-1), wanted[rows].to(self.device)
            nats.append(logs.gather(1, target[:, None]).squeeze(1).cpu())
            greedy.append((logs.argmax(dim=-1) == target).cpu())
        counts = list(scored)
        for one, same in zip(torch.cat(nats).split(counts), torch.cat(greedy).split(counts), strict=True):
            yield float(one.sum()), bool(same.all())

    def _answered(self, kind: str, ask: Callable[..., list[Any]], requests: Sequence[Instance]) -> list[Any]:
        """The answers in the order of the requests, from what is saved as far as it goes.

        Of the chunks that with the longest request is asked first.
        """
        chunks = [requests[start : start + CHUNK] for start in range(0, len(requests), CHUNK)]
        longest = [max(len("".join(map(str, request.args))) for request in chunk) for chunk in chunks]
        answers: dict[int, list[Any]] = {}
        with self.progress(kind, len(requests)) as bar:
            for at in sorted(range(len(chunks)), key=lambda at: -longest[at]):
                described = json.dumps([kind, self.batch_size, [each.args for each in chunks[at]]], sort_keys=True)
                key = hashlib.sha256(described.encode()).hexdigest()
                known = self.saved.load(key)
                if known is None:
                    self.asked += len(chunks[at])
                    found = ask(chunks[at], disable_tqdm=True)
                    self.saved.save(key, {}, found)
                answers[at] = found if known is None else known.values
                bar.update(sum(map(len, answers.values())))
        return [answer for at in range(len(chunks)) for answer in answers[at]]


def _padded(tokens: Sequence[list[int]]) -> torch.Tensor:
    """What a model gets of a batch whose first text is the longest: int64 [batch, length], padded at the end."""
    inputs = torch.zeros(len(tokens), len(tokens[0]) - 1, dtype=torch.int64)
    for row, text in zip(inputs, tokens, strict=True):
        row[: len(text) - 1] = torch.tensor(text[:-1])
    return inputs
