"""The report and the terminal's table, from synthetic results of the other stages."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import NamedTuple

import networkx as nx
import pandas as pd
import pytest

from tasks import charts, report, summary

MODELS = ("fetch", "depth_prune", "wanda", "lora", "gptq", "eora", "package")
SIZES = {"blocks": 4_100_000, "scales": 0, "embedding": 524_288, "norms": 6_400, "adapter": 0, "metadata": 140_000}
SMALL = {"blocks": 900_000, "scales": 140_000, "embedding": 524_288, "norms": 5_376, "adapter": 0, "metadata": 151_000}
PERPLEXITY = {
    "fetch": (3.1234, 310.5),
    "depth_prune": (4.2, 402.25),
    "wanda": (9.75, 640.125),
    "lora": (3.6789, 355.5),
    "gptq": (3.9012, 371.25),
    "eora": (3.81, 366.75),
    "package": (3.81, 366.75),
}
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
EVIL = 'be <script>alert(1)</script> & "quoted" {{ 7 * 7 }}'


class Node(NamedTuple):
    addressing: str


def metrics(name):
    compressed = name in ("gptq", "eora", "package")
    sizes = dict(SMALL if compressed else SIZES)
    if name in ("eora", "package"):
        sizes["adapter"] = 61_440
    sparse = name not in ("fetch", "depth_prune")
    test, ood = PERPLEXITY[name]
    blocks = 2_064_384 if name == "fetch" else 1_720_320
    return {
        "model": name,
        "evaluated": True,
        "protocol": "joined-512-512-nobos-fp32",
        "perplexity": {"test": test, "test_ood": ood},
        "predictions": {"test": 30_660, "test_ood": 9_198},
        "parameters": blocks + 265_344,
        "block_parameters": blocks,
        "zeros": blocks // 2 if sparse else 0,
        "zero_fraction": 0.5 if sparse else 0.0,
        "max_kept": {"4": 2, "8": 4, "16": 8, "32": 16} if sparse else {"4": 4, "8": 8, "16": 16, "32": 32},
        "bytes": sizes | {"total": sum(sizes.values())},
    }


def fit_on(device, verdict, used):
    usable = 3_774_873
    return {
        "device": device,
        "verdict": verdict,
        "limiting_term": "mram: weights",
        "bytes_over": max(0, used - usable),
        "headroom_bytes": max(0, usable - used),
        "placement": [
            {
                "tier": "mram",
                "capacity": 4_194_304,
                "usable": usable,
                "items": {"weights": used - 150_000, "metadata": 150_000},
                "used": used,
                "over": max(0, used - usable),
            },
            {
                "tier": "l1",
                "capacity": 262_144,
                "usable": 235_929,
                "items": {"scratch": 3_072},
                "used": 3_072,
                "over": 0,
            },
            {
                "tier": "tile_sram",
                "capacity": 4_194_304,
                "usable": usable,
                "items": {"kv_cache": 1_310_720, "activations": 6_000},
                "used": 1_316_720,
                "over": 0,
            },
        ],
        "tokens_per_second": {
            "bound": 6543.21,
            "bandwidth": 6543.21,
            "compute": 400_000.0,
            "limited_by": "bandwidth",
            "tier": "mram",
        },
        "notes": ["weights are int4-group, which the compute unit does not take as they are"],
    }


def fit():
    row = {key: value for key, value in fit_on("siracusa", "FITS", 1_782_104).items() if key != "placement"}
    return fit_on("siracusa", "FITS", 1_782_104) | {
        "fetched": fit_on("siracusa", "DOES_NOT_FIT", 4_800_000) | {"stored_bytes": 4_770_688},
        "all_devices": [row | {"device": name, "fetched_verdict": "FITS"} for name in ("esp32-s3", "siracusa")],
        "description": "A system-on-chip with a neural engine beside its memory.",
        "safety_margin": 0.1,
        "sources": [{"figure": "mram.bytes", "value": 4_194_304, "source": "a sheet, https://example.org/sheet"}],
        "stored_bytes": 1_782_104,
        "workload": {"context": 512, "batch": 1, "kv_bits": 16, "activation_bits": 16},
    }


def manifest():
    return {
        "files": {"model.safetensors": {"bytes": 1_500_000, "sha256": "ab" * 32}},
        "pattern": "2:4",
        "lineage": {
            "source": {"model": {"kind": "local", "path": "data/base_model/model", "<b>": "x"}, "corpora": {}},
            "parameters": {"wanda": {"enabled": True, "keep": 2, "of": 4}, "lora": {"enabled": True, "rank": 16}},
            "inputs": {"source.json": "cd" * 32},
        },
    }


def tables():
    layers = range(12)
    scores = {
        name: [0.02 + 0.01 * ((layer * step) % 7) for layer in layers] for step, name in enumerate(report.SCORES, 2)
    }
    linears = [f"model.layers.{block}.{kind}" for block in range(10) for kind in LINEARS]
    count = len(linears)
    before = [0.05 + 0.002 * (index % 9) for index in range(count)]
    return {
        "importance/scores.csv": pd.DataFrame({"layer": layers, **scores}),
        "wanda/layers.csv": pd.DataFrame(
            {"linear": linears, "rows": 128, "cols": 128, "zeros": 8192, "alpha": [None] * count}
        ),
        "lora/history.csv": pd.DataFrame(
            {
                "step": range(1, 201),
                "loss": [3 - 0.005 * step for step in range(200)],
                "causal_lm": [2 - 0.003 * step for step in range(200)],
                "distillation": [4 - 0.007 * step for step in range(200)],
                "learning_rate": 1e-3,
            }
        ),
        "gptq/layers.csv": pd.DataFrame({"linear": linears, "error": before, "zeros": 8192, "violations": 0}),
        "eora/layers.csv": pd.DataFrame(
            {
                "linear": linears,
                "error_before": before,
                "error_after": [0.7 * value for value in before],
                "rank": 8,
                "bytes": 4096,
            }
        ),
    }


@pytest.fixture
def results(tmp_path):
    """The files that the report reads, by the suffix that it asks for."""
    inputs = {name: tmp_path / "data" / name for name in tables()}
    records = {"removed.json": {"removed": [6, 5], "kept": [], "method": "block_influence", "schedule": "one_shot"}}
    records |= {"manifest.json": manifest(), "fit.json": fit()}
    inputs |= {name: tmp_path / "data" / name for name in records}
    for name, table in tables().items():
        inputs[name].parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(inputs[name], index=False)
    for name, record in records.items():
        inputs[name].write_text(json.dumps(record))
    for name in MODELS:
        folder = tmp_path / "data/evaluate" / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(metrics(name)))
        rows = [
            {"prompt": "The software must", "completion": EVIL},
            {"prompt": "Users", "completion": f" log in {name}"},
        ]
        (folder / "completions.json").write_text(json.dumps(rows))
    return inputs


@pytest.fixture
def make(make_stage, results, tmp_path):
    def stage(out="out"):
        made = make_stage({"report": {"enabled": True}}, results, out)
        graph = nx.DiGraph()
        for user, dependency in EDGES:
            graph.add_edge(Node(user), Node(dependency))
        made.dvc = SimpleNamespace(repo=SimpleNamespace(index=SimpleNamespace(graph=graph)))
        made.inputs_below = lambda folder: [tmp_path / "data" / folder / name for name in MODELS]
        return made

    return stage


CHAIN = ("base_model", "fetch", "calibrate", "importance", *MODELS[1:])
EDGES = [
    *zip(CHAIN[1:], CHAIN, strict=False),
    ("base_model", "corpus"),
    ("fetch", "corpus"),
    *(("fetch", "lora")[::-1], ("gptq", "wanda"), ("eora", "lora"), ("eora", "fetch"), ("package", "fetch")),
    *((f"evaluate@{name}", name) for name in MODELS),
    *((f"evaluate@{name}", "fetch") for name in MODELS[1:]),
    *(("report", f"evaluate@{name}") for name in MODELS),
    ("hardware_fit", "package"),
    ("report", "hardware_fit"),
    ("report", "importance"),
    ("report", "gptq"),
]


def page(stage):
    report.run(stage)
    return stage.output("report.html").read_text(encoding="utf-8")


def cells(text):
    """The rows of every HTML table, as texts of their cells."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tables, self.inside = [], False

        def handle_starttag(self, tag, attrs):
            if tag == "table":
                self.tables.append([])
            elif tag == "tr":
                self.tables[-1].append([])
            elif tag in ("td", "th"):
                self.tables[-1][-1].append("")
                self.inside = True
            elif tag in ("small", "br") and self.inside:
                self.tables[-1][-1][-1] += " "

        def handle_endtag(self, tag):
            self.inside = self.inside and tag not in ("td", "th")

        def handle_data(self, data):
            if self.inside:
                self.tables[-1][-1][-1] += data

    reader = Reader()
    reader.feed(re.sub(r"<script.*?</script>", "", text, flags=re.S))
    return reader.tables


def test_tables_hold_the_stages_own_numbers(make):
    stage = make()
    shown = {row[0]: row for row in cells(page(stage))[0][1:]}
    written = pd.read_csv(stage.output("stages.csv")).set_index("stage")
    assert list(written.index) == list(MODELS)
    for name in MODELS:
        given = metrics(name)
        assert written.loc[name, "parameters"] == given["parameters"]
        assert written.loc[name, "bytes"] == given["bytes"]["total"]
        assert (written.loc[name, "perplexity_test"], written.loc[name, "perplexity_test_ood"]) == PERPLEXITY[name]
        row = shown[name]
        assert row[1] == f"{given['parameters']:,}"
        assert row[4].split()[0] == f"{given['bytes']['total']:,}"
        assert [cell.split()[0] for cell in row[5:7]] == [f"{value:.3f}" for value in PERPLEXITY[name]]
        assert row[7] == given["protocol"]
    assert shown["wanda"][2:4] == ["50.00 %", "2:4"]
    assert shown["fetch"][2:4] == ["0.00 %", "none"]
    assert shown["package"][5] == "3.810 +22.0 %"  # 3.81 / 3.1234 = 1.2198


def test_bytes_by_component_add_up_to_the_total(make):
    stage = make()
    report.run(stage)
    sums = pd.read_csv(stage.output("bytes.csv")).groupby("stage")["bytes"].sum()
    assert {name: metrics(name)["bytes"]["total"] for name in MODELS} == sums.to_dict()


def test_metrics_are_flat_and_right(make):
    stage = make()
    report.run(stage)
    found = json.loads(stage.output("metrics.json").read_text())
    assert all(isinstance(value, (int, float, str)) for value in found.values())
    stored, shipped = sum(SIZES.values()), sum(SMALL.values()) + 61_440
    assert found["compression_vs_stored"] == pytest.approx(stored / shipped)
    assert found["compression_vs_fp32"] == pytest.approx(4 * 2_329_728 / shipped)
    assert found["compression_vs_bf16"] == pytest.approx(2 * 2_329_728 / shipped)
    assert found["perplexity_ratio_test_ood"] == pytest.approx(366.75 / 310.5)
    assert found["fits"] is True
    assert found["tokens_per_second_bound"] == 6543.21


def test_verdict_is_the_first_line(make):
    text = page(make())
    first = re.search(r"<h1>(.*?)</h1>", text)[1]
    assert first == "The packaged model fits siracusa: 1,992,769 bytes stay free (mram: weights)."
    assert "3.810 on test (fetched 3.123, +22.0 %) and 366.750 on test_ood (fetched 310.500, +18.1 %)" in text


def test_what_models_wrote_is_text(make):
    text = page(make())
    assert "alert(1)" in text
    assert html.escape(EVIL, quote=False).replace('"', "&#34;") in text
    assert "<script>alert" not in text
    assert "<b>" not in text
    # every script of the page is one that its policy names, or data
    scripts = re.findall(r"<script([^>]*)>", text)
    assert [given for given in scripts if "application/json" not in given] == ["", ""]


def test_page_refers_to_nothing_outside_it(make):
    text = page(make())
    own = text.replace(bundle(), "")
    assert re.findall(r"""(?:src|href|action|srcset)\s*=\s*["']?(?:https?:)?//""", own) == []
    assert "url(http" not in text and "@import" not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy
    hashes = [hashlib.sha256(script.encode()).digest() for script in (bundle(), report.STARTER)]
    allowed = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes]
    assert re.search(r"script-src ([^;]*)", policy)[1].split() == allowed


def bundle():
    return report.vl_convert.javascript_bundle(vl_version=charts.VEGA_LITE)


def test_same_inputs_give_the_same_bytes(make):
    one, other = make("one"), make("other")
    report.run(one)
    report.run(other)
    for name in ("report.html", "stages.csv", "bytes.csv", "metrics.json"):
        assert one.output(name).read_bytes() == other.output(name).read_bytes()
    assert one.output("report.html").stat().st_size < 2_000_000


@pytest.mark.parametrize("empty", ["header", "nothing"])
def test_switched_off_stages_are_named(make, results, empty):
    for name, table in tables().items():
        results[name].write_text("" if empty == "nothing" else ",".join(table.columns) + "\n")
    results["removed.json"].write_text(
        json.dumps({"removed": [], "kept": list(range(12)), "method": "taylor", "schedule": "greedy"})
    )
    results["fit.json"].write_text(json.dumps({"verdict": "NOT_CHECKED"}))
    results["manifest.json"].write_text(json.dumps({"files": {}, "pattern": None, "lineage": {}}))
    stage = make()
    for folder in stage.inputs_below("evaluate"):
        (folder / "metrics.json").write_text(json.dumps({"model": folder.name, "evaluated": False}))
        (folder / "completions.json").write_text("[]")
    text = page(stage)
    for name in ("importance", "wanda", "lora", "gptq", "eora", "hardware_fit", "package"):
        assert f"Stage {name} is switched off" in text
    assert text.count("not evaluated (switched off)") == len(MODELS)
    assert json.loads(stage.output("metrics.json").read_text()) == {}
    assert len(pd.read_csv(stage.output("stages.csv"))) == len(MODELS)
    assert 'data-plot="spec' not in text


def test_a_model_that_does_not_fit_and_an_infinite_perplexity(make, results, tmp_path):
    results["fit.json"].write_text(json.dumps(fit() | fit_on("siracusa", "DOES_NOT_FIT", 4_000_000)))
    worst = metrics("wanda")
    worst["perplexity"]["test"] = float("inf")
    (tmp_path / "data/evaluate/wanda/metrics.json").write_text(json.dumps(worst))
    stage = make()
    text = page(stage)
    assert "does not fit siracusa: 225,127 bytes over (mram: weights)." in text
    assert {row[0]: row for row in cells(text)[0]}["wanda"][5].startswith("infinite")
    assert json.loads(stage.output("metrics.json").read_text())["fits"] is False


def test_skip_writes_empty_outputs(make):
    stage = make()
    report.skip(stage)
    assert "switched off" in stage.output("report.html").read_text()
    assert list(pd.read_csv(stage.output("stages.csv"))) == report.COLUMNS
    assert json.loads(stage.output("metrics.json").read_text()) == {}


@pytest.mark.parametrize(
    ("max_kept", "expected"),
    [
        ({"4": 2, "8": 4, "16": 8, "32": 16}, ["2:4"]),
        ({"4": 4, "8": 7, "16": 14, "32": 28}, ["7:8"]),
        ({"4": 3, "8": 4, "16": 8, "32": None}, ["3:4", "4:8"]),
        ({"4": 4, "8": 8, "16": 16, "32": 32}, []),
        ({}, []),
    ],
)
def test_patterns_name_the_shortest(max_kept, expected):
    assert report.patterns(max_kept) == expected


def test_dag_draws_every_stage_once_and_every_edge_downwards():
    edges = [(dependency, user) for user, dependency in EDGES]
    nodes = sorted({name for edge in edges for name in edge})
    drawn = charts.dag(nodes, edges)
    boxes = {box["name"]: box for box in drawn["boxes"]}
    assert sorted(boxes) == nodes and len(drawn["boxes"]) == len(nodes)
    assert len(drawn["paths"]) == len(set(edges))
    assert all(boxes[a]["y"] < boxes[b]["y"] for a, b in edges)
    corners = [(box["x"], box["y"]) for box in drawn["boxes"]]
    assert len(set(corners)) == len(corners)


class Out(NamedTuple):
    fs_path: str


def repo_with(outs, root):
    def load_one(name):
        if name not in outs:
            raise summary.DvcException(name)
        return SimpleNamespace(outs=[Out(str(path)) for path in outs[name]])

    class Repo:
        root_dir = str(root)
        stage = SimpleNamespace(load_one=load_one)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    return Repo


def test_summary_joins_seconds_from_the_records(make, tmp_path, monkeypatch):
    stage = make()
    report.run(stage)
    records = tmp_path / "data/lineage"
    records.mkdir(parents=True)
    (records / "wanda.json").write_text(json.dumps({"seconds": 12.345}))
    outs = {"report": [stage.output("stages.csv")], "wanda": [records / "wanda.json"], "lora": [records / "lora.json"]}
    monkeypatch.setattr(summary, "Repo", repo_with(outs, tmp_path))
    rows = {row["stage"]: row for row in summary.rows()}
    assert list(rows) == list(MODELS)
    assert rows["wanda"]["seconds"] == 12.345 and rows["lora"]["seconds"] is None and rows["gptq"]["seconds"] is None
    assert rows["package"]["perplexity_test"] == 3.81
    lines = summary.table().splitlines()
    assert lines[0].split() == ["stage", "parameters", "zeros", "bytes", "ppl", "test", "ppl", "ood", "seconds"]
    assert lines[3].split() == ["wanda", "1,985,664", "50.0%", "4,770,688", "9.750", "640.125", "12.3"]
    assert lines[-1].endswith("joined-512-512-nobos-fp32")


def test_summary_without_a_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "Repo", repo_with({"report": [tmp_path / "stages.csv"]}, tmp_path))
    assert summary.rows() == []
    assert summary.table() == summary.NOTHING
