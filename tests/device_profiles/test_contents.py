"""What a folder holds, against tensors made by hand, `stat`, and the packed file's own bytes."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from tasks.algorithms.device_fit import footprint
from tasks.algorithms.device_fit.footprint import Model, Unit
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.model.shape import shape_of_config
from tasks.algorithms.quantisation import rounding
from tasks.device_profiles import contents
from tasks.device_profiles.planned_contents import planned
from tasks.models import tokenizer_archive
from tasks.packed import packed_folder, reader
from tasks.packed.plan import Plan, planned_bytes
from tasks.packed.sizes import component_bytes
from tasks.packed.stored_model import Linear
from tasks.packed.stored_model import Model as Stored
from tasks.packed.writer import save
from tests.algorithms.device_fit.test_footprint import CONFIG
from tests.benchmarks import llama_bytes
from tests.support.folder_of_zeros import add, folder_of_zeros

EVERYTHING = Unit(
    {name: "fp32" for name in ("fp32", "fp16", "bf16")}
    | {f"int{bits}-{kind}": "fp32" for bits in range(2, 9) for kind in ("group", "channel")},
    {"fp32": 1},
    saves_bytes=frozenset({(2, 4)}),
)
"""Takes whatever there is."""


def held(model: Model) -> dict[str, int]:
    """Component -> bytes in such a memory, metadata left out."""
    found: dict[str, int] = {}
    for one in footprint.hold(model, EVERYTHING):
        found[one.component] = found.get(one.component, 0) + one.bytes
    return {name: size for name, size in found.items() if name != "metadata"}


@pytest.mark.parametrize("quantised", [False, True])
def test_sizes_equal_stat(tmp_path: Path, quantised: bool) -> None:
    folder = folder_of_zeros(tmp_path / "model", quantised=quantised)
    model, sizes = contents.read(folder), {path.name: path.stat().st_size for path in folder.rglob("*.*")}
    assert model.stored == sum(sizes.values()) == sum(model.stored_components.values())
    assert model.metadata == sum(size for name, size in sizes.items() if not name.endswith(".safetensors"))
    if quantised:
        assert held(model) == {"values": 12 * 8 // 2, "scales": 12 * 2, "adapter": 2 * 8 * 2, "embedding": 20 * 8 * 4}
        assert [m.format for m in model.matrices()] == ["fp16", "int4-channel", "fp32"]
    else:
        assert held(model) == {"values": 12 * 8 * 4, "embedding": 20 * 8 * 4}


def test_an_untied_embedding_is_only_looked_up_in(tmp_path: Path) -> None:
    model = contents.read(folder_of_zeros(tmp_path / "model", tied=False))
    assert [(part.name, part.matrices[0].looked_up) for part in model.parts[-2:]] == [
        ("embedding", True),
        ("head", False),
    ]
    tied = contents.read(folder_of_zeros(tmp_path / "tied"))
    assert not any(matrix.looked_up for matrix in tied.matrices())


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    folder = folder_of_zeros(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="cut off"):
        contents.read(folder)
    path.unlink()
    with pytest.raises(InputError, match="no .*safetensors"):
        contents.read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="config.json can't be read"):
        contents.read(folder)
    for content, said in (("{", "no JSON"), ("[]", "holds list")):
        (folder / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=said):
            contents.config_of(folder)


def test_a_type_or_codes_that_can_not_be_counted(tmp_path: Path) -> None:
    folder = folder_of_zeros(tmp_path / "model")
    add(folder, {"model.layers.1.mlp.up_proj.weight": torch.zeros(12, 8, dtype=torch.float64)})
    with pytest.raises(InputError, match="up_proj.weight is stored as F64"):
        contents.read(folder)
    folder = folder_of_zeros(tmp_path / "quantised", quantised=True)
    add(folder, {"model.layers.1.mlp.up_proj.qweight": torch.zeros(1, 12, dtype=torch.int32)})
    with pytest.raises(InputError, match="up_proj has packed GPTQ codes, but no scales"):
        contents.read(folder)


@pytest.fixture
def pack(make_model, tmp_path: Path):
    """pack(tied, pattern) -> a packed folder: int4 linears in groups of 16 with adapters of rank 2, int8 embedding."""

    def make(tied: bool = True, pattern: str = "2:4") -> Path:
        model = make_model(tie_word_embeddings=tied)
        blocks = []
        for linears in families.linears_by_block(model):
            block = {}
            for name, linear in linears.items():
                coded = rounding.quantise(linear.weight.detach(), 4, 16)
                keep = torch.tensor([True, False, False, True]).repeat(linear.out_features, linear.in_features // 4)
                codes = coded.codes * keep if pattern == "2:4" else coded.codes
                block[name] = Linear(
                    codes=(codes + 8).to(torch.uint8),
                    scales=coded.scales,
                    bits=4,
                    group_size=16,
                    keep=keep if pattern == "2:4" else None,
                    pattern=pattern,
                    adapter=(torch.ones(2, linear.in_features).half(), torch.ones(linear.out_features, 2).half()),
                )
            blocks.append(block)
        table, head = (model.get_submodule(name).weight.detach() for name in ("model.embed_tokens", "lm_head"))
        rest = {name: weight.detach().half() for name, weight in model.named_parameters() if "norm" in name}
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        coded = rounding.quantise(table, 8, 32), None if tied else head.half()
        save(Stored(config, blocks, *coded, rest), tmp_path / "packed")
        (tmp_path / "packed/tokenizer.json").write_text("{}" * 50, encoding="utf-8")
        return tmp_path / "packed"

    return make


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_folder_is_counted_by_its_description(pack, tied: bool) -> None:
    folder = pack(tied)
    model, components = contents.read(folder), component_bytes(folder)
    assert model.stored == sum(path.stat().st_size for path in folder.iterdir()) == sum(components.values())
    found, weights = (
        held(model),
        4 * sum(r * c for r, c in shape_of_config(packed_folder.config(folder)).linears.values()),
    )
    assert found["values"] == components["values"] == weights // 2 // 2
    assert found["positions"] == weights // 2 * 2 // 8  # the file's combinatorial codes are shorter
    assert found["scales"] == weights // 16 * 2
    assert found["norms"] == components["norms"]
    sides = 4 * sum(sum(shape) for shape in shape_of_config(packed_folder.config(folder)).linears.values())
    assert found["adapter"] == 2 * sides * 2
    assert found["embedding"] == 96 * 32 + 96 * 2 + (0 if tied else 96 * 32 * 2)
    assert {m.pattern for m in model.matrices() if m.component == "values"} == {(2, 4)}
    assert any(matrix.looked_up for matrix in model.matrices()) != tied


def test_an_entropy_coded_folder_is_the_same_to_a_device(pack, tmp_path: Path) -> None:
    folder, coded = pack(), tmp_path / "coded"
    save(reader.load(folder), coded, "entropy")
    shutil.copyfile(folder / "tokenizer.json", coded / "tokenizer.json")
    tokenizer_archive.pack(coded)
    one, other = contents.read(folder), contents.read(coded)
    assert one.parts == other.parts and other.stored < one.stored
    differ = (coded / "model.json").stat().st_size - (folder / "model.json").stat().st_size
    assert other.metadata == one.metadata + differ and abs(differ) < 100


def test_a_packed_folder_without_a_pattern(pack) -> None:
    model = contents.read(pack(pattern="dense"))
    assert {matrix.pattern for matrix in model.matrices()} == {None}
    assert "positions" not in held(model)


def test_a_model_is_planned_as_it_would_be_packed(pack) -> None:
    folder = pack()
    real = contents.read(folder)
    plan = Plan(bits=4, group_size=16, pattern="2:4", embedding_bits=8, embedding_group=32)
    made = planned(packed_folder.config(folder), plan)
    ours = {name: size for name, size in held(real).items() if name != "adapter"}
    assert held(made) == ours
    assert made.stored == planned_bytes(packed_folder.config(folder), plan)
    assert made.metadata == 0


def test_plans_that_can_not_be() -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    for plan, said in (
        (Plan(bits=1), "bits = 1"),
        (Plan(group_size=5), "group_size = 5"),
        (Plan(group_size=4, pattern="3:7"), "not divisible by groups of 3:7"),
        (Plan(group_size=4, embedding_bits=5), "embedding's 5"),
        (Plan(group_size=4, embedding_bits=8, embedding_group=3), "embedding_group = 3"),
    ):
        with pytest.raises(InputError, match=said):
            planned(config, plan)
    with pytest.raises(InputError, match="supported are"):
        planned(config | {"architectures": ["LlamaWithoutEnd"]}, Plan(bits=4))


def test_llama_in_bf16_has_its_published_size() -> None:
    # PTE file of the bf16 baseline: 2,358 MiB (pytorch/executorch, examples/models/llama/README.md)
    model = planned(llama_bytes.CONFIG, Plan(bits=None, dtype="BF16"))
    assert sum(held(model).values()) / 2**20 == pytest.approx(2358, rel=1e-3)
    average = footprint.with_bits(model, Fraction(7, 2), EVERYTHING)
    linears = 16 * sum(rows * cols for rows, cols in shape_of_config(llama_bytes.CONFIG).linears.values())
    assert held(average)["values"] == linears * 7 // 16
