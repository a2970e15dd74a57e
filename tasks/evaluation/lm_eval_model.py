"""A loaded model as lm_eval asks it: every answer is noted, so that a killed or repeated run asks for the rest alone.

lm_eval 0.4.13 has caches of its own, which aren't used: they are pickles, under a name that says nothing of the model,
and what was left to ask would be batched otherwise, and round otherwise. Here requests go to the model in chunks of
consecutive ones, whatever the limit, and an answer is saved under a hash of its chunk: the same bytes with and without
what is saved. That belongs to one model, one code and one set of libraries (`tasks.runtime.journal`).

`HFLM` shares logits between requests of equal inputs (`logits_cache`): where the scored parts are of unequal length it
takes the wrong ones, so that is off. It adds a bos token where the tokenizer does, as lm_eval's command; never in front
of a document that is scored whole, which has it as its prefix already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

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
            return self._answered("loglikelihood_rolling", super().loglikelihood_rolling, requests)
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
        return self._answered("generate_until", super().generate_until, requests)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _answered(self, kind: str, ask: Callable[..., list[Any]], requests: Sequence[Instance]) -> list[Any]:
        """The answers in the order of the requests, from what is saved as far as it goes."""
        answers: list[Any] = []
        with self.progress(kind, len(requests)) as bar:
            for start in range(0, len(requests), CHUNK):
                chunk = requests[start : start + CHUNK]
                described = json.dumps([kind, self.batch_size, [request.args for request in chunk]], sort_keys=True)
                key = hashlib.sha256(described.encode()).hexdigest()
                known = self.saved.load(key)
                if known is None:
                    self.asked += len(chunk)
                    found = ask(chunk, disable_tqdm=True)
                    self.saved.save(key, {}, found)
                answers += found if known is None else known.values
                bar.update(len(answers))
        return answers
