"""measure: turns, medians and equal models with a stand-in for the process; the process itself on a small model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks import measure
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import streaming
from tasks.evaluation import measuring_process
from tasks.parameters.schema import Measure
from tests.support.packed_models import REALISTIC
from tests.support.paths import ROOT

PARAMS = Measure(enabled=True, threads=1, prompt_tokens=4, new_tokens=10, generations=2, rounds=3)


def figures(seconds: float, energy: float | None = None, peak: int = 100) -> dict:
    return {
        "import_seconds": 3.0,
        "load_seconds": seconds,
        "first_token_seconds": 0.1,
        "generation_seconds": [seconds, 2 * seconds],
        "together_seconds": 4 * seconds,
        "cpu_seconds_per_token": 0.5,
        "joules_per_token": energy,
        "peak_bytes": 10 * peak,
        "above_libraries_bytes": peak,
    }


@pytest.fixture
def stage(tmp_path: Path, make_stage):
    """Three models, the second one the files of the first."""
    folders = {name: tmp_path / "data" / name / "model" for name in ("fetch", "vocabulary", "package")}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"2" * 100 if name == "package" else b"1" * 100)
        config = {"config": REALISTIC} if name == "package" else REALISTIC
        (folder / ("model.json" if name == "package" else "config.json")).write_text(json.dumps(config))
    inputs = {f"{name}/model": folder for name, folder in folders.items()}
    return make_stage({"measure": PARAMS}, inputs)


def written(stage) -> dict:
    return json.loads((stage.output("measure") / "models.json").read_text(encoding="utf-8"))


@pytest.fixture
def turns(monkeypatch) -> list[str]:
    """The models in the order in which a stand-in for the process measured them, each slower than the one before."""
    order: list[str] = []

    def each(folders, workload):
        for folder in folders:
            order.append(folder.parent.name)
            yield figures(len(order), energy=None if len(order) == 1 else 2.0, peak=len(order))

    monkeypatch.setattr(measuring_process, "measure_each", each)
    return order


def test_models_take_turns_and_equal_ones_share_their_figures(stage, turns) -> None:
    measure.run(stage)
    assert turns == ["fetch", "package"] * 3
    fetch, same, package = (stage.facts["measured"][name] for name in ("fetch", "vocabulary", "package"))
    assert same == fetch  # measured in rounds 1, 3 and 5
    assert fetch["seconds_per_token"] == {"median": pytest.approx(0.4), "least": 0.1, "largest": 1.0}
    assert fetch["tokens_per_second"] == {"1": pytest.approx(2.5), "4": pytest.approx(4 * 10 / 12)}
    assert (fetch["load_seconds"], fetch["above_libraries_bytes"], fetch["joules_per_token"]) == (3, 3, 2.0)
    assert package["load_seconds"] == 4
    asked = {key: getattr(PARAMS, key) for key in type(PARAMS).model_fields if key != "enabled"}
    assert stage.facts["workload"] == written(stage)["workload"] == asked
    assert stage.facts["host"] == measuring_process.machine()


def test_the_output_is_a_function_of_the_inputs(stage, turns) -> None:
    measure.run(stage)
    first, noted = written(stage), dict(stage.facts)
    shutil.rmtree(stage.output("measure"))
    measure.run(stage)  # slower
    assert written(stage) == first and stage.facts["measured"] != noted["measured"]
    contents = {"model.json": json.dumps({"config": REALISTIC}).encode(), "model.safetensors": b"2" * 100}
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items()]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert first["measured"] is True and first["models"]["package"] == {
        **{"bytes": sum(map(len, contents.values())), "files": digest, "same_as": None},
    }
    assert {name: one["same_as"] for name, one in first["models"].items()} == {
        **{"fetch": None, "vocabulary": "fetch", "package": None},
    }


def test_models_too_large_for_float32_are_all_measured_in_bfloat16(stage, turns, monkeypatch) -> None:
    weights = 10 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 384) + 2048 * 128
    asked = []
    original = measuring_process.measure_each
    monkeypatch.setattr(measuring_process, "measure_each", lambda *given: asked.append(given[1]) or original(*given))
    for largest, dtype, settings in (
        (4 * weights, "float32", {}),
        (4 * weights - 1, "bfloat16", {"dtype": "bfloat16"}),
    ):
        monkeypatch.setattr(streaming, "WHOLE", largest)
        measure.run(stage)
        assert written(stage)["engine"] == f"PyTorch, {dtype}" and asked[-1].settings == settings
        shutil.rmtree(stage.output("measure"))


def test_energy_that_the_host_does_not_tell_is_null(stage) -> None:
    assert measure.summary([figures(1.0), figures(2.0)], PARAMS)["joules_per_token"] is None


def test_off_says_that_nothing_was_measured(stage) -> None:
    measure.skip(stage)
    assert written(stage) == {"measured": False, "models": {"fetch": {}, "vocabulary": {}, "package": {}}}
    assert stage.facts == {}


def test_folders_are_the_same_by_their_names_and_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "deep").mkdir(parents=True)
    (one / "deep/a").write_bytes(b"x")
    shutil.copytree(one, other)
    assert measure._digest(one) == measure._digest(other)
    (other / "deep/a").write_bytes(b"y")
    assert measure._digest(one) != measure._digest(other)
    (other / "deep/a").write_bytes(b"x")
    (other / "b").write_bytes(b"")
    assert measure._digest(one) != measure._digest(other)


def test_a_process_of_its_own_measures_a_model(model_folder: Path) -> None:
    found = measuring_process.measure(
        model_folder, measuring_process.Workload(1, prompt_tokens=5, new_tokens=4, generations=2)
    )
    energy = found.pop("joules_per_token")
    assert energy is None or energy >= 0
    assert len(found["generation_seconds"]) == 2 and min(found.pop("generation_seconds")) > 0
    assert found.keys() == {
        *("import_seconds", "load_seconds", "first_token_seconds", "cpu_seconds_per_token", "together_seconds"),
        *("peak_bytes", "above_libraries_bytes"),
    }
    assert all(value > 0 for value in found.values())
    libraries = found["peak_bytes"] - found["above_libraries_bytes"]
    assert libraries == pytest.approx(peak_of_imports(), rel=0.05)


def test_while_one_is_asked_no_other_process_does_anything(tmp_path: Path, monkeypatch) -> None:
    code = (
        "import json, sys, time\n"
        "times = [time.monotonic()]; print('imported', flush=True); sys.stdin.readline()\n"
        "times.append(time.monotonic()); time.sleep(0.2); times.append(time.monotonic()); print(json.dumps(times))"
    )
    (tmp_path / "tasks/evaluation").mkdir(parents=True)
    (tmp_path / "tasks/evaluation/measuring_process.py").write_text(code)
    monkeypatch.setattr(measuring_process, "ROOT", tmp_path)
    for cores in ({0}, {0, 1}):
        monkeypatch.setattr(measuring_process.os, "sched_getaffinity", lambda _, cores=cores: cores)
        found = list(measuring_process.measure_each([tmp_path] * 3, measuring_process.Workload(1, 1, 1, 1)))
        assert all(ended < begun for (_, _, ended), (_, begun, _) in zip(found, found[1:], strict=False))
        # the second one had imported before the first was asked, where there are two cores; the third never
        assert [begun < asked for (begun, _, _), (_, asked, _) in zip(found[1:], found, strict=False)] == [
            len(cores) == 2,
            False,
        ]


def test_a_process_that_is_left_is_ended(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tasks/evaluation").mkdir(parents=True)
    code = (
        "import sys\nif sys.argv[1].endswith('bad'): sys.exit(1)\nprint('imported', flush=True); sys.stdin.readline()"
    )
    (tmp_path / "tasks/evaluation/measuring_process.py").write_text(code)
    monkeypatch.setattr(measuring_process, "ROOT", tmp_path)
    monkeypatch.setattr(measuring_process.os, "sched_getaffinity", lambda _: {0, 1})
    begun: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: begun.append(popen(*a, **k)) or begun[-1])
    with pytest.raises(RuntimeError, match="bad failed"):
        list(measuring_process.measure_each([tmp_path / "bad", tmp_path], measuring_process.Workload(1, 1, 1, 1)))
    assert len(begun) == 2 and [one.returncode for one in begun] == [1, -9]


def peak_of_imports() -> int:
    """Bytes at their most of a process that imports what loads a model in PyTorch, and no more."""
    code = "from tasks.runtime import lean; lean.apply()\n"
    code += "import tasks.evaluation.measuring_process, tasks.runners.any_folder\n"
    code += "from tasks.runtime import processes; print(processes.peak())"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True, check=True
    )
    return int(done.stdout)


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (
            "import sys; print('noise\\nthe model is cut off', file=sys.stderr); sys.exit(2)",
            InputError,
            "^the model is c",
        ),
        ("import os; os.kill(os.getpid(), 9)", InputError, "ended by signal 9"),
        ("raise ValueError('a mistake')", RuntimeError, "a mistake"),
    ],
)
def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch, code: str, error: type, words: str) -> None:
    (tmp_path / "tasks/evaluation").mkdir(parents=True)
    (tmp_path / "tasks/evaluation/measuring_process.py").write_text(code)
    monkeypatch.setattr(measuring_process, "ROOT", tmp_path)
    with pytest.raises(error, match=words):
        measuring_process.measure(tmp_path, measuring_process.Workload(1, 1, 1, 1))


def test_what_the_process_refuses_is_a_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(measuring_process.processes, "die_with_parent", lambda: None)

    def refuse(folder, workload, imported):
        raise InputError("line one\nline two")

    monkeypatch.setattr(measuring_process, "here", refuse)
    workload = '{"threads": 1, "prompt_tokens": 1, "new_tokens": 1, "generations": 1}'
    assert measuring_process.main(str(tmp_path), workload) == measuring_process.REFUSED
    assert capsys.readouterr().err == "line one line two\n"


def test_energy_is_the_sum_of_the_packages(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(measuring_process, "POWER", tmp_path)
    assert measuring_process.joules() is None
    for name, microjoules in (("intel-rapl:0", 1_500_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 700_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{microjoules}\n")
    assert measuring_process.joules() == 2.0  # a part of a package isn't counted twice
