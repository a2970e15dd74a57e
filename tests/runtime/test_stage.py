"""A stage in a toy DVC project: what a stage sees, when its outputs appear, and what a failure leaves behind."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml
from dvc.repo import Repo
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tasks.algorithms.errors import InputError
from tasks.runtime import stage as stages
from tasks.runtime.stage import Progress, Stage, execute
from tests.support.paths import ROOT
from tests.support.project import clean_environment

PROGRESS = re.compile(r"\[progress\] (\S+) (\d+)/(\d+)((?: \w+=\S+)*) eta=(\d+)s")
OUTPUTS = {"data/toy/model/a": "1", "data/toy/model/sub/b": "b", "data/toy/table.csv": "1"}

DVC = {
    "stages": {
        "source": {
            "cmd": f"{sys.executable} run.py source",
            "deps": ["raw.txt"],
            "params": ["source"],
            "outs": ["data/source/text.txt"],
        },
        "toy": {
            "cmd": f"{sys.executable} run.py toy",
            "deps": ["data/source/text.txt", "other/text.txt"],
            "params": ["toy.enabled", "toy.how", "toy.value"],
            "outs": ["data/toy/model", "data/toy/table.csv", "data/lineage/toy.json"],
        },
    }
}
PARAMS = {"source": {"enabled": True}, "toy": {"enabled": True, "how": "good", "value": 1}, "hidden": {"x": 1}}

RUN = f"""
import sys
from types import SimpleNamespace
import yaml
sys.path.insert(0, {str(ROOT)!r})
import tasks
tasks.__path__.append("toy_tasks")
from tasks.algorithms.errors import InputError
from tasks.runtime import stage
text = open("params.yaml").read()
sections = {{name: SimpleNamespace(**values) for name, values in yaml.safe_load(text).items()}}
stage.schema.load = lambda: SimpleNamespace(**sections)
stage.preflight.check_workspace = lambda *_: None
try:
    stage.execute(sys.argv[1])
except InputError as error:
    sys.exit(f"error: {{error}}")
"""
SOURCE = """
def run(stage):
    stage.output("text.txt").write_text("text")
"""
TOY = """
import time
from pathlib import Path

def run(stage):
    p = stage.params.toy
    folder = stage.output("model")
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text(str(p.value))
    (folder / "sub/b").write_text("b")
    if p.how == "raise":
        raise RuntimeError("boom")
    if p.how == "wait":
        Path("started").touch()
        while not Path("go").exists():
            time.sleep(0.05)
    stage.output("table.csv").write_text(str(p.value))
"""


class Toy:
    """The project's folder, which is the working folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def set(self, **values: object) -> None:
        raw = PARAMS | {"toy": PARAMS["toy"] | values}
        (self.path / "params.yaml").write_text(yaml.safe_dump(raw))

    def __call__(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=clean_environment(),
            timeout=120,
        )

    def repro(self) -> subprocess.CompletedProcess:
        return self("-m", "dvc", "repro", "toy")

    def outputs(self) -> dict[str, str]:
        files = (path for path in (self.path / "data/toy").rglob("*") if path.is_file())
        return {path.relative_to(self.path).as_posix(): path.read_text() for path in sorted(files)}

    def left(self) -> list[Path]:
        return [path for path in (self.path / "data/.scratch").iterdir() if path.suffix != ".lock"]


@pytest.fixture(scope="module")
def new_project(tmp_path_factory) -> Path:
    """The project, nothing run yet; to be copied."""
    path = tmp_path_factory.mktemp("new")
    files = {
        "dvc.yaml": yaml.safe_dump(DVC),
        "run.py": RUN,
        "toy_tasks/source.py": SOURCE,
        "toy_tasks/toy.py": TOY,
        "raw.txt": "raw",
        "other/text.txt": "other",
    }
    for name, text in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    repo = Repo.init(str(path), no_scm=True)
    with repo.config.edit("repo") as config:
        config["cache"]["type"] = ["hardlink", "copy"]
        config["core"]["analytics"] = False
    Toy(path).set()
    return path


@pytest.fixture(scope="module")
def made_project(new_project: Path, tmp_path_factory) -> Path:
    """The project after `dvc repro`; to be copied."""
    path = shutil.copytree(new_project, tmp_path_factory.mktemp("made") / "project")
    done = Toy(path).repro()
    assert done.returncode == 0, done.stdout
    assert Toy(path).outputs() == OUTPUTS
    return path


@pytest.fixture
def toy(new_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The project as working folder, nothing run yet."""
    path = shutil.copytree(new_project, tmp_path / "project")
    monkeypatch.chdir(path)
    return Toy(path)


@pytest.fixture
def made(made_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The project as working folder, after `dvc repro`."""
    path = shutil.copytree(made_project, tmp_path / "project")
    monkeypatch.chdir(path)
    return Toy(path)


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch):
    """run_here(run, skip=None): execute stage toy in this process with these functions, after DVC's own removal."""

    def load() -> SimpleNamespace:
        raw = yaml.safe_load(Path("params.yaml").read_text())
        return SimpleNamespace(**{name: SimpleNamespace(**values) for name, values in raw.items()})

    monkeypatch.setattr(stages.schema, "load", load)
    monkeypatch.setattr(stages.preflight, "check_workspace", lambda *_: None)
    monkeypatch.setattr(stages, "_die_with_parent", lambda _: None)

    def go(run, skip=None) -> None:
        monkeypatch.setitem(sys.modules, "tasks.toy", SimpleNamespace(run=run, skip=skip))
        repo = Repo()
        with repo.lock:
            repo.stage.load_one(name="toy").remove_outs(ignore_remove=False, force=False)
        execute("toy")

    return go


def write(stage: Stage, value: str = "2") -> None:
    stage.output("model").mkdir()
    (stage.output("model") / "a").write_text(value)
    stage.output("table.csv").write_text(value)


def raising(error: Exception):
    def run(stage: Stage) -> None:
        write(stage)
        raise error

    return run


def test_inputs_and_outputs_are_those_of_dvc_yaml(toy: Toy, run_here) -> None:
    stage = Stage("toy", Repo())
    assert stage.input("source/text.txt") == Path("data/source/text.txt")
    assert stage.has_input("source/text.txt") and not stage.has_input("text.txt") and not stage.has_input("x")
    assert stage.inputs_below("other") == [Path("other/text.txt")]
    assert stage.output("table.csv") == Path("data/.scratch/toy/data/toy/table.csv")
    assert stage.outs == [Path("data/toy/model"), Path("data/toy/table.csv")]  # the record is not the module's
    listed = re.escape("dvc.yaml declares ['data/source/text.txt', 'other/text.txt']")
    with pytest.raises(LookupError, match=f"`masks` is no dependency of stage toy; {listed}"):
        stage.input("masks")
    with pytest.raises(LookupError, match=f"`text.txt` is an ambiguous dependency of stage toy; {listed}"):
        stage.input("text.txt")
    with pytest.raises(LookupError, match="`plot.csv` is no output of stage toy; dvc.yaml declares"):
        stage.output("plot.csv")


def test_only_declared_parameters_are_there(toy: Toy, run_here) -> None:
    stage = Stage("toy", Repo())
    assert stage.params.toy.value == 1 and stage.everything.hidden.x == 1
    for undeclared in ("hidden", "source"):
        with pytest.raises(AttributeError, match=undeclared):
            getattr(stage.params, undeclared)


def test_outputs_appear_only_when_all_are_written(made: Toy, run_here) -> None:
    def run(stage: Stage) -> None:
        write(stage)
        assert made.outputs() == {}

    run_here(run)
    assert made.outputs() == {"data/toy/model/a": "2", "data/toy/table.csv": "2"}
    assert Path("data/lineage/toy.json").exists() and made.left() == []


def test_what_a_killed_run_left_is_not_taken_for_an_output(made: Toy, run_here) -> None:
    stale = Path("data/.scratch/toy/data/toy/model/stale")
    stale.parent.mkdir(parents=True)
    stale.touch()
    run_here(write)
    assert made.outputs() == {"data/toy/model/a": "2", "data/toy/table.csv": "2"}


def test_a_failing_stage_under_dvc_leaves_everything_as_it_was(made: Toy) -> None:
    lock = Path("dvc.lock").read_bytes()
    record = Path("data/lineage/toy.json").read_bytes()
    made.set(how="raise", value=7)
    failed = made.repro()
    assert failed.returncode != 0
    assert "Traceback" in failed.stdout and "RuntimeError: boom" in failed.stdout  # a mistake of the code, not a user's
    assert Path("dvc.lock").read_bytes() == lock and Path("data/lineage/toy.json").read_bytes() == record
    assert made.outputs() == OUTPUTS and made.left() == []
    made.set()
    assert "up to date" in made("-m", "dvc", "status").stdout
    assert "Running stage" not in made.repro().stdout


def test_a_missing_output_is_an_error(made: Toy, run_here) -> None:
    with pytest.raises(RuntimeError, match="stage toy did not write data/toy/table.csv"):
        run_here(lambda stage: stage.output("model").mkdir())
    assert made.outputs() == OUTPUTS and made.left() == []


def test_a_failure_while_moving_brings_back_what_was_moved(made: Toy, run_here, monkeypatch) -> None:
    replace = os.replace

    def fail_for_the_table(source, target) -> None:
        if Path(target) == Path("data/toy/table.csv"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(stages.os, "replace", fail_for_the_table)
    with pytest.raises(InputError, match="the outputs of stage toy: the disk is full"):
        run_here(write)
    assert made.outputs() == OUTPUTS and made.left() == []


def test_a_failing_record_brings_the_previous_outputs_back(made: Toy, run_here, monkeypatch) -> None:
    def fail(*_, **__) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "data/lineage/toy.json")

    monkeypatch.setattr(stages.lineage, "record", fail)
    with pytest.raises(InputError, match="data/lineage/toy.json: the folder is read-only"):
        run_here(write)
    assert made.outputs() == OUTPUTS


TELLING = {
    "full disk": (OSError(errno.ENOSPC, "x"), "cannot read or write the outputs of stage toy: the disk is full; free"),
    "the file that is meant": (PermissionError(errno.EACCES, "x", "a", None, "b"), "cannot read or write b: permiss"),
    "safetensors": (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    "tokenizers": (Exception("Read-only file system (os error 30)"), "the folder is read-only"),
    "copytree": (OSError([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]), "the disk is full"),
    "memory": (MemoryError(), "stage toy ran out of memory; end other programs, lower its batch"),
    "the linker's memory": (ImportError("libtorch.so: cannot allocate memory"), "stage toy ran out of memory"),
    "the graphics card's memory": (RuntimeError("CUDA out of memory. Tried to"), "stage toy ran out of memory"),
    "no memory for a thread": (RuntimeError("can't start new thread"), "stage toy ran out of memory"),
    "a user's value": (InputError("wanda.keep = 9 is wrong"), "wanda.keep = 9 is wrong"),
}


@pytest.mark.parametrize("name", TELLING)
def test_what_a_user_can_mend_is_one_sentence(made: Toy, run_here, name: str) -> None:
    error, words = TELLING[name]
    with pytest.raises(InputError) as caught:
        run_here(raising(error))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert made.outputs() == OUTPUTS and made.left() == []


@pytest.mark.parametrize("library", [lambda: torch.empty(2**50), lambda: numpy.empty(2**55)])
def test_libraries_that_get_no_memory(made: Toy, run_here, library) -> None:
    with pytest.raises(InputError, match="ran out of memory"):
        run_here(lambda _: library())


def test_safetensors_that_cannot_write(made: Toy, run_here) -> None:
    def run(stage: Stage) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            save_file({"a": numpy.zeros(2**16)}, stage.output("table.csv"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(InputError, match="largest file size"):
        run_here(run)


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("a"), FileNotFoundError(errno.ENOENT, "x", "y")])
def test_a_mistake_of_the_code_stays_what_it_is(made: Toy, run_here, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_here(raising(error))
    assert caught.value is error
    assert made.outputs() == OUTPUTS


def test_an_input_altered_by_hand_is_named(made: Toy, run_here) -> None:
    text = Path("data/source/text.txt")
    text.unlink()  # it may be a link into DVC's cache
    text.write_text("{")
    with pytest.raises(InputError) as caught:
        run_here(write)
    assert str(caught.value) == f"data/source/text.txt {stages.ALTERED}"
    assert made.outputs() == OUTPUTS


def test_an_input_that_changes_while_the_stage_runs_is_named(made: Toy, run_here) -> None:
    def run(_: Stage) -> None:
        text = Path("data/source/text.txt")
        text.unlink()
        text.write_text("{")
        raise ValueError("no JSON")

    with pytest.raises(InputError, match=r"data/source/text.txt is not what its stage wrote.*\(ValueError: no JSON\)"):
        run_here(run)


def test_a_bit_that_flips_in_an_input_and_in_the_cache_at_once_is_found(made: Toy, run_here) -> None:
    """Both are one file, and DVC sees neither: size and time are the same."""
    made("-m", "dvc", "checkout", "--relink", "-q")
    text = Path("data/source/text.txt")
    before = text.stat()
    text.chmod(0o644)
    text.write_text("tezt")
    text.chmod(before.st_mode)
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert before.st_nlink == 2 and "up to date" in made("-m", "dvc", "status").stdout
    with pytest.raises(InputError, match="data/source/text.txt is not what its stage wrote"):
        run_here(write)


def test_on_a_full_disk_the_previous_outputs_come_back_as_links(made: Toy, run_here, monkeypatch) -> None:
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dvc.output.Output.checkout", full)
    with pytest.raises(InputError, match="the disk is full"):
        run_here(lambda _: full())
    assert made.outputs() == OUTPUTS
    assert Path("data/toy/model/sub/b").stat().st_nlink > 1
    monkeypatch.undo()
    os.chdir(made.path)
    assert "up to date" in made("-m", "dvc", "status").stdout


def test_what_cannot_be_brought_back_is_said(made: Toy, run_here, monkeypatch, capsys) -> None:
    def lost(*_, **__) -> None:
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr("dvc.output.Output.checkout", lost)
    monkeypatch.setattr(stages, "_link_back", lost)
    with pytest.raises(InputError):
        run_here(raising(InputError("x")))
    said = capsys.readouterr().err
    assert "`dvc checkout data/toy/table.csv` will bring the previous one back, now: " in said


def test_without_memory_even_to_look_the_way_back_is_said(made: Toy, run_here, monkeypatch, capsys) -> None:
    def run(stage: Stage) -> None:
        monkeypatch.setattr(stages, "Repo", lambda: numpy.empty(2**55))
        raise MemoryError

    with pytest.raises(InputError, match="stage toy ran out of memory"):
        run_here(run)
    assert "toy: `dvc checkout` brings the previous outputs back from DVC's cache" in capsys.readouterr().err


def test_an_unknown_stage_is_a_sentence(toy: Toy, run_here) -> None:
    with pytest.raises(InputError, match="'nothing'"):
        execute("nothing")


def test_a_stage_that_is_off_passes_links_on(made: Toy, run_here) -> None:
    made.set(enabled=False)
    source = Path("other/text.txt")

    def skip(stage: Stage) -> None:
        stage.pass_on(Path("other"), stage.output("model"))
        stage.pass_on(source, stage.output("table.csv"))

    run_here(None, skip)
    assert os.path.samefile("data/toy/model/text.txt", source) and os.path.samefile("data/toy/table.csv", source)


def test_without_hard_links_the_bytes_are_copied(toy: Toy, run_here, monkeypatch) -> None:
    def refuse(*_) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(stages.os, "link", refuse)
    stage = Stage("toy", Repo())
    stage.pass_on(Path("other"), stage.output("model"))
    copy = stage.output("model") / "text.txt"
    assert copy.read_text() == "other" and not os.path.samefile(copy, "other/text.txt")


def started(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path / "started").exists():
        assert time.monotonic() < deadline, "the stage did not start"
        time.sleep(0.05)


def test_two_runs_of_one_stage_at_once(toy: Toy) -> None:
    toy.set(how="wait")
    first = subprocess.Popen([sys.executable, "run.py", "toy"], cwd=toy.path, env=clean_environment())
    try:
        started(toy.path)
        second = toy("run.py", "toy")
        assert second.returncode == 1
        held = rf"error: stage toy is already running in this folder: process {first.pid} \(.*run.py toy\), since "
        assert re.fullmatch(rf"{held}20\d\d-\d\d-\d\d \d\d:\d\d:\d\d; wait for it or end it\n", second.stdout)
        (toy.path / "go").touch()
        assert first.wait(60) == 0
    finally:
        first.kill()
        first.wait()
    assert toy.outputs() == OUTPUTS


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_stage_ends_with_the_process_that_started_it(toy: Toy) -> None:
    toy.set(how="wait")
    parent = textwrap.dedent("""
        import os, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "run.py", "toy"], stdout=subprocess.DEVNULL)
        while not os.path.exists("started"):
            time.sleep(0.05)
        print(child.pid, flush=True)
        os._exit(0)
    """)
    child = int(toy("-c", parent).stdout)
    deadline = time.monotonic() + 20
    while alive(child):
        assert time.monotonic() < deadline, "the stage outlived its parent"
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_progress_lines_can_be_read_and_are_few(monkeypatch, capsys) -> None:
    now = [100.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    with Progress("lora", 100) as bar:
        for step in range(1, 101):
            now[0] += 0.1
            bar.update(step, loss=1 / step)
    said = capsys.readouterr().err.splitlines()
    found = [PROGRESS.fullmatch(line) for line in said]
    assert all(found)
    steps = [int(match[2]) for match in found]
    assert steps[0] == 1 and steps[-1] == 100 and len(steps) <= 10 / 2 + 2
    assert {match[1] for match in found} == {"lora"} and {match[3] for match in found} == {"100"}
    assert found[-1][4] == " loss=0.01" and found[-1][5] == "0"
    assert [int(match[5]) for match in found] == pytest.approx([(100 - step) / 10 for step in steps], abs=1)


def test_progress_on_a_terminal_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("gptq", 2) as bar:
        bar.update(1)
        bar.update(2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.count("\r") >= 1 and "gptq 2/2" in said


def test_what_an_interrupted_stage_noted_is_there_again_until_inputs_parameters_or_outputs_change(
    made, run_here, monkeypatch, capsys
):
    monkeypatch.setenv("EDGEPRESS_JOURNAL_SECONDS", "0")
    seen = []

    def run(stage: Stage) -> None:
        found = stage.journal.load("key")
        seen.append(found and found.values)
        stage.journal.save("key", {}, len(seen))
        if len(seen) < 5:
            raise RuntimeError("boom")
        write(stage)

    def attempt() -> None:
        with pytest.raises(RuntimeError, match="boom"):
            run_here(run)

    attempt()
    attempt()
    assert "goes on with what an interrupted run has left" in capsys.readouterr().out
    made.set(value=9)  # another parameter
    attempt()
    assert "the journal of other inputs, parameters or code is discarded" in capsys.readouterr().err
    path = Path("other/text.txt")
    path.unlink()
    path.write_text("another input")
    attempt()
    journals = Path("data/.scratch/journal/toy")
    assert len(list(journals.iterdir())) == 1
    run_here(run)
    assert seen == [None, 1, None, None, 4]
    assert not journals.exists()


def test_answers_outlive_the_stage_and_its_parameters_but_no_other_input(made, run_here, capsys) -> None:
    seen = []

    def run(stage: Stage) -> None:
        found = stage.answers.load("request")
        seen.append(found and found.values)
        stage.answers.save("request", {}, len(seen))  # not due: written when the stage is done
        write(stage)

    run_here(run)
    made.set(value=9)  # another parameter
    run_here(run)
    assert "toy: goes on with the answers that earlier runs have left" in capsys.readouterr().out
    path = Path("other/text.txt")
    path.unlink()
    path.write_text("another model")
    run_here(run)
    assert seen == [None, 1, None]
    assert len(list(Path("data/.scratch/answers/toy").iterdir())) == 1
