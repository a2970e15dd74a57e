"""Results of the other stages as the report reads them: synthetic, small, and with figures that are easy to check."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import networkx as nx
import pandas as pd

from tasks.reporting.sections import importance

PIPELINE = ("fetch", "vocabulary", "depth_prune", "wanda", "lora", "gptq", "eora", "qad", "package")
TASKED = ("fetch", "package", "baseline")
MODELS = (*PIPELINE, "baseline_lora", "baseline")
SIZES = {"blocks": 4_100_000, "scales": 0, "embedding": 524_288, "norms": 6_400, "adapter": 0, "metadata": 140_000}
SMALL = {"blocks": 900_000, "scales": 140_000, "embedding": 524_288, "norms": 5_376, "adapter": 0, "metadata": 151_000}
PACKED = {"positions": 281_000, "values": 430_000, "scales": 107_520, "zeros": 0, "embedding": 262_144}
PACKED |= {"norms": 2_688, "adapter": 30_720, "metadata": 36_000}
PLAIN = PACKED | {"positions": 0, "values": 739_000, "adapter": 0, "metadata": 37_028}
PERPLEXITY = {
    "fetch": (3.1234, 310.5),
    "vocabulary": (3.1234, 310.5),
    "depth_prune": (4.2, 402.25),
    "wanda": (9.75, 640.125),
    "lora": (3.6789, 355.5),
    "gptq": (3.9012, 371.25),
    "eora": (3.81, 366.75),
    "qad": (3.81, 366.75),
    "package": (3.81, 366.75),
    "baseline_lora": (2.95, 300.25),
    "baseline": (4.2, 362.0),
}
BITS_PER_BYTE = {"test": 0.75, "test_ood": 2.25}
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
EVIL = 'be <script>alert(1)</script> & "quoted" {{ 7 * 7 }}'


class Out(NamedTuple):
    fs_path: str


class Dep(NamedTuple):
    def_path: str


class Node(NamedTuple):
    addressing: str
    outs: tuple
    deps: tuple


def sizes(name):
    if name in ("package", "baseline"):
        return dict(PACKED if name == "package" else PLAIN)
    return (
        dict(SMALL) | {"adapter": 0 if name == "gptq" else 61_440} if name in ("gptq", "eora", "qad") else dict(SIZES)
    )


def metrics(name):
    sparse = name in ("wanda", "lora", "gptq", "eora", "qad", "package")
    test, ood = PERPLEXITY[name]
    blocks = 1_720_320 if name in PIPELINE[2:] else 2_064_384
    return {
        "model": name,
        "evaluated": True,
        "protocol": "joined-512-512-nobos-fp32",
        "perplexity": {"test": test, "test_ood": ood},
        "bits_per_byte": {split: value + 0.01 * MODELS.index(name) for split, value in BITS_PER_BYTE.items()},
        "predictions": {"test": 30_660, "test_ood": 9_198},
        "parameters": blocks + 265_344,
        "block_parameters": blocks,
        "zeros": blocks // 2 if sparse else 0,
        "zero_fraction": 0.5 if sparse else 0.0,
        "max_kept": {"4": 2, "8": 4, "16": 8, "32": 16} if sparse else {"4": 4, "8": 8, "16": 16, "32": 32},
        "failures": failures(name),
        "bytes": sizes(name) | {"total": sum(sizes(name).values())},
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
        "bound": {
            "positions": 277_971.5,
            "values": 430_000.0,
            "scales": 107_520.0,
            "embedding": 262_144.0,
            "metadata": 0,
        },
        "lineage": {
            "source": {"model": {"kind": "local", "path": "data/base_model/model", "<b>": "x"}, "corpora": {}},
            "parameters": {
                "depth_prune": {"enabled": True, "remove": 2},
                "wanda": {"enabled": True, "keep": 2, "of": 4},
                "lora": {"enabled": True, "rank": 16},
                "gptq": {"enabled": True, "bits": 4, "budget_bytes": None, "joint": None},
                "eora": {"enabled": True, "rank": 4},
            },
            "inputs": {"source.json": "cd" * 32},
        },
    }


def linears(blocks):
    return [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in LINEARS]


def history():
    return pd.DataFrame(
        {
            "step": range(1, 201),
            "loss": [3 - 0.005 * step for step in range(200)],
            "causal_lm": [2 - 0.003 * step for step in range(200)],
            "distillation": [4 - 0.007 * step for step in range(200)],
            "hidden": None,
            "learning_rate": 1e-3,
        }
    )


def ledger(zeros=8192, revived=0, violations=0):
    """60 linears of 128 x 128 weights in 4096 groups; the second one is broken, if any."""
    table = pd.DataFrame(
        {"linear": linears(10), "weights": 16384, "zeros": zeros, "groups": 4096, "violations": 0, "revived": 0}
    )
    table.loc[1, ["violations", "revived"]] = violations, revived
    return table


def tables():
    layers = range(12)
    scores = {
        name: [0.02 + 0.01 * ((layer * step) % 7) for layer in layers] for step, name in enumerate(importance.SCORES, 2)
    }
    count = len(linears(10))
    before = [0.05 + 0.002 * (index % 9) for index in range(count)]
    masks = {"linear": linears(10), "rows": 128, "cols": 128, "zeros": 8192, "alpha": [None] * count}
    quantised = {"linear": linears(10), "bits": 4, "error": before, "zeros": 8192, "violations": 0}
    eora = {"linear": linears(10), "error_before": before, "error_after": [0.7 * value for value in before], "rank": 2}
    bits = [(3, 6784), (4, 8832), (2, 4736), (8, 17024), (4, 8832), (3, 6784)] * 12
    plain = {"linear": linears(12), "weights": 16384, "bits": [b for b, _ in bits], "bytes": [size for _, size in bits]}
    return {
        "importance/scores.csv": pd.DataFrame({"layer": layers, **scores}),
        "wanda/layers.csv": pd.DataFrame(masks),
        "lora/history.csv": history(),
        "gptq/layers.csv": pd.DataFrame(quantised),
        "qad/history.csv": history(),
        "eora/layers.csv": pd.DataFrame(eora).assign(bytes=512, bits_per_weight_equivalent=0.25),
        **{f"{name}/sparsity.csv": ledger() for name in ("wanda", "lora")},
        **{f"{name}/sparsity.csv": ledger(zeros=8300) for name in ("gptq", "eora", "qad", "package")},
        "baseline_lora/history.csv": history(),
        "kv_cache/kv_cache.csv": kv_cache(),
        "hardware_fit/devices.csv": devices(),
        "baseline/bits.csv": pd.DataFrame(plain).assign(sensitivity=0.001),
    }


CHAIN = ("base_model", "fetch", "vocabulary", "calibrate", "importance", *MODELS[2:])
ITEMS = [f"{model}-{task}" for model in TASKED for task in ("corpus", "hellaswag")]
EDGES = [
    *zip(CHAIN[1:], CHAIN, strict=False),
    ("base_model", "corpus"),
    ("fetch", "corpus"),
    *(("fetch", "lora")[::-1], ("gptq", "wanda"), ("eora", "lora"), ("eora", "fetch"), ("package", "fetch")),
    *((f"evaluate@{name}", name) for name in MODELS),
    *((f"evaluate@{name}", "fetch") for name in MODELS[1:]),
    *(("report", f"evaluate@{name}") for name in MODELS),
    *((f"harness@{item}", item.split("-")[0]) for item in ITEMS),
    *(("report", f"harness@{item}") for item in ITEMS),
    *(("kv_cache", "package"), ("report", "kv_cache")),
    ("hardware_fit", "package"),
    ("report", "hardware_fit"),
    ("report", "importance"),
    ("report", "gptq"),
]


SCORES = {"fetch": (0.30, 0.020), "package": (0.33, 0.010), "baseline": (0.22, 0.021)}
"""Accuracy and its standard error: 0.03 above the fetched model is within 1.96 x sqrt(0.02^2 + 0.01^2) = 0.0438."""


def task_scores(model, task):
    """scores.json of stage harness."""
    accuracy, error = SCORES[model]
    found = {"acc": {"value": accuracy, "stderr": error, "higher_is_better": True}}
    if task == "corpus":
        number = 1.5 + 0.01 * TASKED.index(model)
        found = {"bits_per_byte": {"value": number, "stderr": None, "higher_is_better": False}}
    return {"model": model, "task": task, "evaluated": True, "samples": 40, "documents": 500, "limit": 40} | {
        "metrics": found,
        "agreement": {"protocol": "rolling", "log_likelihood": -5e4, "relative_difference": 2e-7}
        if task == "corpus"
        else None,
    }


def kv_cache():
    """kv_cache.csv: 4 bit is worse at both lengths, 8 bit is not."""
    rows = []
    for length in (128, 512):
        for bits, nats, error in ((16, 0.0, 0.0), (8, 0.0001, 0.0004), (4, 0.02, 0.001)):
            size = length * 10 * 2 * 32 * bits // 8
            rows.append({"context": length, "bits": bits, "protocol": f"joined-{length}-{length}-nobos-fp32"})
            rows[-1] |= {"windows": 4, "predictions": 4 * (length - 1), "perplexity": 4 + 100 / length + 10 * nats}
            rows[-1] |= {"bits_per_byte": 1.7, "nats": nats, "nats_error": error, "bytes": size}
            rows[-1] |= {"codes": size, "scales": 0, "float16": 0, "bytes_per_token": size / length, "ratio": 16 / bits}
    return pd.DataFrame(rows)


def devices():
    """devices.csv of stage hardware_fit."""
    rows = []
    for name, verdict, over, way in (
        ("esp32-s3", "DOES_NOT_FIT", 700_000, "-2 layers; 1.9 bits per weight"),
        ("phone", "FITS_STREAMING", 0, "context <= 384"),
        ("siracusa", "FITS", 0, ""),
    ):
        row = {"device": name, "verdict": verdict, "weights_bytes": 1_632_104, "kv_bytes": 1_310_720}
        row |= {"activation_bytes": 9_072, "total_bytes": 3_100_000, "capacity_bytes": 4_000_000}
        row |= {"headroom_bytes": 900_000 if not over else 0, "bytes_over": over, "limiting_term": "mram: weights"}
        row |= {"placement": "mram 1,632,104 of 3,774,873: weights (all)", "streamed_bytes_per_token": 0}
        row |= {"bandwidth_seconds": 1e-4, "compute_seconds": 1e-5, "tokens_per_second_bound": 6543.21}
        row |= {"limited_by": "bandwidth of mram", "ways_to_fit": way, "notes": "no use for zeros"}
        rows.append(row | {"fetched_verdict": "FITS"})
    return pd.DataFrame(rows)


def overlap():
    """overlap.json: test is in-domain, test_ood isn't."""
    common = {"documents": 60, "verbatim": 0, "verbatim_share": 0.0, "contaminated": 3, "contaminated_share": 0.05}
    common |= {"run_share": 0.002, "same_source": None, "domain_share": 0.1}
    inside = common | {"similarity": 0.42, "domain": "in-domain", "because": "similarity 0.420, limit 0.075"}
    outside = common | {"similarity": 0.01, "domain": "out-of-domain", "because": "similarity 0.010, limit 0.075"}
    return {"measured": True, "words": 13, "domain_words": 5, "splits": {"test": inside, "test_ood": outside}} | {
        "train": {"documents": 16_000, "own_share": 0.3}
    }


def documents(name, perplexity=None):
    """documents.csv of stage evaluate: sums of 20 documents a split, which agree with the model's perplexity.

    Each document deviates by as much in every model, so that of the paired differences nothing is left.
    """
    rows = []
    for split, value in zip(("test", "test_ood"), perplexity or PERPLEXITY[name], strict=True):
        for document in range(20):
            nll = 100 * math.log(value) + (document % 5 - 2)
            rows.append({"split": split, "document": document, "predictions": 100, "bytes": 400, "nll": nll})
    return pd.DataFrame(rows)


def evaluation(folder, name, perplexity):
    """Write another perplexity of a model, on (test, test_ood)."""
    evaluated = folder / "data/evaluate" / name
    found = metrics(name) | {"perplexity": dict(zip(("test", "test_ood"), perplexity, strict=True))}
    (evaluated / "metrics.json").write_text(json.dumps(found))
    documents(name, perplexity).to_csv(evaluated / "documents.csv", index=False)


def host(name):
    """What stage measure notes of a model; the machine has no meter of energy."""
    speed = 20.0 + MODELS.index(name)
    return {
        "files": f"digest of {name}",
        "import_seconds": 3.0,
        "load_seconds": 0.25,
        "first_token_seconds": 0.0625,
        "cpu_seconds_per_token": 0.05,
        "peak_bytes": 512 * 2**20,
        "above_libraries_bytes": 24 * 2**20,
        "seconds_per_token": {"median": 1 / speed, "least": 0.9 / speed, "largest": 1.2 / speed},
        "tokens_per_second": {"1": speed, "4": 3 * speed},
        "joules_per_token": None,
    }


def failures(name):
    """What a model's completions are counted as; one of wanda's loops."""
    return {"completions": 2, "loops": int(name == "wanda"), "empty": 0, "never_ending": 2} | {
        "seq_rep_4": 0.25,
        "non_ascii_share": 0.0,
    }


def records():
    removed = {"removed": [6, 5], "kept": [], "method": "block_influence", "schedule": "one_shot"}
    return {
        "removed.json": removed,
        "package/model/manifest.json": manifest(),
        "hardware_fit/fit.json": fit(),
        "overlap.json": overlap(),
    }


def write(folder):
    """All of it as files below folder / data; returns them by the name that the report asks for."""
    inputs = {name: folder / "data" / name for name in (*tables(), *records())}
    inputs |= {f"data/{name}": folder / "data" / name for name in ("evaluate", "harness", "measure")}
    inputs |= {"kv_cache.csv": inputs["kv_cache/kv_cache.csv"]}
    for name, table in tables().items():
        inputs[name].parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(inputs[name], index=False)
    for name, record in records().items():
        inputs[name].parent.mkdir(parents=True, exist_ok=True)
        inputs[name].write_text(json.dumps(record))
    for item in (*ITEMS, "package-gone"):  # dvc.yaml no longer has the last one
        (folder / "data/harness" / item).mkdir(parents=True)
        scores = task_scores(*item.replace("gone", "corpus").split("-"))
        (folder / "data/harness" / item / "scores.json").write_text(json.dumps(scores))
    for name in MODELS:
        evaluated = folder / "data/evaluate" / name
        evaluated.mkdir(parents=True)
        (evaluated / "metrics.json").write_text(json.dumps(metrics(name)))
        documents(name).to_csv(evaluated / "documents.csv", index=False)
        rows = [
            {"prompt": "The software must", "completion": EVIL},
            {"prompt": "Users", "completion": f" log in {name}"},
        ]
        (evaluated / "completions.json").write_text(json.dumps(rows))
    inputs |= {"lineage/measure.json": folder / "data/lineage/measure.json"}
    for path, content in zip(("measure/models.json", "lineage/measure.json"), measured(), strict=True):
        (folder / "data" / path).parent.mkdir(parents=True)
        (folder / "data" / path).write_text(json.dumps(content))
    return inputs


def measured():
    """(models.json, the record) of stage measure."""
    workload = {"threads": 1, "prompt_tokens": 32, "new_tokens": 64, "generations": 3, "rounds": 1}
    models = {name: {"bytes": sum(sizes(name).values()), "files": host(name)["files"]} for name in MODELS}
    record = {"measured": {name: host(name) for name in MODELS}, "workload": workload}
    record |= {"host": {"processor": "A processor", "cores": 2}, "started": "2026-11-20T10:00:00+00:00"}
    return {"measured": True, "engine": "PyTorch, float32", "workload": workload, "models": models}, record


def report_stage(folder, inputs, out="out"):
    """What `report.run` gets: these inputs, a DAG of the usual stages; it writes to folder / out."""

    def output(name):
        (folder / out).mkdir(exist_ok=True)
        return folder / out / name

    graph = nx.DiGraph()
    for user, dependency in EDGES:
        graph.add_edge(node(folder, user), node(folder, dependency))
    return SimpleNamespace(
        input=lambda name: Path(inputs[name]),
        has_input=lambda name: name in inputs,
        output=output,
        folder=folder / "data/report",
        dvc=SimpleNamespace(repo=SimpleNamespace(index=SimpleNamespace(graph=graph, stages=list(graph)))),
    )


def node(folder, address):
    """A stage that writes a model."""
    name, _, item = address.partition("@")
    paths = [f"data/{name}/{item}" if item else f"data/{name}"]
    deps = tuple(
        Dep(f"data/{source}/model") for source, user in zip(PIPELINE, PIPELINE[1:], strict=False) if user == name
    )
    return Node(address, tuple(Out(str(folder / path)) for path in paths), deps)
