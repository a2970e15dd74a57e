"""The benchmarks' chain of real stages on a tiny model, their tables, and that every point is one that can be run."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.algorithms.errors import InputError
from tasks.parameters import schema
from tests.benchmarks import chain as chains
from tests.benchmarks import curve, defaults, quantisation, recovery, sparsity, table
from tests.benchmarks.chain import Chain, declared
from tests.support import project
from tests.support.paths import ROOT

QUICK = project.QUICK | {"lora.steps": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_llama):
    """A chain on a random Llama and four short corpora."""
    folder = tmp_path_factory.mktemp("benchmarks")
    return Chain(tiny_llama(folder / "model"), project.short_corpora(folder), folder / "cache", QUICK)


def test_a_model_is_fetched_and_evaluated_as_in_a_plain_loop(tiny):
    folder = tiny.output("fetch")
    rows = (folder / "corpora/test.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(row)["text"] for row in rows)
    ids = AutoTokenizer.from_pretrained(folder / "model")(text, add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    losses = []
    for start in range(0, 4 * 64, 64):  # evaluate.max_windows x evaluate.length
        window = torch.tensor([ids[start : start + 64]])
        with torch.no_grad():
            losses.append(F.cross_entropy(model(window).logits[0, :-1], window[0, 1:], reduction="none"))
    assert tiny.perplexity("fetch")["test"] == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-5)


def test_the_whole_chain_is_computed_once_and_only_what_a_parameter_changes_again(tiny):
    perplexity = tiny.perplexity("package")
    assert set(perplexity) == {"test", "test_ood"} and all(map(math.isfinite, perplexity.values()))
    assert tiny.computed.index("lora") < tiny.computed.index("gptq") < tiny.computed.index("package")
    assert not (ROOT / "data/.scratch/package").exists()

    again = tiny.variant()
    assert again.perplexity("package") == perplexity and again.computed == []
    assert again.seconds("lora") == tiny.seconds("lora") > 0
    other = tiny.variant({"eora.rank": 2})
    other.output("package")
    assert other.computed == ["eora", "qad", "package"]


def test_bytes_are_those_of_the_files(tiny):
    folder = tiny.output("package") / "model"
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert tiny.folder_bytes("package") == total
    assert 0 < tiny.bytes("package") < total
    assert tiny.bytes("fetch") == (tiny.output("fetch") / "model/model.safetensors").stat().st_size


def test_a_replaced_input_counts_by_its_content(tiny):
    model = tiny.output("fetch") / "model"
    assert tiny.measure(model) == tiny.perplexity("fetch")
    same = tiny.variant(replaced={("lora", "data/wanda/model"): tiny.output("wanda") / "model"})
    same.output("lora")
    assert same.computed == []


def test_what_a_stage_refuses_is_a_note_and_leaves_nothing_behind(tiny, tmp_path, capsys):
    before = sorted(path.name for path in (tiny.scratch / "gptq").iterdir()) if (tiny.scratch / "gptq").exists() else []
    rows = table.Table(tmp_path / "rows.csv", ["point", "ppl"])

    def refused():
        return {"ppl": tiny.variant({"gptq.group_size": 128}).perplexity("gptq")["test"]}

    table.fill(rows, [({"point": "g128"}, refused), ({"point": "other"}, lambda: {"ppl": 2.5})], only="g|oth")
    text = (tmp_path / "rows.csv").read_text(encoding="utf-8")
    assert "128" in text.splitlines()[1] and text.splitlines()[2] == "other,2.5,"
    assert sorted(path.name for path in (tiny.scratch / "gptq").iterdir()) == before
    assert "| other | 2.500 |  |" in capsys.readouterr().out


def test_a_table_goes_on_where_it_was(tmp_path, capsys):
    path = tmp_path / "results/rows.csv"
    first = table.Table(path, ["a", "b", "x"], identity=2)
    first.add(a="1", b="1", x=1)
    first.add(a="1", b="2", x=1 / 3)
    again = table.Table(path, ["a", "b", "x"], identity=2, fresh=False)
    table.fill(again, [({"a": "1", "b": "1"}, lambda: {"x": 7}), ({"a": "1", "b": "2"}, lambda: 1 / 0)], only="1 1")
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [["a", "b", "x", "note"], ["1", "1", "7", ""], ["1", "2", "0.333333333", ""]]
    with pytest.raises(InputError, match="expected"):
        table.Table(path, ["a", "y"], fresh=False)
    with pytest.raises(LookupError, match="no column"):
        again.add(a="1", z=1)


def test_dvc_yaml_is_read_with_its_values_and_its_matrix(tmp_path):
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n"
        "  first: {deps: ['${a.path}', 'tasks/first.py'], params: [a], outs: [data/first: {cache: false}]}\n"
        "  each:\n"
        "    matrix: {model: [first, last]}\n"
        "    deps: ['data/${item.model}/model']\n"
        "    outs: ['data/each/${item.model}']\n",
        encoding="utf-8",
    )
    stages = declared(tmp_path / "dvc.yaml", {"a": {"path": "data//source/model"}})
    assert list(stages) == ["first", "each@first", "each@last"]
    assert stages["first"].deps == ("data/source/model", "tasks/first.py")
    assert stages["first"].out == "data/first"
    assert stages["each@last"].deps == ("data/last/model",)
    assert stages["each@last"].out == "data/each/last"


def test_a_digest_is_of_names_and_contents(tmp_path):
    made = []
    for place, name, content in (("a", "x", "1"), ("b", "x", "1"), ("c", "x", "2"), ("d", "y", "1")):
        (tmp_path / place).mkdir()
        (tmp_path / place / name).write_text(content)
        made.append(chains.digest(tmp_path / place))
    assert made[0] == made[1] and len(set(made)) == 3
    with pytest.raises(FileNotFoundError, match="declared"):
        chains.digest(tmp_path / "nothing")


def test_every_point_can_be_run_and_has_a_name_of_its_own():
    raw = chains._yaml(ROOT / "params.yaml")
    quantised = list(quantisation.points())
    assert len({(source, name) for source, name, _ in quantised}) == len(quantised)
    assert len({point.name for point in curve.POINTS}) == len(curve.POINTS)
    removed = table.SUBJECTS["built-in"].removed
    everything = [
        *({**quantisation.BASE, **params} for _, _, params in quantised),
        *({**recovery.PRUNED, **params} for params, _ in recovery.ARMS.values()),
        *({**recovery.MASKED, **losses} for _, losses in recovery.ARMS.values() if losses),
        *({**curve.COMMON, **(removed if point.shallow else {}), **point.params} for point in curve.POINTS),
        *(params for _, params in defaults.POINTS.values()),
        *sparsity.PATTERNS.values(),
        *({**params, **sparsity.STOCK} for params in sparsity.PATTERNS.values()),
    ]
    for params in everything:
        for subject in table.SUBJECTS.values():
            schema.parse(chains.changed(raw, {**table.COMMON, **subject.params, **params}), "point")


def test_violations_and_revived_weights_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    keep = {
        "a": torch.tensor([[True, True, False, False]] * 6),
        "b": torch.tensor([[False, True, True, False] * 2] * 3),
    }
    weights = {name: torch.randint(0, 2, mask.shape, generator=generator).float() for name, mask in keep.items()}
    expected = {"groups": 0, "violations": 0, "revived": 0}
    for name, weight in weights.items():
        for row, mask in zip(weight.tolist(), keep[name].tolist(), strict=True):
            expected["revived"] += sum(value != 0 and not kept for value, kept in zip(row, mask, strict=True))
            for start in range(0, len(row), 4):
                expected["groups"] += 1
                expected["violations"] += sum(value != 0 for value in row[start : start + 4]) > 2
    found = sparsity.count(weights, keep, "2:4")
    assert expected["violations"] > 0 and expected["revived"] > 0
    assert {key: found[key] for key in expected} == expected
    linears = {name: torch.nn.Linear(*reversed(weight.shape), bias=False) for name, weight in weights.items()}
    sparsity.multiply(linears, keep)
    after = sparsity.count({name: linear.weight for name, linear in linears.items()}, keep, "2:4")
    assert (after["violations"], after["revived"]) == (0, 0)


def test_the_closed_gap():
    assert recovery.closed(100.0, 100.0, 20.0) == 0
    assert recovery.closed(100.0, 40.0, 20.0) == 0.75
    assert recovery.closed(100.0, 10.0, 20.0) > 1
    assert math.isnan(recovery.closed(5.0, 5.0, 5.0))
