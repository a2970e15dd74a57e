"""Updates between small packed models: what they cost, that they come out bit by bit, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.quantisation import rounding
from tasks.packed.model_config import clean
from tasks.packed.shapes import shapes_of
from tasks.packed.sizes import component_bytes
from tasks.packed.stored_model import Linear, Model
from tasks.packed.writer import save
from tasks.registry import contents, delta, signing, update
from tests.support.command import edgepress

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
NAMES = ("v0.0.1", "v0.0.2")


def model(
    folder: Path, seed: int, adapter: int, rank: int = 1, pattern: str = "unstructured", coding: str = "fixed"
) -> Path:
    """A random packed model: quantised linears with coded adapters, all of `seed` but the adapters."""
    shapes = shapes_of(clean(CONFIG))
    weights, branch = (torch.Generator().manual_seed(number) for number in (seed, adapter))
    blocks = []
    for block in shapes.linears:
        linears = {}
        for name, (rows, cols) in block.items():
            keep = torch.rand(rows, cols, generator=weights) < 0.5 if pattern == "unstructured" else None
            codes = torch.randint(0, 16, (rows, cols), generator=weights, dtype=torch.uint8)
            codes = codes if keep is None else torch.where(keep, codes, torch.tensor(8, dtype=torch.uint8))
            scales = torch.rand(rows, cols // 32, generator=weights).half()
            factors = [torch.randn(rank, size, generator=branch) for size in (cols, rows)]
            coded = tuple(rounding.quantise(matrix, 8, 32) for matrix in factors) if rank else None
            linears[name] = Linear(codes, scales, bits=4, group_size=32, keep=keep, pattern=pattern, adapter=coded)
        blocks.append(linears)
    embedding = torch.randn(*shapes.table, generator=weights).half()
    rest = {name: torch.randn(*shape, generator=weights).half() for name, shape in shapes.rest.items()}
    save(Model(CONFIG, blocks, embedding, None, rest), folder, coding)
    (folder / "sub").mkdir()
    (folder / "sub/tokenizer.json").write_text(json.dumps({str(i): i for i in range(500)}))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "key"
    signing.generate(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models that differ in their adapters alone."""
    root = tmp_path_factory.mktemp("models")
    return model(root / "old", 0, 1), model(root / "new", 0, 2)


@pytest.fixture
def made(folders: tuple, keys: Path, tmp_path: Path) -> Path:
    update.make(*folders, NAMES, keys, tmp_path / "u.safetensors")
    return tmp_path / "u.safetensors"


@pytest.fixture
def device(folders: tuple, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[0], tmp_path / "device"))


def refused(made: Path, keys: Path, device: Path, sentence: str) -> None:
    before = content(device)
    with pytest.raises(InputError, match=sentence):
        update.apply(made, keys.with_name("key.pub"), device)
    assert content(device) == before and not list(device.parent.glob(".*"))


def test_an_adapter_costs_the_adapter(folders: tuple, keys: Path, tmp_path: Path) -> None:
    summary = update.make(*folders, NAMES, keys, tmp_path / "u")
    adapter = component_bytes(folders[1])["adapter"]
    assert summary.adapter_only and summary.components["adapter"] == adapter
    assert set(summary.files) == {"model.safetensors", "model.json"}
    assert summary.files["model.safetensors"] == ("pieces", sum(summary.components.values()))
    own, whole = delta.adapter_parameters(folders[1])
    shapes = shapes_of(clean(CONFIG))
    sizes = [size for block in shapes.linears for size in block.values()]
    assert own == sum(rows + cols for rows, cols in sizes)  # rank 1
    assert whole == sum(rows * cols for rows, cols in sizes) + 96 * 64 + 5 * 64


def test_of_an_entropy_coded_model_an_adapter_costs_the_adapter(keys: Path, tmp_path: Path) -> None:
    old, new = (model(tmp_path / str(adapter), 0, adapter, coding="entropy") for adapter in (1, 2))
    summary = update.make(old, new, NAMES, keys, tmp_path / "u")
    adapter = component_bytes(new)["adapter"]
    assert summary.adapter_only and 0.9 * adapter < summary.components["adapter"] <= adapter
    update.apply(tmp_path / "u", keys.with_name("key.pub"), old)
    assert content(old) == content(new)


@pytest.mark.parametrize(
    ("changed", "component"),
    [
        ({"rank": 2}, "adapter"),
        ({"rank": 0}, None),
        ({"seed": 5}, "values"),
        ({"pattern": "dense"}, "values"),
        ({"coding": "entropy"}, "values"),
    ],
)
def test_any_change_comes_out_bit_by_bit(
    folders: tuple, keys: Path, device: Path, tmp_path: Path, changed: dict, component: str | None
) -> None:
    new = model(tmp_path / "new", **{"seed": 0, "adapter": 2} | changed)
    (new / "added.txt").write_text("added")
    (new / "sub/tokenizer.json").unlink()
    summary = update.make(folders[0], new, NAMES, keys, tmp_path / "u")
    assert component is None or component in summary.components
    assert not summary.adapter_only  # a file was added, too
    for _ in range(2):  # the second time it is there already
        update.apply(tmp_path / "u", keys.with_name("key.pub"), device)
        assert content(device) == content(new)
    assert not list(tmp_path.glob(".*"))


def test_tensors_of_another_format_are_compared_one_by_one(keys: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name, value in (("old", 0.0), ("new", 1.0)):
        (tmp_path / name).mkdir()
        tensors = {"a": torch.ones(100_000), "b": torch.full((50,), value)}
        save_file(tensors, tmp_path / name / "weights.safetensors")
    summary = update.make(tmp_path / "old", tmp_path / "new", NAMES, keys, tmp_path / "u")
    assert summary.components == {"tensors": 200}
    update.apply(tmp_path / "u", keys.with_name("key.pub"), tmp_path / "old")
    assert content(tmp_path / "old") == content(tmp_path / "new")


@pytest.mark.parametrize("start", [b"", b"no header", (2**40).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]"])
def test_a_file_whose_header_can_not_be_read_is_refused(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(start)
    with pytest.raises(InputError, match="weights.safetensors is no safetensors file"):
        list(delta.segments(path))


def test_same_folders_same_bytes(folders: tuple, keys: Path, made: Path, tmp_path: Path) -> None:
    update.make(*folders, NAMES, keys, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == made.read_bytes()


def test_another_base(made: Path, keys: Path, device: Path) -> None:
    path = device / "sub/tokenizer.json"
    text = path.read_text()
    path.write_text("{}")
    refused(made, keys, device, "is not v0.0.1, which the update starts from: sub/tokenizer.json is another file")
    path.write_text(text)
    (device / "more").write_text("x")
    refused(made, keys, device, "more is another file")
    (device / "more").unlink()
    path.unlink()
    refused(made, keys, device, "sub/tokenizer.json is another file")
    path.symlink_to(device / "model.json")
    refused(made, keys, device, "a package has no links")


def test_another_key(made: Path, device: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    signing.generate(tmp_path / "other/key")
    refused(made, tmp_path / "other/key", device, "is not signed by")


def test_cut_and_altered_files(made: Path, keys: Path, device: Path, folders: tuple) -> None:
    """Nothing but the right bytes is ever put in place."""
    whole, generator = made.read_bytes(), random.Random(0)
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in [0, 7, 8, 100, start - 1, start, len(whole) - 1]:
        made.write_bytes(whole[:place])
        refused(made, keys, device, "is no update, or a damaged one")
    for _ in range(150):
        place = generator.randrange(len(whole))
        made.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << generator.randrange(8)]) + whole[place + 1 :])
        try:
            update.apply(made, keys.with_name("key.pub"), device)
        except InputError:
            assert content(device) == content(folders[0])
        else:  # a blank after the header
            assert content(device) == content(folders[1])
            shutil.rmtree(device)
            shutil.copytree(folders[0], device)


def forged(made: Path, keys: Path, change: object) -> None:
    """Sign a changed text with the right key: who makes updates is not trusted with names and sizes, either."""
    whole = made.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    text = json.loads(header["__metadata__"]["update"])
    change(text)
    signed = json.dumps(text)
    header["__metadata__"] = {"update": signed, "signature": signing.sign(signed.encode(), keys)}
    head = json.dumps(header).encode()
    made.write_bytes(len(head).to_bytes(8, "little") + head + whole[8 + size :])


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "sub/../../evil", "a\\..\\evil"])
def test_names_that_lead_out_of_the_folder(made: Path, keys: Path, device: Path, name: str) -> None:
    forged(made, keys, lambda text: text["files"].update({name: text["files"]["model.json"]}))
    refused(made, keys, device, "is no name of a file in a package")
    assert not (device.parent / "evil").exists()


def test_signed_nonsense(made: Path, keys: Path, device: Path) -> None:
    whole = made.read_bytes()
    cases = [
        (lambda text: text.update(version=2), "of another version of edgepress"),
        (lambda text: text["files"]["model.safetensors"]["pieces"].append([-1, 2**40]), "is damaged: the bytes"),
        (lambda text: text["files"]["model.safetensors"]["pieces"].append([2**40, 0]), "^$"),
        (lambda text: text["files"]["model.json"].update(made="same"), "is not the same as before"),
        (lambda text: text["files"]["model.json"].update(bytes=1), "doesn't come out as it was signed"),
        (lambda text: text["files"]["model.json"].update(sha256="0" * 64), "doesn't come out as it was signed"),
    ]
    for change, sentence in cases:
        made.write_bytes(whole)
        forged(made, keys, change)
        if sentence != "^$":  # a piece of no bytes does no harm
            refused(made, keys, device, sentence)


def test_killed_before_the_exchange(
    made: Path, keys: Path, device: Path, folders: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(update, "_exchange", killed)
        patch.setattr(contents, "remove", lambda _: None)  # SIGKILL cleans nothing up
        update.apply(made, keys.with_name("key.pub"), device)
    assert content(device) == content(folders[0])
    update.apply(made, keys.with_name("key.pub"), device)
    assert content(device) == content(folders[1]) and not list(device.parent.glob(".device*"))


def test_keys(tmp_path: Path) -> None:
    public = signing.generate(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    signature = signing.sign(b"text", tmp_path / "key")
    assert signing.verify(b"text", signature, public) and not signing.verify(b"texd", signature, public)
    assert not signing.verify(b"text", "no base64", public)
    for name, sentence in (("key", "is there already"), ("none/key", "cannot write")):
        with pytest.raises(InputError, match=sentence):
            signing.generate(tmp_path / name)
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(InputError, match="can be read by others"):
        signing.sign(b"text", tmp_path / "key")
    with pytest.raises(InputError, match="is no private key"):
        public.chmod(0o600)
        signing.sign(b"text", public)
    with pytest.raises(InputError, match="is no public key"):
        signing.verify(b"text", signature, tmp_path / "key")
    (tmp_path / "repository/.git").mkdir(parents=True)
    with pytest.raises(InputError, match="a private key belongs outside of it"):
        signing.generate(tmp_path / "repository/key")


def test_the_command(
    made: Path, keys: Path, device: Path, folders: tuple, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert edgepress(capsys, "update", "keygen", tmp_path / "mine")[0] == 0
    arguments = ["update", "apply", made, "--folder", device, "--public-key"]
    code, _, errors = edgepress(capsys, *arguments, tmp_path / "mine.pub")
    assert code == 1 and errors.startswith(f"error: {made} is not signed by")
    code, out, _ = edgepress(capsys, *arguments, keys.with_name("key.pub"), "--json")
    assert code == 0
    said = json.loads(out)
    assert said["version"] == "v0.0.2" and content(device) == content(folders[1])
