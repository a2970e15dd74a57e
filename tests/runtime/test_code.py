"""The code that stages need: its lists against those of Python's own finder, what an edit reruns, what it refuses."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from modulefinder import ModuleFinder
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from tasks import code as stage_code
from tasks.algorithms.errors import InputError
from tasks.runtime import code
from tests.support.paths import ROOT
from tests.support.project import clean_environment, ran
from tests.support.toy_stages import Toy, write

STAGES = sorted(path.stem for path in (ROOT / "tasks").glob("*.py") if path.stem not in ("__init__", "__main__"))


class Finder(ModuleFinder):
    """Finds the project's modules in byte code, from which the compiler has dropped what is for type checkers."""

    def import_module(self, partname, fqname, parent):
        return super().import_module(partname, fqname, parent) if fqname.partition(".")[0] == "tasks" else None

    def load_module(self, fqname, fp, pathname, file_info):
        if fp is not None:
            fp = io.BytesIO(fp.read().replace(b"if TYPE_CHECKING:", b"if False:"))
        return super().load_module(fqname, fp, pathname, file_info)


def found_by_python(name: str) -> set[str]:
    finder = Finder([str(ROOT)])
    finder.import_hook(f"tasks.{name}")
    files = {Path(module.__file__) for module in finder.modules.values()}
    return {path.relative_to(ROOT).as_posix() for path in files if path.name != "__init__.py"}


@pytest.mark.parametrize("name", STAGES)
def test_a_list_has_what_python_finds(name: str) -> None:
    room = [str(path) for path in code.WHOLE]
    listed = {path for path in code.listing(name, ROOT) if not path.startswith(tuple(room))}
    assert listed == {path for path in found_by_python(name) if not path.startswith(tuple(room))}
    assert f"tasks/{name}.py" in listed


def test_of_the_report_s_room_every_file_counts() -> None:
    listed = {path for path in code.listing("report", ROOT) if path.startswith("tasks/reporting/")}
    tracked = subprocess.run(
        ["git", "ls-files", "tasks/reporting"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {path for path in found_by_python("report") if path.startswith("tasks/reporting/")} < listed
    assert listed == {path for path in tracked.stdout.split() if not path.endswith("README.md")}


def test_the_stage_writes_a_list_of_every_other_one(make_stage, tmp_path: Path) -> None:
    texts = {
        "tasks/__init__.py": "",
        "tasks/code.py": "from tasks.room import used\n",
        "tasks/one.py": "def run(stage):\n    from tasks.room import used, unknown\n",
        "tasks/two.py": "if TYPE_CHECKING:\n    import tasks.room.used\nelse:\n    import tasks.room.other\n",
        "tasks/room/used.py": "try:\n    import tasks.room.other\nexcept ImportError:\n    pass\n",
        "tasks/room/other.py": "import json\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    stage = make_stage({}, {"tasks": tmp_path / "tasks"})
    stage_code.run(stage)
    lists = {path.name: json.loads(path.read_text()) for path in stage.output("code").iterdir()}
    needed = {"one": ["one.py", "room/other.py", "room/used.py"], "two": ["room/other.py", "two.py"]}
    assert lists == {
        f"{name}.json": {f"tasks/{file}": hashlib.md5(texts[f"tasks/{file}"].encode()).hexdigest() for file in files}
        for name, files in needed.items()
    }


def test_it_runs_without_torch_and_tables() -> None:
    call = "import sys, flows.stage, tasks.code; print({'torch', 'pandas', 'transformers', 'prefect'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def repro(path: Path) -> set[str]:
    command = [sys.executable, "-m", "dvc", "repro", "score@train"]
    done = subprocess.run(command, cwd=path, env=clean_environment() | {"PYTHONPATH": str(ROOT)}, **CAPTURED)
    assert done.returncode == 0, done.stdout
    return ran(done.stdout)


CAPTURED = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
EDITS = {
    "tasks/parts/answer.py": {"code", "corpus"},  # the corpus comes out the same: train and score stay
    "tasks/train.py": {"code", "train"},
    "tasks/parts/unused.py": {"code"},
}


@pytest.mark.parametrize("path", EDITS)
def test_an_edit_reruns_the_stages_that_use_it_and_no_other(repository: Path, path: str) -> None:
    assert repro(repository) == set()
    (repository / path).write_text("answer = 7\n")
    assert repro(repository) == EDITS[path]
    assert repro(repository) == set()


def test_a_new_import_needs_no_entry_anywhere(repository: Path) -> None:
    (repository / "tasks/parts/more.py").write_text("")
    (repository / "tasks/train.py").write_text("import tasks.parts.more\n")
    assert repro(repository) == {"code", "train"}
    (repository / "tasks/parts/more.py").write_text("more = 1\n")
    assert repro(repository) == {"code", "train"}


@pytest.fixture
def coded(made: Toy) -> Toy:
    """The toy project, whose stage `toy` depends on a list of its code."""
    dag = yaml.safe_load((made.path / "dvc.yaml").read_text())
    dag["stages"]["toy"]["deps"].append("data/code/toy.json")
    (made.path / "dvc.yaml").write_text(yaml.safe_dump(dag))
    (made.path / "tasks/parts").mkdir(parents=True)
    (made.path / "tasks/toy.py").write_text("from tasks.parts import helper\n")
    (made.path / "tasks/parts/helper.py").write_text("")
    code.FOLDER.mkdir(parents=True)
    (code.FOLDER / "toy.json").write_text(json.dumps(code.listing("toy", made.path)))
    return made


def test_code_that_was_edited_since_it_was_listed_is_refused(coded: Toy, run_here) -> None:
    run_here(write)
    before = coded.outputs()
    Path("tasks/parts/helper.py").write_text("helped = True\n")
    changed = "tasks/parts/helper.py changed since stage code listed the code; `dvc repro` lists it anew"
    with pytest.raises(InputError, match=changed):
        run_here(write)
    Path("tasks/toy.py").write_text("")
    assert code.changed_code(Repo().stage.load_one(name="toy")) == ["tasks/parts/helper.py", "tasks/toy.py"]
    (code.FOLDER / "toy.json").write_text(json.dumps(code.listing("toy", coded.path)))
    run_here(write)
    assert coded.outputs() == before


def test_a_list_that_is_gone_or_damaged_names_all_code(coded: Toy) -> None:
    stage = Repo().stage.load_one(name="toy")
    for spoil in (lambda: (code.FOLDER / "toy.json").write_text("["), (code.FOLDER / "toy.json").unlink):
        spoil()
        assert code.changed_code(stage) == ["tasks/parts/helper.py", "tasks/toy.py"]


def test_what_is_no_python_is_a_sentence(coded: Toy) -> None:
    Path("tasks/toy.py").write_text("\nimport tasks.\n")
    with pytest.raises(InputError, match=r"tasks/toy.py, line 2 is no Python \(invalid syntax\); correct it"):
        code.listing("toy", coded.path)
    with pytest.raises(InputError, match="tasks/toy.py, line 2"):
        code.changed_code(Repo().stage.load_one(name="toy"))


def test_many_files_are_counted() -> None:
    assert code.named(["a", "b"]) == "a, b"
    assert code.named(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more files"
