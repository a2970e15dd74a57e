"""Plans from a config alone, against the files that they are of."""

import json

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.packed import reader
from tasks.packed.description import DESCRIPTION
from tasks.packed.layout import bits_by_component
from tasks.packed.packed_folder import PackedFolder
from tasks.packed.plan import Plan, planned, planned_bytes
from tasks.packed.sizes import bound, component_bytes
from tasks.packed.writer import save
from tests.support.packed_models import REALISTIC, SHAPES, realistic


@pytest.mark.parametrize("chosen", [one for one in SHAPES if one.get("pattern") != "unstructured"], ids=str)
def test_the_plan_is_the_size_of_the_files_to_the_byte(tmp_path, chosen):
    model = realistic(**chosen)
    save(model, tmp_path)
    names = [name for block in model.blocks for name in block]
    settings = {"pattern": chosen.get("pattern", "2:4"), "group_size": chosen.get("group", 32)}
    settings |= {key: chosen[key] for key in ("zeros", "order", "adapter_bits") if key in chosen}
    settings |= {"embedding_bits": chosen.get("embedding_bits", 8)}
    for key, default in (("bits", 4), ("rank", 0)):
        value = chosen.get(key, default)
        settings[key] = value if isinstance(value, int) else dict(zip(names, value * len(names), strict=False))
    found = sum(path.stat().st_size for path in tmp_path.iterdir())
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    if "scales" in description:
        settings |= {"distinct_scales": description["scales"]["values"], "kinds": description["scales"]["kinds"]}
    assert planned_bytes(model.config, Plan(**settings)) == found
    _, sizes, least = planned(model.config, Plan(**settings))
    assert sizes == component_bytes(tmp_path)
    package = PackedFolder(tmp_path)
    content = bits_by_component(section for blob in package.sizes for section in package.sections(blob))
    assert least == pytest.approx(content)
    assert all(value <= least[name] + 1e-6 for name, value in bound(tmp_path).items())


def test_few_distinct_scales_go_into_a_table_and_come_back(tmp_path):
    model = realistic(scales=16, embedding_bits=16)
    save(model, tmp_path / "few")
    sizes = component_bytes(tmp_path / "few")
    count = sum(linear.scales.numel() for block in model.blocks for linear in block.values())
    assert sizes["scales"] == count // 2 + 2 * 16
    streamed = {name: linear for _, block in reader.stream(tmp_path / "few") for name, linear in block.items()}
    for block in model.blocks:
        for name, linear in block.items():
            assert torch.equal(streamed[name].scales, linear.scales)
    _, sizes, _ = planned(model.config, Plan(bits=4, pattern="2:4", embedding_bits=16, distinct_scales=16))
    assert sizes == component_bytes(tmp_path / "few")
    save(realistic(embedding_bits=16), tmp_path / "many")
    assert component_bytes(tmp_path / "many")["scales"] <= 2 * count


def test_the_unstructured_plan_is_close(tmp_path):
    model = realistic(pattern="unstructured")
    linears = [linear for block in model.blocks for linear in block.values()]
    kept = sum(int(linear.keep.sum()) for linear in linears) / sum(linear.keep.numel() for linear in linears)
    save(model, tmp_path)
    table = json.loads((tmp_path / DESCRIPTION).read_text())["scales"]
    settings = {"distinct_scales": table["values"], "kinds": table["kinds"], "sparsity": 1 - kept}
    plan = Plan(bits=4, pattern="unstructured", group_size=32, embedding_bits=8, **settings)
    assert planned_bytes(model.config, plan) == pytest.approx(
        sum(path.stat().st_size for path in tmp_path.iterdir()), rel=0.001
    )


def test_plans_that_make_no_sense_are_refused():
    for changed, message in (
        ({"group_size": 48}, "group_size = 48 doesn't divide rows of 128"),
        ({"pattern": "2:48"}, "pattern 2:48 can't be packed"),
        ({"pattern": "3:7"}, "128 inputs, not divisible by groups of 3:7"),
        ({"rank": 65}, "has rank 65, above the smaller side"),
        ({"embedding_bits": 5}, "4, 8 or 16 bits, not 5"),
    ):
        with pytest.raises(InputError, match=message):
            planned_bytes(REALISTIC, Plan(**changed))
    with pytest.raises(InputError, match="supported are"):
        planned_bytes(REALISTIC | {"architectures": ["LlamaWithoutEnd"]}, Plan())
