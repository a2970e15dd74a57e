"""A model in the engine that runs it: transformers, ONNX Runtime GenAI, or llama.cpp, behind three calls.

What a test or a benchmark asks is the same for all: logits of a window, greedy tokens, and many sequences at once. The
engines' packages are imported when one is asked for. It measures nothing and samples nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tasks.algorithms.errors import InputError
from tasks.runners import onnx_runtime  # noqa: F401  before ONNX Runtime

GGUF = "model.gguf"
LORA = "adapter.gguf"
GENAI = "genai_config.json"


class Engine(Protocol):
    """A loaded model."""

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """int [length] -> float32 [length, vocabulary], from an empty cache."""

    def generate(self, ids: np.ndarray, new_tokens: int, on_token: Any = None) -> np.ndarray:
        """int [batch, length] -> the most likely tokens one by one, int [batch, new_tokens], but never an end token.

        Args:
            on_token: called after each step.
        """


def load(folder: Path, threads: int = 1, **settings: Any) -> Engine:
    """The engine that a folder is for.

    Raises:
        InputError: the engine isn't installed, or the folder is no model's.
    """
    kinds = {GENAI: OnnxGenai, GGUF: LlamaCpp}
    kind = next((kind for name, kind in kinds.items() if (folder / name).exists()), Torch)
    try:
        return kind(folder, threads, **settings)
    except ModuleNotFoundError as error:
        raise InputError(f"{folder} needs the package {error.name}, which isn't installed: install it") from error


def perplexity(engine: Engine, windows: Iterable[np.ndarray]) -> float:
    """exp of the mean loss over all but the first token of each window (int [length])."""
    total, count = 0.0, 0
    for window in windows:
        logits = engine.logits(window)[:-1].astype(np.float64)
        largest = logits.max(axis=1, keepdims=True)
        norm = np.log(np.exp(logits - largest).sum(axis=1)) + largest[:, 0]
        total += float((norm - logits[np.arange(len(window) - 1), window[1:]]).sum())
        count += len(window) - 1
    return math.exp(total / count)


class Torch:
    """Any model folder of the pipeline in PyTorch, on the CPU.

    Args:
        dtype: "float32" or "bfloat16".
        int8: PyTorch's dynamic quantisation of all linears, the head's weight apart from the embedding's.
    """

    def __init__(self, folder: Path, threads: int = 1, dtype: str = "float32", int8: bool = False) -> None:
        import torch

        from tasks.runners import any_folder

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = any_folder.load_model(folder, getattr(torch, dtype))
        if int8:
            torch.backends.quantized.engine = next(e for e in ("x86", "fbgemm", "qnnpack") if e in _quantized(torch))
            self.model = torch.ao.quantization.quantize_dynamic(self.model, {torch.nn.Linear}, dtype=torch.qint8)

        end = self.model.generation_config.eos_token_id
        self.ends = [] if end is None else [end] if isinstance(end, int) else list(end)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return self.model(self.torch.tensor(ids[None].astype(np.int64))).logits[0].float().numpy()

    def generate(self, ids: np.ndarray, new_tokens: int, on_token: Any = None) -> np.ndarray:
        given, cache, found = self.torch.tensor(ids.astype(np.int64)), None, []
        with self.torch.inference_mode():
            for _ in range(new_tokens):
                output = self.model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
                logits = output.logits[:, -1]
                logits[:, self.ends] = -math.inf
                cache, given = output.past_key_values, logits.argmax(dim=-1, keepdim=True)
                found.append(given)
                if on_token:
                    on_token()
        return self.torch.cat(found, dim=1).numpy()


def _quantized(torch: Any) -> list[str]:
    return torch.backends.quantized.supported_engines


class OnnxGenai:
    """An exported folder in ONNX Runtime GenAI; the sizes of the thread pools are set in its session."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        import onnxruntime_genai

        self.library = onnxruntime_genai
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config = onnxruntime_genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)
        decoder = json.loads((folder / GENAI).read_text(encoding="utf-8"))["model"]["decoder"]
        self.window = decoder.get("sliding_window", {}).get("window_size", 0)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        generator = self._generator(1, len(ids))
        generator.append_tokens(ids.astype(np.int32))
        return np.array(generator.get_output("logits"))[0].astype(np.float32)

    def generate(self, ids: np.ndarray, new_tokens: int, on_token: Any = None) -> np.ndarray:
        batch, length = ids.shape
        generator = self._generator(batch, length + new_tokens)
        generator.append_tokens(ids.astype(np.int32) if batch > 1 else ids[0].astype(np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            if on_token:
                on_token()
        return np.stack([np.array(generator.get_sequence(row))[length:] for row in range(batch)])

    def _generator(self, batch: int, length: int) -> Any:
        parameters = self.library.GeneratorParams(self.model)
        longest = max(length, self.window)  # of which its caches are as long at least
        parameters.set_search_options(batch_size=batch, min_length=length, max_length=longest, do_sample=False)
        return self.library.Generator(self.model, parameters)


class LlamaCpp:
    """An exported folder in llama.cpp, its adapter on; the cache of keys and values is float32, as PyTorch's is.

    Every call has a context of its own, so that nothing is left of the one before.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        from tasks.runners import llama_bindings

        adapter = folder / LORA
        self.model = llama_bindings.load(folder / GGUF, adapter if adapter.exists() else None, threads)
        self.ends = [] if self.model.end is None else [self.model.end]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        with self.model.context(1, len(ids)) as decode:
            return decode(ids[None], 0, every=True)[0]

    def generate(self, ids: np.ndarray, new_tokens: int, on_token: Any = None) -> np.ndarray:
        (batch, length), found, given = ids.shape, [], ids
        with self.model.context(batch, batch * (length + new_tokens)) as decode:
            for step in range(new_tokens):
                logits = decode(given, step and length + step - 1)  # [batch, 1, vocabulary]
                logits[:, :, self.ends] = -math.inf
                given = logits[:, -1].argmax(axis=1)[:, None]
                found.append(given)
                if on_token:
                    on_token()
        return np.concatenate(found, axis=1)
