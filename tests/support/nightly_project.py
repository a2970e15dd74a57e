"""A git and DVC project whose stages write what the gate reads, in a second: how the nights work, without a model.

Stage measure notes its speeds in its lineage record, which the report reads, as the project's do. Its source's
weights.json says what comes out: `nats` are added to every document's score, `bits` (a parameter) of 2 add more, and a
context above 1,000 does not fit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from dvc.repo import Repo

from tests.support.paths import ROOT
from tests.support.project import change, clean_environment

STAGE = """
import csv, hashlib, json, math, os, sys
from pathlib import Path
import yaml

name, _, item = sys.argv[1].partition("@")
params = yaml.safe_load(Path("params.yaml").read_text())
out = Path("data", name, item)
out.mkdir(parents=True, exist_ok=True)


def package():
    nats = json.loads(Path("data/fetch/model/weights.json").read_text())["nats"]
    weights = json.dumps({"nats": nats + (0.5 if params["gptq"]["bits"] == 2 else 0), "bits": params["gptq"]["bits"]})
    (out / "model").mkdir(exist_ok=True)
    (out / "model/model.safetensors").write_text(weights)
    files = {"model.safetensors": {"bytes": len(weights), "sha256": hashlib.sha256(weights.encode()).hexdigest()}}
    (out / "model/manifest.json").write_text(json.dumps({"files": files, "bound": {"values": 10.0}}))


def evaluate():
    file = {"package": "data/package/model/model.safetensors"}.get(item, "data/fetch/model/weights.json")
    added = json.loads(Path(file).read_text())["nats"] - (0.05 if item == "baseline_lora" else 0)
    scores = [(document, 100 * (2 + math.sin(document) / 3 + added)) for document in range(60)]
    rows = [[split, document, 100, 400, nll] for split in ("test", "test_ood") for document, nll in scores]
    with open(out / "documents.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\\n").writerows([["split", "document", "predictions", "bytes", "nll"], *rows])
    perplexity = {s: math.exp(sum(r[4] for r in rows if r[0] == s) / 6000) for s in ("test", "test_ood")}
    size = sum(p.stat().st_size for p in Path("data", item, "model").iterdir()) if item == "package" else 1000
    metrics = {"evaluated": True, "protocol": "toy", "perplexity": perplexity, "bytes": {"total": size}}
    (out / "metrics.json").write_text(json.dumps(metrics))


if name == "fetch":
    (out / "model").mkdir(exist_ok=True)
    (out / "model/weights.json").write_bytes(Path(params["fetch"]["model"]["path"], "weights.json").read_bytes())
elif name == "hardware_fit":
    fits = params["hardware_fit"]["context"] <= 1000
    over = 0 if fits else 4096
    found = {"device": "toy", "limiting_term": "ram: kv_cache", "headroom_bytes": 1024 * fits, "bytes_over": over}
    (out / "fit.json").write_text(json.dumps({"verdict": "FITS" if fits else "DOES_NOT_FIT"} | found))
    text = Path(params["fetch"]["corpora"]["train"]["path"]).read_text()
    leaked = {"verbatim_share": 1.0 if "leak" in text else 0.0, "run_share": 0.0}
    Path("data/overlap").mkdir(exist_ok=True)
    Path("data/overlap/overlap.json").write_text(json.dumps({"splits": {"test": leaked}}))
elif name == "measure":
    from types import SimpleNamespace
    from dvc.repo import Repo
    from tasks.runtime import edits, lineage
    digest = hashlib.md5(Path("data/package/model/model.safetensors").read_bytes()).hexdigest()
    models, seconds = {"package": {"bytes": 9, "files": digest}}, {"median": 0.01, "least": 0.009, "largest": 0.02}
    (out / "models.json").write_text(json.dumps({"measured": True, "workload": "w", "models": models}))
    facts = {"measured": {"package": {"files": digest, "seconds_per_token": seconds}}, "workload": "w", "host": "h"}
    dvc = Repo().stage.load_one(name=name)
    stage = SimpleNamespace(address=name, name=name, params=None, dvc=dvc, facts=facts, start=edits.Start(dvc))
    lineage.record(stage, started=__import__("time").time(), run_ids={})
elif name == "report":
    (out / "report.html").write_text(Path("data/lineage/measure.json").read_text())
    (out / "plots").mkdir()
    (out / "plots/captions.json").write_text("{}")
    (out / "verdict.txt").write_text("A toy.\\n")
    (out / "stages.csv").write_text("stage,bytes,protocol\\npackage,1,toy\\n")
else:
    {"package": package, "evaluate": evaluate}[name]()
"""


def stage(name: str, deps: list[str], params: list[str], outs: list[str]) -> dict:
    return {"cmd": f"python stage.py {name}", "deps": deps, "params": params, "outs": outs}


DAG = {
    "fetch": stage("fetch", ["${fetch.model.path}", "${fetch.corpora.train.path}"], ["fetch"], ["data/fetch"]),
    "package": stage("package", ["data/fetch/model"], ["gptq"], ["data/package"]),
    "evaluate": {"matrix": {"model": ["fetch", "package", "baseline_lora"]}}
    | stage(
        "evaluate@${item.model}",
        ["data/fetch/model", "data/package/model"],
        ["evaluate"],
        ["data/evaluate/${item.model}"],
    ),
    "hardware_fit": stage(
        "hardware_fit",
        ["data/package/model", "${fetch.corpora.train.path}"],
        ["hardware_fit"],
        ["data/hardware_fit", "data/overlap"],
    ),
    "measure": stage("measure", ["data/package/model"], ["measure"], ["data/measure"]),
    "report": stage(
        "report",
        ["data/evaluate/package", "data/hardware_fit/fit.json", "data/measure", "data/lineage/measure.json"],
        ["report"],
        ["data/report"],
    ),
}


class NightlyProject:
    """The project's folder, with one commit.

    Args:
        repository: the folder of its git repository, where that is a larger one.

    Attributes:
        path: its root.
    """

    def __init__(self, path: Path, repository: Path | None = None) -> None:
        self.path = path
        for name in ("flows", "tasks"):
            (path / name).symlink_to(ROOT / name)
        (path / "stage.py").write_text(STAGE, encoding="utf-8")
        (path / "dvc.yaml").write_text(yaml.safe_dump({"stages": DAG}, sort_keys=False), encoding="utf-8")
        (path / ".gitignore").write_text(
            "/data/*\n!/data/lineage/\n/data/lineage/here\n/.prefect/\n/logs/\n/home/\n", encoding="utf-8"
        )
        self.weights(0.0)
        for name in ("train", "calibration", "test", "test_ood"):
            (path / f"source/{name}.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
        raw = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        raw["fetch"]["model"]["path"] = "source/model"
        for name, source in raw["fetch"]["corpora"].items():
            source["path"] = f"source/{name}.jsonl"
        (path / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
        self.run("git", "init", "-q", str((repository or path).resolve()))
        self.run("git", "config", "user.name", "t")
        self.run("git", "config", "user.email", "t@example.org")
        Repo.init(str(path), subdir=repository is not None).close()
        self.commit("start")

    def weights(self, nats: float) -> None:
        """New weights in the local source."""
        (self.path / "source/model").mkdir(parents=True, exist_ok=True)
        (self.path / "source/model/weights.json").write_text(json.dumps({"nats": nats}), encoding="utf-8")

    def change(self, values: dict[str, Any]) -> None:
        """Set parameters: {"gptq.bits": 2}."""
        change(self.path / "params.yaml", values)

    def commit(self, message: str) -> None:
        """Commit everything that git does not ignore."""
        self.run("git", "add", "-A")
        self.run("git", "commit", "--allow-empty", "-qm", message)

    def environment(self) -> dict[str, str]:
        """A user's, with an empty home directory."""
        (self.path / "home").mkdir(exist_ok=True)
        soon = {"PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "2"}  # a run that is queued asks again
        return {**clean_environment(), **soon, "HOME": str(self.path / "home")}

    def start(self, *command: str, group: bool = False, env: dict[str, str] | None = None) -> subprocess.Popen:
        """A process of this project's python whose output is read line by line; at will in a group of its own."""
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.path,
            env=self.environment() | (env or {}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=group,
        )

    @contextlib.contextmanager
    def served(self, env: dict[str, str] | None = None) -> Iterator[NightlyProject]:
        """This project with a server of its own; `env` is the server's alone."""
        ui = self.start("-m", "tasks", "ui", "0", env=env)
        try:
            assert ui.stdout.readline() and "Prefect UI" in ui.stdout.readline()
            threading.Thread(target=ui.stdout.read, daemon=True).start()  # a full pipe would stop the server
            yield self
        finally:
            ui.send_signal(signal.SIGTERM)
            ui.wait(30)

    def run(self, *command: str, expect: int = 0, env: dict[str, str] | None = None) -> str:
        """What a command prints; it has to end with this code."""
        done = subprocess.run(
            command,
            cwd=self.path,
            env=self.environment() | (env or {}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        assert done.returncode == expect, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def python(self, *arguments: str, expect: int = 0) -> str:
        """`run` with this project's python."""
        return self.run(sys.executable, *arguments, expect=expect)


def workspace(project: NightlyProject) -> tuple[tuple[str, str], dict[str, str]]:
    """git's state, and the hash of every file but those of server and registry."""
    state = project.run("git", "status", "--porcelain"), project.run("git", "log", "--format=%H", "--branches")
    own = (".git", ".prefect", ".dvc", "home")
    files = [
        path for path in project.path.rglob("*") if path.is_file() and path.parts[len(project.path.parts)] not in own
    ]
    shared = {"registry", "__pycache__", "here"}  # as DVC's cache is
    kept = [path for path in files if not shared & set(path.parts)]
    return state, {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
