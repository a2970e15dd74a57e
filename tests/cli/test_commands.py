"""The one command: its table, --help without what it doesn't need, wrong calls, errors, exit codes, clean streams."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from tasks.algorithms.device_fit import verdict
from tasks.algorithms.errors import InputError
from tasks.algorithms.statistics import gate
from tasks.cli import commands, dispatch, exit_codes, export, fit, size
from tasks.cli.commands import COMMANDS
from tasks.packed import plan
from tasks.runtime import refusals
from tests.support.command import edgepress
from tests.support.paths import ROOT

WRONG = {
    "run": ["--frobnicate"],
    "stage": [],
    "status": ["--all"],
    "report": ["extra"],
    "mend": ["now"],
    "fit": ["--device", "siracusa"],
    "size": [],
    "profile": ["--threads", "many"],
    "export": ["--format", "flat"],
    "compare": ["v0.0.1"],
    "gate": ["HEAD", "HEAD~1"],
    "attribution": ["extra"],
    "lineage": ["tell", "data"],
    "verify": ["HEAD", "HEAD~1"],
    "registry": [],
    "canary": ["begin"],
    "update": ["make", "v0.0.1"],
    "night": ["listen"],
    "ui": ["port"],
    "retention": ["now"],
    "notify": [],
    "deps": ["now"],
}


OWN = "a file or its own output"


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_overview_names_every_command_and_ends_with_the_exit_codes(capsys) -> None:
    code, out, errors = edgepress(capsys, "--help")
    assert (code, errors) == (0, "")
    for command in COMMANDS.values():
        assert f"\n  {command.name:<13}{command.help}\n" in out
    table = (exit_codes.__doc__ or "").partition("\n\n")[2]
    assert len(table.splitlines()) >= 10 and out.rstrip().endswith(table.rstrip())
    assert max(map(len, out.splitlines())) <= 120


def test_the_overview_imports_nothing_heavy_and_is_the_same_by_python_m() -> None:
    script = "import sys; from tasks.__main__ import main; code = main(['--help'])\n"
    script += "print(sorted({'torch', 'prefect', 'dvc', 'numpy', 'rich'} & set(sys.modules)), code)"
    out = python("-c", script).stdout
    assert out.splitlines()[-1] == "[] 0"
    assert python("-m", "tasks", "--help").stdout.splitlines() == out.splitlines()[:-1]


def test_help_of_no_command_imports_torch_or_prefect() -> None:
    names = list(COMMANDS)
    script = f"import sys; from tasks.cli.dispatch import main\nfor name in {names}:\n assert main([name, '-h']) == 0\n"
    script += "print(sorted({'torch', 'prefect', 'transformers'} & set(sys.modules)))"
    done = python("-c", script)
    assert done.stdout.splitlines()[-1] == "[]" and done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_a_command_does_and_takes(capsys, name: str) -> None:
    code, out, errors = edgepress(capsys, name, "--help")
    assert (code, errors) == (0, "") and out.startswith(f"usage: edgepress {name}") and "options:" in out
    assert len(out.splitlines()) > 5  # the module's docstring is in it


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_call_is_the_usage_and_a_sentence(capsys, name: str) -> None:
    code, out, errors = edgepress(capsys, name, *WRONG[name])
    assert code == COMMANDS[name].wrong_call and out == ""
    assert errors.startswith(f"usage: edgepress {name}") and errors.count("error: ") == 1
    assert errors.splitlines()[-1].startswith("error: ") and "Traceback" not in errors


def test_a_command_that_is_none_is_told_with_one_that_is(capsys) -> None:
    assert edgepress(capsys, "fitt") == (
        2,
        "",
        "usage: edgepress COMMAND …\nerror: there is no command fitt; did you mean fit?\n",
    )
    code, out, errors = edgepress(capsys)
    assert (code, out) == (2, "") and "edgepress --help" in errors


def raising(error: BaseException):
    """A command's module whose command raises."""

    def main(_):
        raise error

    return SimpleNamespace(__doc__="x", arguments=lambda parser: None, main=main)


@pytest.mark.parametrize(
    ("error", "name", "code", "said"),
    [
        (InputError("no such file\nno such folder"), "report", 1, "error: no such file\nerror: no such folder\n"),
        (InputError("no"), "fit", 3, "error: no\n"),
        (InputError("no"), "lineage", 2, "error: no\n"),
        (
            OSError(2, "No such file or directory", "a"),
            "report",
            1,
            "error: [Errno 2] No such file or directory: 'a'\n",
        ),
        (PermissionError(13, "x", "a"), "mend", 1, f"error: cannot read or write a: {refusals.DISK[13]}\n"),
        (SafetensorError("(os error 28)"), "export", 1, f"error: cannot read or write {OWN}: {refusals.DISK[28]}\n"),
        (KeyboardInterrupt(), "report", 130, ""),
        (KeyboardInterrupt("interrupted; go on"), "run", 130, "error: interrupted; go on\n"),
    ],
)
def test_an_error_is_printed_once_and_has_its_code(capsys, monkeypatch, error, name, code, said) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda _: raising(error))
    assert edgepress(capsys, name) == (code, "", said)


@pytest.mark.parametrize(("error", "name"), [(ZeroDivisionError(), "report"), (OSError(5, "x"), "stage")])
def test_a_mistake_keeps_its_traceback(monkeypatch, error, name) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda _: raising(error))
    with pytest.raises(type(error)):
        dispatch.main([name])


def test_what_dvc_refuses_is_a_sentence(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("report", "attribution", "gate"):
        code, out, errors = edgepress(capsys, name)
        assert (code, out) == (1, "") and errors.startswith("error: ") and errors.count("\n") == 1


def test_a_reader_that_has_gone_ends_it_quietly() -> None:
    script = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1); from tasks.cli.dispatch import main; "
    done = python("-c", script + "raise SystemExit(main(['--help']))")
    assert (done.returncode, done.stderr) == (exit_codes.READER_GONE, "")


def test_the_table_of_codes_knows_every_verdict() -> None:
    assert set(exit_codes.FIT) == {verdict.FITS, verdict.STREAMS, verdict.FAILS}
    assert set(exit_codes.VERDICTS) == set(gate.VERDICTS)
    text = exit_codes.__doc__ or ""
    for codes in (exit_codes.FIT, exit_codes.VERDICTS):
        assert ", ".join(f"{code} {name}" for name, code in codes.items()) in text
    others = [name for name, command in COMMANDS.items() if (command.refused, command.wrong_call) != (1, 2)]
    assert others == ["fit", "lineage", "verify"] and all(f"\n  {name} " in text for name in others)
    assert [name for name, command in COMMANDS.items() if command.told] == ["stage"]


def test_choices_that_are_written_twice_are_the_same() -> None:
    from tasks.device_profiles import contents
    from tasks.export import export as room

    assert fit.MATRIX_BITS == size.MATRIX_BITS == plan.MATRIX_BITS and set(fit.DTYPES) == set(contents.DTYPES)
    assert tuple(room.FORMATS) == export.FORMATS


def test_every_command_is_in_a_group_and_its_module_is_there() -> None:
    assert {command.group for command in COMMANDS.values()} == set(commands.GROUPS)
    for command in COMMANDS.values():
        assert (ROOT / f"{command.module.replace('.', '/')}.py").is_file(), command.module


def test_streams_of_a_good_run_are_the_answer_and_nothing() -> None:
    done = python("-m", "tasks", "fit", "--model", "data/base_model/model", "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert len(json.loads(done.stdout)["devices"]) > 5


def test_libraries_say_nothing_of_their_own_affairs() -> None:
    code = "from tasks.cli import quiet; quiet.apply(bars=False)\n"
    code += "import tasks.algorithms.quantisation.masked_gptq, tasks.evaluation.lm_eval_model, peft, datasets\n"
    code += "import transformers; transformers.AutoModelForCausalLM.from_pretrained('data/base_model/model')"
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
