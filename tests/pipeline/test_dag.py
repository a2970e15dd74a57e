"""dvc.yaml is the one DAG: its stages, params.yaml's sections, and the modules agree."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest
import yaml

from tasks.parameters.schema import OPERATIONS, SHARED, Params
from tasks.runtime import code
from tests.support.paths import ROOT

DAG = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES = DAG["stages"]
WITH_CODE = [name for name in STAGES if name != code.STAGE]
"""The stages that depend on a list of their code: all but the one that writes the lists."""
CODE = {name: set(code.listing(name, ROOT)) for name in WITH_CODE}

ALLOWED = {"gptqmodel_library": {"pathlib"}}  # gptqmodel asks for the path of its log file: it gets os.devnull


def test_there_are_stages() -> None:
    assert len(STAGES) >= 14


def test_stages_are_the_sections_of_the_parameters_in_the_same_order() -> None:
    sections = list(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    assert [*SHARED, *WITH_CODE, *OPERATIONS] == sections == list(Params.model_fields)  # preflight goes by the order


@pytest.mark.parametrize("name", WITH_CODE)
def test_a_stage_depends_on_its_own_section(name: str) -> None:
    assert any(entry.partition(".")[0] == name for entry in STAGES[name]["params"])


@pytest.mark.parametrize("name", WITH_CODE)
def test_a_stage_depends_on_the_list_of_its_code_alone(name: str) -> None:
    deps = [dep for dep in STAGES[name]["deps"] if dep.startswith(("tasks", "data/code"))]
    assert deps == [f"data/code/{name}.json"]


def test_the_first_stage_looks_at_all_code_and_nothing_else() -> None:
    assert next(iter(STAGES)) == code.STAGE
    assert STAGES[code.STAGE].keys() == {"cmd", "deps", "outs"} and STAGES[code.STAGE]["deps"] == ["tasks"]
    assert not any("tasks/code.py" in files or "tasks/runtime/code.py" in files for files in CODE.values())


@pytest.mark.parametrize("name", WITH_CODE)
def test_a_stage_imports_no_other_stage(name: str) -> None:
    others = {f"tasks/{other}.py" for other in STAGES if other != name}
    assert not CODE[name] & others


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_writes_one_folder_of_its_name(name: str) -> None:
    (out,) = STAGES[name]["outs"]
    folder = Path(next(iter(out)) if isinstance(out, dict) else out)
    items = "-".join(f"${{item.{key}}}" for key in STAGES[name].get("matrix", {}))
    assert folder == Path("data", name, items) and not {"metrics", "plots"} & STAGES[name].keys()


def test_the_report_alone_reads_a_lineage_record() -> None:
    """It holds the speeds, which are no stage's output."""
    found = {(name, dep) for name in STAGES for dep in STAGES[name]["deps"] if dep.startswith("data/lineage")}
    assert found == {("report", "data/lineage/measure.json")}


def test_every_evaluation_is_among_the_metrics() -> None:
    evaluated = {f"data/evaluate/{model}/metrics.json" for model in STAGES["evaluate"]["matrix"]["model"]}
    assert set(DAG["metrics"]) == {"data/report/metrics.json"} | evaluated


def imports(path: Path) -> set[str]:
    """Full names of the modules or packages that a module imports from, those for type checkers included."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_only_flows_imports_prefect() -> None:
    files = sorted((ROOT / "tasks").rglob("*.py"))
    assert len(files) > 100
    for path in files:
        assert not any(name.split(".")[0] in ("prefect", "flows") for name in imports(path)), path


def test_algorithms_know_no_path_no_yaml_no_dvc() -> None:
    banned = {"pathlib", "yaml", "dvc", "prefect", "json"}
    files = sorted((ROOT / "tasks" / "algorithms").rglob("*.py"))
    assert len(files) > 30
    for path in files:
        modules = {name.split(".")[0] for name in imports(path)}
        assert not modules & banned - ALLOWED.get(path.stem, set()), path


def rooms() -> list[str]:
    """The folders of tasks/ that hold modules, those of the algorithms too: "runtime", "algorithms.model"."""
    folders = {path.parent.relative_to(ROOT / "tasks") for path in (ROOT / "tasks").rglob("*.py")}
    return sorted(".".join(folder.parts) for folder in folders if folder.parts)


def test_a_file_in_tasks_is_a_stage_and_a_folder_is_a_room() -> None:
    files = {path.stem for path in (ROOT / "tasks").glob("*.py") if not path.stem.startswith("__")}
    assert files == set(STAGES)
    assert not set(rooms()) & set(STAGES)


@pytest.mark.parametrize("room", rooms())
def test_a_room_opens_with_what_belongs_there(room: str) -> None:
    tree = ast.parse((ROOT / "tasks" / room.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    assert len(tree.body) == 1 and len(ast.get_docstring(tree) or "") > 60  # words, and nothing that runs


def test_the_rooms_imports_have_no_circle() -> None:
    known, after = set(rooms()), {}
    for path in (ROOT / "tasks").rglob("*.py"):
        room = ".".join(path.parent.relative_to(ROOT / "tasks").parts)
        for name in imports(path) if room else ():
            _, *parts = name.split(".")
            other = next((r for r in (".".join(parts[:2]), ".".join(parts[:1])) if r in known), None)
            if name.startswith("tasks.") and other and other != room:
                after.setdefault(room, set()).add(other)
    assert len(after) > 10
    tuple(graphlib.TopologicalSorter(after).static_order())  # raises CycleError, which names it


def test_no_room_imports_a_stage() -> None:
    files = sorted((ROOT / "tasks").glob("*/**/*.py"))
    assert len(files) > 80
    for path in files:
        assert "tasks" not in imports(path), f"{path} imports a stage"


def asks_for_the_device(path: Path) -> bool:
    return ".params.device" in path.read_text(encoding="utf-8")


def test_the_device_is_a_parameter_of_every_stage_that_asks_for_it() -> None:
    shared = {
        f"tasks/compression/{p.name}" for p in (ROOT / "tasks/compression").glob("*.py") if asks_for_the_device(p)
    }
    asking = {
        name for name in STAGES if asks_for_the_device(ROOT / f"tasks/{name}.py") or shared & CODE.get(name, set())
    }
    assert len(asking) >= 10
    assert {name for name, stage in STAGES.items() if "device" in stage.get("params", [])} == asking


REACH = {
    "tasks/packed/writer.py": {"package", "baseline"},
    "tasks/packed/source_folder.py": {"qad", "package", "baseline", "evaluate", "measure", "kv_cache", "harness"},
    "tasks/algorithms/quantisation/masked_gptq.py": {"gptq", "baseline"},
    "tasks/algorithms/quantisation/gptq_walk.py": {"gptq", "baseline"},
    "tasks/algorithms/quantisation/sparsegpt.py": {"gptq", "baseline"},
    "tasks/algorithms/quantisation/descent.py": {"gptq", "baseline"},
    "tasks/algorithms/quantisation/sensitivity.py": {"gptq", "sensitivity", "baseline"},
    "tasks/algorithms/quantisation/eora_ranks.py": {"eora"},
    "tasks/algorithms/pruning/wanda.py": {"wanda"},
    "tasks/algorithms/recovery/masked_lora.py": {"lora", "baseline_lora"},
    "tasks/algorithms/recovery/qad.py": {"qad", "baseline"},
    "tasks/parameters/preflight.py": {"fetch"},
    "tasks/reporting/page.html.jinja": {"report"},
    "tasks/device_profiles/profiles.py": {"hardware_fit"},
    "tasks/evaluation/lm_eval_model.py": {"harness"},
}
"""Code -> the stages that an edit of it runs again; what follows them runs only where their output changed."""


@pytest.mark.parametrize("path", REACH)
def test_an_edit_reruns_what_uses_it_and_nothing_else(path: str) -> None:
    assert (ROOT / path).exists()
    assert {name for name, files in CODE.items() if path in files} == REACH[path]


@pytest.mark.parametrize("room", ["runtime", "cli", "registry", "nightly", "export"])
def test_no_stage_reruns_for_what_only_runs_or_shows_it(room: str) -> None:
    paths = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tasks" / room).glob("*.py")}
    used = paths & set().union(*CODE.values())
    assert used <= {f"tasks/runtime/{name}.py" for name in ("files", "lean", "processes")}
