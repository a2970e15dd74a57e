"""What libraries say about their own affairs when they are imported, silenced by its cause and before it is said.

stdout is a command's answer, and stderr is empty after a good run. Nothing here hides what concerns a model or a
result: each entry names one logger or one setting, and why its lines tell a user nothing.
"""

from __future__ import annotations

import logging
import os
import sys

LOGGERS = (
    "torchao",  # its wheel holds GPU libraries that a CPU build of torch can't load; it does without them
    "torch.utils._pytree",  # a deprecation between torch and torchao: enums that torchao registers
)
ROOT_LINES = ("Please consider to run pre-processing before quantization",)
"""Beginnings of lines that come from the root logger: onnxruntime's advice on graphs of other exporters."""
BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
"""transformers asks the hub's library for it, too: "Loading weights" and "Writing model shards"."""


def apply(*, bars: bool) -> None:
    """To be called before torch, transformers and gptqmodel are imported.

    Args:
        bars: leave libraries' progress bars on also where stderr is no terminal: flows and stages follow them there.
    """
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_says_something)  # once, however often it is added
    if not bars and not sys.stderr.isatty():
        os.environ.setdefault(BARS, "1")


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(ROOT_LINES)
