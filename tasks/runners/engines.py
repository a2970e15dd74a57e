"""A model in the engine that runs it: transformers, ONNX Runtime GenAI, or llama.cpp, behind three calls.

What a test or a benchmark asks is the same for all: logits of a window, greedy tokens, and many sequences at once. The
engines' packages are imported when one is asked for. It measures nothing and samples nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tasks.algorithms.errors import InputError

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
        dtype: "float32" or "bfloat16"; the latter of dense folders alone.
        int8: PyTorch's dynamic quantisation of all linears, the head's weight apart from the embedding's.
    """

    def __init__(self, folder: Path, threads: int = 1, dtype: str = "float32", int8: bool = False) -> None:
        import torch

        from tasks.models import dense_folder
        from tasks.runners import any_folder

        torch.set_num_threads(threads)
        self.torch = torch
        dense = dtype != "float32"
        self.model = dense_folder.load_dense(folder, getattr(torch, dtype)) if dense else any_folder.load_model(folder)
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
        parameters.set_search_options(batch_size=batch, min_length=length, max_length=length, do_sample=False)
        return self.library.Generator(self.model, parameters)


@functools.cache
def _silence(library: Any) -> Any:
    """The library keeps the pointer for good, so the callback must live as long: in the cache."""
    callback = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(callback, None)
    return callback


class LlamaCpp:
    """An exported folder in llama.cpp, its adapter on; the cache of keys and values is float32, as PyTorch's is.

    Every call has a context of its own, so that nothing is left of the one before.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        import llama_cpp

        self.library, self.threads = llama_cpp, threads
        _silence(llama_cpp)
        settings = llama_cpp.llama_model_default_params()
        settings.use_extra_bufts = False  # its AMX kernels fault where the CPU has AMX and the host doesn't grant it
        self.model = llama_cpp.llama_model_load_from_file(str(folder / GGUF).encode(), settings)
        if not self.model:
            raise InputError(f"llama.cpp can't load {folder / GGUF}: export it again")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        text = ctypes.create_string_buffer(32)
        found = llama_cpp.llama_model_meta_val_str(self.model, b"tokenizer.ggml.eos_token_id", text, len(text))
        self.ends = [int(text.value)] if found > 0 else []
        self.adapters = []
        if (folder / LORA).exists():
            self.adapters = [llama_cpp.llama_adapter_lora_init(self.model, str(folder / LORA).encode())]
            if not self.adapters[0]:
                raise InputError(f"llama.cpp can't load {folder / LORA}: export it again")

    def logits(self, ids: np.ndarray) -> np.ndarray:
        with self._context(1, len(ids)) as context:
            return self._decode(context, ids[None], 0, every=True)[0]

    def generate(self, ids: np.ndarray, new_tokens: int, on_token: Any = None) -> np.ndarray:
        (batch, length), found, given = ids.shape, [], ids
        with self._context(batch, batch * (length + new_tokens)) as context:
            for step in range(new_tokens):
                logits = self._decode(context, given, step and length + step - 1)  # [batch, 1, vocabulary]
                logits[:, :, self.ends] = -math.inf
                given = logits[:, -1].argmax(axis=1)[:, None]
                found.append(given)
                if on_token:
                    on_token()
        return np.concatenate(found, axis=1)

    @contextlib.contextmanager
    def _context(self, sequences: int, length: int) -> Iterator[Any]:
        settings = self.library.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = max(length, 32), sequences
        settings.n_batch = settings.n_ubatch = settings.n_ctx
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.type_k = settings.type_v = self.library.GGML_TYPE_F32
        settings.kv_unified = True
        settings.flash_attn_type = self.library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = self.library.llama_init_from_model(self.model, settings)
        if self.adapters:
            array = (self.library.llama_adapter_lora_p_ctypes * 1)(*self.adapters)
            self.library.llama_set_adapters_lora(context, array, 1, (ctypes.c_float * 1)(1.0))
        try:
            yield context
        finally:
            self.library.llama_free(context)

    def _decode(self, context: Any, ids: np.ndarray, start: int, every: bool = False) -> np.ndarray:
        """int [batch, length] at positions from `start` on -> float32 [batch, length or 1, vocabulary]."""
        rows, length = ids.shape
        batch = self.library.llama_batch_init(rows * length, 0, 1)
        try:
            batch.n_tokens = rows * length
            for index, (row, column) in enumerate(np.ndindex(rows, length)):
                batch.token[index], batch.pos[index] = int(ids[row, column]), start + column
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
                batch.logits[index] = every or column == length - 1
            if self.library.llama_decode(context, batch):
                raise RuntimeError("llama.cpp could not decode a batch")
            count = rows * (length if every else 1)
            logits = np.ctypeslib.as_array(self.library.llama_get_logits(context), (count, self.vocabulary))
            return logits.reshape(rows, -1, self.vocabulary).copy()
        finally:
            self.library.llama_batch_free(batch)
