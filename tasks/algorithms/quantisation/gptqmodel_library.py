"""gptqmodel as it is used here: imported without side effects, quiet, and in float32.

Every patch of its internals that has nothing to do with masks is here, each inside a context manager that puts the
library back, and each beside the name of what it replaces. They were written against version 7.6.0, which is compared
at import. Its GPTQ of one linear is led by `tasks.algorithms.quantisation.masked_gptq`. It computes nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import random
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tasks.algorithms.errors import InputError

LIBRARY_VERSION = "7.6.0"
"""The work-arounds reach into gptqmodel's internals: another version needs them read again, and the tests run."""


def _import_library() -> ModuleType:
    """Import gptqmodel without its banner and without the environment variables it sets.

    Its pool wants 2 loader workers and takes (cores + 1) // 2: a ValueError on two cores without GPTQMODEL_CPU_WORKERS.
    """
    installed = importlib.metadata.version("gptqmodel")
    if installed != LIBRARY_VERSION:
        raise InputError(f"gptqmodel {installed} is installed, {LIBRARY_VERSION} is needed: install constraints.txt")
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    before = dict(os.environ)  # the import sets HF_HOME, CUDA_DEVICE_ORDER and others: child processes would have them
    level = logging.getLogger().level  # the import sets it for the whole process
    with contextlib.redirect_stdout(io.StringIO()):  # its logger begins with an empty line, on stdout
        importlib.import_module("logbar").LogBar.shared().setLevel(logging.ERROR)  # gptqmodel's own logger: the banner
    library = importlib.import_module("gptqmodel")
    logging.getLogger().setLevel(level)
    for key in set(os.environ) - set(before):
        del os.environ[key]
    os.environ.update(before)
    return library


gptqmodel = _import_library()
gptq = importlib.import_module("gptqmodel.quantization.gptq")
gar = importlib.import_module("gptqmodel.quantization.gar")
_logger = importlib.import_module("gptqmodel.utils.logger")
_formats = importlib.import_module("gptqmodel.utils.model")
torch_linear = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
Lora = importlib.import_module("gptqmodel.adapter.adapter").Lora
eora_compute_lora = importlib.import_module("gptqmodel.eora").eora_compute_lora

to_format_1 = _formats.convert_gptq_v2_to_v1_format_module
"""Of a kernel's zero points: as the checkpoint has them, one less (called with the kernel and what has its bits)."""
to_format_2 = _formats.convert_gptq_v1_to_v2_format_module
"""Back (called with the kernel, bits and the type of its words)."""


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within this context an attribute of a module or class has another value."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Run gptqmodel without its live progress and prints, and put random generators and threads back.

    It replaces, by its name in gptqmodel:
        utils.logger._suppress_live_renderables: it draws progress bars, unless pytest runs it.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.get_num_threads()
    talkers = importlib.import_module("logbar").LogBar.shared(), logging.getLogger("accelerate.utils.modeling")
    levels = [logger.level for logger in talkers]
    with (
        patched(_logger, "_suppress_live_renderables", lambda: True),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for logger in talkers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(talkers, levels, strict=True):
                logger.setLevel(level)
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
            torch.set_num_threads(states[3])


@contextlib.contextmanager
def loading_in_float32() -> Iterator[None]:
    """Let gptqmodel load a checkpoint in float32 and without torch.compile.

    It replaces, by their names in gptqmodel's nn_modules.qlinear.torch:
        TorchLinear.SUPPORTS_DTYPES: half precision only, though the kernel's arithmetic follows the input's dtype.
        torch_compile: compiles the dequantisation with inductor, which needs a C++ compiler at run time.
    """
    kernel = torch_linear.TorchLinear
    with (
        contained(),
        patched(kernel, "SUPPORTS_DTYPES", [*kernel.SUPPORTS_DTYPES, torch.float32]),
        patched(torch_linear, "torch_compile", lambda function, **_: function),
    ):
        yield
