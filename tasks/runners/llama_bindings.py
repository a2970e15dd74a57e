"""llama.cpp from Python, through the binding that is installed, behind one call that decodes tokens to logits.

llama-cpp-python has all of llama.cpp and is built from source; cyllama is a prebuilt wheel that can't switch an adapter
on. The first of them that is installed is used. It generates nothing: engines.py does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from tasks.algorithms.errors import InputError

_LIBRARIES = {"llama_cpp": "llama_cpp", "cyllama": "cyllama.llama.llama_cpp"}
"""Package -> its module with llama.cpp's code; the first that is installed is used."""
_FLOAT32 = 0
"""The number of the type in ggml."""
_NO_FLASH_ATTENTION = 0
_END = "tokenizer.ggml.eos_token_id"


class Decode(Protocol):
    """A context's only call."""

    def __call__(self, ids: np.ndarray, start: int, every: bool = False) -> np.ndarray:
        """int [batch, length] at positions from `start` on -> float32 [batch, length or 1, vocabulary]."""


class Model(Protocol):
    """A loaded model; `end` is the token that ends a text, where there is one."""

    end: int | None

    def context(self, sequences: int, length: int) -> contextlib.AbstractContextManager[Decode]:
        """An empty cache for `length` tokens of all sequences together."""


def load(path: Path, adapter: Path | None, threads: int) -> Model:
    """A GGUF file, and its LoRA where there is one.

    Raises:
        ModuleNotFoundError: no binding is installed.
        InputError: llama.cpp can't load a file, or the binding can't switch an adapter on.
    """
    kind = {"llama_cpp": LlamaCppPython, "cyllama": Cyllama}[installed()]
    return kind(path, adapter, threads)


def installed() -> str:
    """The package that is used.

    Raises:
        ModuleNotFoundError: neither is installed; it names the one that needs no compiler.
    """
    package = next(filter(importlib.util.find_spec, _LIBRARIES), None)
    if package is None:
        raise ModuleNotFoundError("No module named 'cyllama'", name="cyllama")
    return package


def import_library() -> ModuleType:
    """The module that holds llama.cpp's code."""
    return importlib.import_module(_LIBRARIES[installed()])


def _size(settings: Any, sequences: int, length: int, threads: int) -> None:
    """Set what both bindings call by the same names."""
    settings.n_ctx, settings.n_seq_max = max(length, 32), sequences
    settings.n_batch = settings.n_ubatch = settings.n_ctx
    settings.n_threads = settings.n_threads_batch = threads
    settings.type_k = settings.type_v = _FLOAT32
    settings.kv_unified = True
    settings.flash_attn_type = _NO_FLASH_ATTENTION


def _unloadable(path: Path) -> InputError:
    return InputError(f"llama.cpp can't load {path}: export it again")


class LlamaCppPython:
    """llama-cpp-python: llama.cpp's own functions by ctypes."""

    def __init__(self, path: Path, adapter: Path | None, threads: int) -> None:
        import llama_cpp

        self.library, self.threads = llama_cpp, threads
        _silence(llama_cpp)
        settings = llama_cpp.llama_model_default_params()
        settings.use_extra_bufts = False  # its AMX kernels fault where the CPU has AMX and the host doesn't grant it
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise _unloadable(path)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        text = ctypes.create_string_buffer(32)
        written = llama_cpp.llama_model_meta_val_str(self.model, _END.encode(), text, len(text))
        self.end = int(text.value) if written > 0 else None
        self.adapters = []
        if adapter:
            self.adapters = [llama_cpp.llama_adapter_lora_init(self.model, str(adapter).encode())]
            if not self.adapters[0]:
                raise _unloadable(adapter)

    @contextlib.contextmanager
    def context(self, sequences: int, length: int) -> Iterator[Decode]:
        settings = self.library.llama_context_default_params()
        _size(settings, sequences, length, self.threads)
        context = self.library.llama_init_from_model(self.model, settings)
        if self.adapters:
            array = (self.library.llama_adapter_lora_p_ctypes * 1)(*self.adapters)
            self.library.llama_set_adapters_lora(context, array, 1, (ctypes.c_float * 1)(1.0))
        try:
            yield functools.partial(self._decode, context)
        finally:
            self.library.llama_free(context)

    def _decode(self, context: Any, ids: np.ndarray, start: int, every: bool = False) -> np.ndarray:
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


@functools.cache
def _silence(library: Any) -> Any:
    """The library keeps the pointer for good, so the callback must live as long: in the cache."""
    callback = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(callback, None)
    return callback


class Cyllama:
    """cyllama: classes around llama.cpp, without a call that switches an adapter on."""

    def __init__(self, path: Path, adapter: Path | None, threads: int) -> None:
        from cyllama.llama import llama_cpp

        if adapter:
            raise InputError(f"cyllama can't switch {adapter} on: pip install llama-cpp-python, which is used instead")
        self.library, self.threads = llama_cpp, threads
        llama_cpp.disable_logging()
        settings = llama_cpp.LlamaModelParams()
        settings.use_extra_bufts = False  # as above
        try:
            self.model = _with_n_vocab(llama_cpp.LlamaModel)(str(path), settings, verbose=False)
        except ValueError as error:
            raise _unloadable(path) from error
        end = self.model.metadata().get(_END)
        self.end = None if end is None else int(end)

    @contextlib.contextmanager
    def context(self, sequences: int, length: int) -> Iterator[Decode]:
        settings = self.library.LlamaContextParams()
        _size(settings, sequences, length, self.threads)
        with self.library.LlamaContext(self.model, settings, verbose=False) as context:
            yield functools.partial(self._decode, context)

    def _decode(self, context: Any, ids: np.ndarray, start: int, every: bool = False) -> np.ndarray:
        rows, length = ids.shape
        with self.library.LlamaBatch(n_tokens=rows * length, embd=0, n_seq_max=1, verbose=False) as batch:
            for row, column in np.ndindex(rows, length):
                batch.add(int(ids[row, column]), start + column, [row], every or column == length - 1)
            context.decode(batch)
        places = range(rows * length) if every else range(length - 1, rows * length, length)
        logits = np.array([context.get_logits_ith(place) for place in places], np.float32)
        return logits.reshape(rows, -1, logits.shape[1])


@functools.cache
def _with_n_vocab(kind: type) -> type:
    """The class of a model with the attribute that `get_logits_ith` of cyllama 0.2.18 asks for and that it lacks."""
    return type(kind.__name__, (kind,), {"n_vocab": property(lambda model: model.get_vocab().n_vocab)})
