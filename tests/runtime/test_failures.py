"""Failures of a toy stage: a sentence where a user can mend it, the error itself where a developer has to."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tasks.algorithms.errors import InputError
from tasks.runtime import failures
from tasks.runtime.stage import Stage
from tests.support.toy_stages import OUTPUTS, Toy, raising, write

TELLING = {
    "full disk": (OSError(errno.ENOSPC, "x"), "cannot read or write the outputs of stage toy: the disk is full; free"),
    "the file that is meant": (PermissionError(errno.EACCES, "x", "a", None, "b"), "cannot read or write b: permiss"),
    "a signal": (InterruptedError(errno.EINTR, "x", "a"), "cannot read or write a: the system interrupted it; run"),
    "safetensors": (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    "tokenizers": (Exception("Read-only file system (os error 30)"), "the folder is read-only"),
    "copytree": (OSError([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]), "the disk is full"),
    "memory": (MemoryError(), "stage toy ran out of memory; end other programs, lower its batch"),
    "the linker's memory": (ImportError("libtorch.so: cannot allocate memory"), "stage toy ran out of memory"),
    "the graphics card's memory": (
        RuntimeError("CUDA out of memory. Tried to"),
        "stage toy ran out of memory on the GPU; set device",
    ),
    "no memory for a thread": (RuntimeError("can't start new thread"), "stage toy ran out of memory"),
    "a user's value": (InputError("wanda.keep = 9 is wrong"), "wanda.keep = 9 is wrong"),
}


@pytest.mark.parametrize("name", TELLING)
def test_what_a_user_can_mend_is_one_sentence(made: Toy, run_here, name: str) -> None:
    error, words = TELLING[name]
    with pytest.raises(InputError) as caught:
        run_here(raising(error))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert made.outputs() == OUTPUTS and made.left() == []


@pytest.mark.parametrize("library", [lambda: torch.empty(2**50), lambda: numpy.empty(2**55)])
def test_libraries_that_get_no_memory(made: Toy, run_here, library) -> None:
    with pytest.raises(InputError, match="ran out of memory"):
        run_here(lambda _: library())


def test_safetensors_that_cannot_write(made: Toy, run_here) -> None:
    def run(stage: Stage) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            save_file({"a": numpy.zeros(2**16)}, stage.output("table.csv"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(InputError, match="largest file size"):
        run_here(run)


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("a"), FileNotFoundError(errno.ENOENT, "x", "y")])
def test_a_mistake_of_the_code_stays_what_it_is(made: Toy, run_here, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_here(raising(error))
    assert caught.value is error
    assert made.outputs() == OUTPUTS


def test_an_input_altered_by_hand_is_named(made: Toy, run_here) -> None:
    text = Path("data/source/text.txt")
    text.unlink()  # it may be a link into DVC's cache
    text.write_text("{")
    with pytest.raises(InputError) as caught:
        run_here(write)
    assert str(caught.value) == f"data/source/text.txt {failures.ALTERED}"
    assert made.outputs() == OUTPUTS


def test_an_input_that_changes_while_the_stage_runs_is_named(made: Toy, run_here) -> None:
    def run(_: Stage) -> None:
        text = Path("data/source/text.txt")
        text.unlink()
        text.write_text("{")
        raise ValueError("no JSON")

    with pytest.raises(InputError, match=r"data/source/text.txt is not what its stage wrote.*\(ValueError: no JSON\)"):
        run_here(run)


def test_a_bit_that_flips_in_an_input_and_in_the_cache_at_once_is_found(made: Toy, run_here) -> None:
    """Both are one file, and DVC sees neither: size and time are the same."""
    made("-m", "dvc", "checkout", "--relink", "-q")
    text = Path("data/source/text.txt")
    before = text.stat()
    text.chmod(0o644)
    text.write_text("tezt")
    text.chmod(before.st_mode)
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert before.st_nlink == 2 and "up to date" in made("-m", "dvc", "status", "toy").stdout
    with pytest.raises(InputError, match="data/source/text.txt is not what its stage wrote"):
        run_here(write)
