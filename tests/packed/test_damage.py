"""Thousands of damaged folders: each is refused, or is the same model."""

import contextlib
import random
import resource
import signal
import warnings
from pathlib import Path

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.packed import reader
from tasks.packed.description import DESCRIPTION, FILE
from tasks.packed.digits import CODERS
from tests.support.packed_damage import mutate
from tests.support.packed_models import logits

TOKENS = torch.arange(9)[None]


@contextlib.contextmanager
def limits():
    """At most 1 GiB more of address space, and a minute; beyond either the block raises."""

    def late(*_):
        raise TimeoutError("a damaged file took longer than a minute")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def blob_of(parameter):
    """The blob that a parameter or buffer of a loaded model comes from."""
    if parameter.startswith("model.layers.") and "norm" not in parameter:
        return f"layers.{parameter.split('.')[2]}"
    return "embedding" if parameter in ("model.embed_tokens.weight", "lm_head.weight") else "rest"


def check_loaded(model, whole, changed, expected):
    """A damaged file that loads is the same model; one that was signed anew differs in the changed blobs alone."""
    state, found = model.state_dict(), logits(model, TOKENS)
    assert found.shape == expected.shape and (changed or torch.equal(found, expected))
    if changed is None or "model.json" not in changed:
        assert list(state) == list(whole)
        for name, tensor in state.items():
            other = changed and ("scales" in changed or blob_of(name) in changed)
            assert tensor.shape == whole[name].shape and (other or torch.equal(tensor, whole[name])), name


def fuzz(folders, scratch, count, seed):
    """Load `count` damaged copies: -> what became of those with wrong and with repaired checksums."""
    chance = random.Random(seed)
    files = [tuple((folder / name).read_bytes() for name in (FILE, DESCRIPTION)) for folder in folders]
    models = [reader.load_model(folder) for folder in folders]
    whole = [(model.state_dict(), logits(model, TOKENS)) for model in models]
    found = {"refused": 0, "same": 0, "repaired, refused": 0, "repaired, loaded": 0}
    scratch.mkdir(exist_ok=True)
    for _ in range(count):
        data, text, changed, place = mutate(chance, files)
        (scratch / FILE).write_bytes(data)
        (scratch / DESCRIPTION).write_bytes(text)
        kind = "" if changed is None else "repaired, "
        with contextlib.redirect_stderr(None), warnings.catch_warnings(action="ignore"), limits():
            try:
                model = reader.load_model(scratch)
            except InputError as error:
                assert len(str(error)) > 20
                found[f"{kind}refused"] += 1
                continue
        check_loaded(model, whole[place][0], changed, whole[place][1])
        found["repaired, loaded" if changed else "same"] += 1
    return found


def coded(folders, coding):
    return folders if coding == "fixed" else [folder / "coded" for folder in folders]


def check_fuzz(folders, scratch, count, seed):
    found = fuzz(folders, scratch, count, seed)
    print(", ".join(f"{value} {key}" for key, value in found.items()))
    assert sum(found.values()) == count
    assert found["refused"] > 0.4 * count and found["repaired, refused"] > 0.1 * count
    assert found["repaired, loaded"] > 0.02 * count  # so that what is behind the checksums was reached


@pytest.mark.parametrize("coding", CODERS)
def test_damaged_files_are_refused_or_load_the_same(tiny, tmp_path, coding):
    check_fuzz(coded(tiny, coding), tmp_path / "damaged", 1_000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("coding", CODERS)
def test_many_damaged_files_are_refused_or_load_the_same(tiny, tmp_path, coding):
    check_fuzz(coded(tiny, coding), tmp_path / "damaged", 10_000, seed=2)
