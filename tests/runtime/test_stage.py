"""What a stage sees in a toy DVC project: its inputs, outputs, parameters, journal and answers."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from tasks.runtime import stage as stages
from tasks.runtime.stage import Inputs, Stage
from tests.support.paths import ROOT
from tests.support.toy_stages import Toy, write


def test_inputs_and_outputs_are_those_of_dvc_yaml(toy: Toy, run_here) -> None:
    stage = Stage("toy", Repo())
    assert stage.input("source/text.txt") == Path("data/source/text.txt")
    assert stage.has_input("source/text.txt") and not stage.has_input("text.txt") and not stage.has_input("x")
    assert stage.inputs_named("text.txt") == [Path("data/source/text.txt"), Path("other/text.txt")]
    assert stage.output("table.csv") == Path("data/.scratch/toy/data/toy/table.csv")
    assert stage.output("toy/model/a") == stage.output("model/a") == Path("data/.scratch/toy/data/toy/model/a")
    assert stage.folder == Path("data/toy") and stage.output("toy") == Path("data/.scratch/toy/data/toy")
    assert stage.expected() == [Path("data/toy"), Path("data/toy/model"), Path("data/toy/table.csv")]
    listed = re.escape("dvc.yaml declares ['data/source/text.txt', 'other/text.txt']")
    with pytest.raises(LookupError, match=f"`masks` is no dependency of stage toy; {listed}"):
        stage.input("masks")
    with pytest.raises(LookupError, match=f"`text.txt` is an ambiguous dependency of stage toy; {listed}"):
        stage.input("text.txt")


def test_a_stage_has_one_output(toy: Toy, run_here) -> None:
    two = yaml.safe_load(Path("dvc.yaml").read_text())
    two["stages"]["toy"]["outs"] = ["data/toy/model", "data/toy/table.csv"]
    Path("dvc.yaml").write_text(yaml.safe_dump(two))
    with pytest.raises(LookupError, match="stage toy has one output, its folder; dvc.yaml declares"):
        Stage("toy", Repo())


def test_the_model_in_is_the_first_one(toy: Toy, run_here) -> None:
    declared = ["data/a/x", "data/b/model", "data/c/model", "data/model/y"]
    inputs = Inputs("toy", {Path(path): Path("elsewhere") / path for path in declared})
    assert inputs.model_in == Path("elsewhere/data/b/model")
    assert inputs.inputs_named("model") == [Path("elsewhere/data/b/model"), Path("elsewhere/data/c/model")]
    listed = re.escape("dvc.yaml declares ['data/source/text.txt', 'other/text.txt']")
    with pytest.raises(LookupError, match=f"stage toy has no dependency called `model`; {listed}"):
        _ = Stage("toy", Repo()).model_in


def test_what_lies_in_a_declared_folder_is_found_by_its_name() -> None:
    inputs = Inputs("toy", {Path(path): Path("elsewhere") / path for path in ("data/a", "data/b/c", "data/a/x/model")})
    assert inputs.input("a/table.csv") == Path("elsewhere/data/a/table.csv")
    assert inputs.input("b/c/d/e.json") == Path("elsewhere/data/b/c/d/e.json")
    assert inputs.input("a/x/model") == Path("elsewhere/data/a/x/model")
    for name in ("table.csv", "d/table.csv"):
        with pytest.raises(LookupError, match=f"`{name}` is no dependency"):
            inputs.input(name)


def test_a_path_that_ends_another_one_is_itself() -> None:
    declared = ["test.jsonl", "wiki/test.jsonl", "a/model", "b/a/model"]
    inputs = Inputs("toy", {Path(path): Path("elsewhere") / path for path in declared})
    for path in declared:
        assert inputs.input(path) == Path("elsewhere") / path and inputs.has_input(path)
    with pytest.raises(LookupError, match="`model` is an ambiguous dependency"):
        inputs.input("model")
    assert not inputs.has_input("model")


def test_the_models_that_the_stages_work_on_are_one_chain_and_its_baselines() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    models = {name: [Path(dep) for dep in stage["deps"] if Path(dep).name == "model"] for name, stage in stages.items()}
    before = {name: found[0].parent.name for name, found in models.items() if found and name != "measure"}
    chain = ["fetch", "vocabulary", "depth_prune", "wanda", "lora", "gptq", "eora", "qad", "package", "hardware_fit"]
    assert [before[name] for name in chain[1:]] == chain[:-1]
    assert (before["baseline_lora"], before["baseline"]) == ("vocabulary", "baseline_lora")
    assert all(len(models[name]) == 1 for name in ("evaluate", "kv_cache", "harness"))


def test_only_declared_parameters_are_there(toy: Toy, run_here) -> None:
    stage = Stage("toy", Repo())
    assert stage.params.toy.value == 1 and stage.everything.hidden.x == 1
    for undeclared in ("hidden", "source"):
        with pytest.raises(AttributeError, match=undeclared):
            getattr(stage.params, undeclared)


def test_without_hard_links_the_bytes_are_copied(toy: Toy, run_here, monkeypatch) -> None:
    def refuse(*_) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(stages.os, "link", refuse)
    stage = Stage("toy", Repo())
    stage.pass_on(Path("other"), stage.output("model"))
    copy = stage.output("model") / "text.txt"
    assert copy.read_text() == "other" and not os.path.samefile(copy, "other/text.txt")


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
