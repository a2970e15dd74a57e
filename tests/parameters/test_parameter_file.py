"""params.yaml has one reader, and its values are those that DVC records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.dependency.param import read_param_file
from dvc.exceptions import DvcException
from dvc.fs import LocalFileSystem
from dvc.utils.serialize import dump_yaml, load_yaml

from tasks.algorithms.errors import InputError
from tasks.parameters import parameter_file, schema
from tests.support.paths import ROOT

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")


def written(tmp_path: Path, old: str, new: str) -> Path:
    assert old in TEXT
    path = tmp_path / "params.yaml"
    path.write_text(TEXT.replace(old, new, 1), encoding="utf-8")
    return path


@pytest.mark.parametrize("number", [0.00001, 3e-4, 1e-12, 0.5])
def test_a_small_number_as_dvc_writes_it_is_one(tmp_path: Path, number: float) -> None:
    values = load_yaml(ROOT / "params.yaml")
    values["lora"]["learning_rate"] = number  # dvc exp run -S lora.learning_rate=0.00001
    dump_yaml(tmp_path / "params.yaml", values)
    assert schema.load(tmp_path / "params.yaml").lora.learning_rate == number


@pytest.mark.parametrize("text", ["3e-4", "1e-05", "1E-3", "+1e-3", ".5", "010", "0x10", "0o17", "1_000", "yes", "~"])
def test_what_is_read_is_what_dvc_records(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, "learning_rate: 0.002\n", f"learning_rate: {text}\n")
    section = "base_model"
    recorded = read_param_file(LocalFileSystem(), str(path), [section], flatten=False)[section]["learning_rate"]
    found = parameter_file.read(path)[section]["learning_rate"]
    assert found != 0.002
    assert (found, type(found)) == (recorded, type(recorded))


def test_the_dialect_where_the_two_differ(tmp_path: Path) -> None:
    path = written(tmp_path, "  seed: 0\n", "  seed: 010\n")
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["base_model"]["seed"] == 8
    assert schema.load(path).base_model.seed == 10
    with pytest.raises(InputError, match="`overlap.enabled` = 'yes'"):
        schema.load(written(tmp_path, "overlap:\n  enabled: true", "overlap:\n  enabled: yes"))


def test_the_project_s_own_values_are_the_same_in_both() -> None:
    assert parameter_file.read(ROOT / "params.yaml") == yaml.safe_load(TEXT)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(("seed: 1\n# Größe\n" + TEXT.replace("×", "x")).encode(encoding))
    line = 2 if encoding == "latin-1" else 1
    with pytest.raises(InputError) as caught:
        schema.load(path)
    assert str(caught.value) == f"{path} is no UTF-8 text (line {line}): save it as UTF-8"


def test_what_is_given_twice_is_named_with_its_lines(tmp_path: Path) -> None:
    last = len(TEXT.splitlines())
    path = tmp_path / "params.yaml"
    path.write_text(TEXT + "lora:\n  enabled: true\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        schema.load(path)
    assert str(caught.value) == f"{path}, line {last + 1}: `lora` is given a second time; remove one of them"
    path = written(tmp_path, "  rank: 16\n", "  rank: 16\n  rank: 8\n")
    with pytest.raises(InputError) as caught:
        schema.load(path)
    line = TEXT.splitlines().index("  rank: 16") + 2
    assert str(caught.value) == f"{path}, line {line}: `rank` is given a second time; remove one of them"


BROKEN = {
    "lora: [1\nb: 2\n": "did not find expected ',' or ']', line 2",
    "a: b: c\n": "mapping values are not allowed in this context, line 1",
    "a: 1\n---\nb: 2\n": "but found another document, line 2",
    "a: !!python/object/apply:os.system [x]\n": "could not determine a constructor for the tag",
    "a: \x01\n": "control characters are not allowed",
    "[" * 5000: "line 2",
}


@pytest.mark.parametrize("text", BROKEN)
def test_no_yaml(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parameter_file.parse(text.encode(), "params.yaml")
    assert str(caught.value).startswith("params.yaml is not valid YAML: ")
    assert BROKEN[text] in str(caught.value) and "\n" not in str(caught.value)


def test_what_dvc_can_not_read_has_a_sentence_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {}\nstages: {}\n")
    with pytest.raises(DvcException) as caught:
        load_yaml(str(tmp_path / "dvc.yaml"))
    assert ", line 2: `stages` is given a second time; remove one of them" in parameter_file.told(caught.value)
    (tmp_path / "dvc.yaml").write_bytes(b"# Gr\xf6\xdfe\n")
    with pytest.raises(DvcException) as caught:
        load_yaml(str(tmp_path / "dvc.yaml"))
    assert "is no UTF-8 text (line 1)" in parameter_file.told(caught.value)
    assert parameter_file.told(DvcException("something else")) is None


def test_dvc_is_not_imported_before_a_file_is_read() -> None:
    code = "import sys; import tasks.parameters.schema; sys.exit('dvc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
