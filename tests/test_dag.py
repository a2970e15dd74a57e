"""dvc.yaml is the one DAG: its stages, params.yaml's sections, the modules and the declared code agree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from tasks.params import OPERATIONS, Params

ROOT = Path(__file__).resolve().parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


ALLOWED = {"masked_gptq": {"pathlib"}}  # gptqmodel writes ./logs: it is given a temporary working folder


def imported(path: Path) -> set[Path]:
    """Project files that a module imports when it runs; imports for type checkers alone don't count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("tasks")}
    return {file for file in files if file.exists()}


def closure(path: Path) -> set[str]:
    """The module and all project modules that it needs, and the templates beside it, relative to the root."""
    found, open_ = set(), [path]
    while open_:
        current = open_.pop()
        if current not in found:
            found.add(current)
            open_.extend(imported(current))
    templates = {template for file in found for template in file.parent.glob(f"{file.stem}.*.jinja")}
    return {str(file.relative_to(ROOT)) for file in found | templates}


def test_there_are_stages() -> None:
    assert len(STAGES) >= 14


def test_stages_are_the_sections_of_the_parameters_and_the_modules() -> None:
    sections = list(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    assert sorted([*STAGES, *OPERATIONS]) == sorted(sections) == sorted(Params.model_fields)
    for name in STAGES:
        assert (ROOT / "tasks" / f"{name}.py").exists()


@pytest.mark.parametrize("name", STAGES)
def test_declared_code_is_the_import_closure(name: str) -> None:
    declared = {dep for dep in STAGES[name]["deps"] if dep.startswith("tasks/")}
    assert declared == closure(ROOT / "tasks" / f"{name}.py")


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_imports_no_other_stage(name: str) -> None:
    others = {f"tasks/{other}.py" for other in STAGES if other != name}
    assert not closure(ROOT / "tasks" / f"{name}.py") & others


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_writes_below_its_own_name_and_leaves_a_record(name: str) -> None:
    outs = [
        next(iter(out)) if isinstance(out, dict) else out
        for key in ("outs", "metrics")
        for out in STAGES[name].get(key, [])
    ]
    records = [out for out in outs if out.startswith("data/lineage/")]
    assert len(records) == 1 and Path(records[0]).name.split("@")[0].removesuffix(".json") == name
    assert all(Path(out).parts[:2] == ("data", name) for out in outs if out not in records)
    assert not any(dep.startswith("data/lineage") for dep in STAGES[name]["deps"])


def test_only_flows_imports_prefect() -> None:
    for path in (ROOT / "tasks").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not any(module.split(".")[0] in ("prefect", "flows") for module in modules), path


def test_algorithms_know_no_path_no_yaml_no_dvc() -> None:
    banned = {"pathlib", "yaml", "dvc", "prefect", "json"}
    files = sorted((ROOT / "tasks" / "algorithms").glob("*.py"))
    assert files
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        modules |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not modules & banned - ALLOWED.get(path.stem, set()), path
