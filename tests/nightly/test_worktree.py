"""A night's worktree: its cache, its sources, the branch it follows, and a workspace that is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks.algorithms.errors import InputError
from tasks.nightly import records, worktree
from tasks.runtime import git
from tests.support.nightly_project import NightlyProject, workspace


@pytest.fixture
def plain(tmp_path):
    """The project without a server."""
    return NightlyProject(tmp_path)


def test_the_worktree_shares_the_cache_and_leaves_the_workspace_alone(plain) -> None:
    before = workspace(plain)
    (plain.path / "params.yaml").write_text("broken: [", encoding="utf-8")
    folder = worktree.prepare(plain.path)
    assert yaml.safe_load((folder / "params.yaml").read_text())["gptq"]["bits"] == 4  # HEAD's
    (folder / "dvc.lock").write_text("schema: '2.0'\n", encoding="utf-8")
    (folder / "params.yaml").write_text("left behind", encoding="utf-8")
    index = Path(git.run(folder, "rev-parse", "--path-format=absolute", "--git-path", "index"))
    assert index.exists() and index.parent.name == "worktree"
    index.with_name("index.lock").touch()  # of a git that was killed
    assert worktree.prepare(plain.path) == folder
    assert (folder / "dvc.lock").exists() and "gptq" in (folder / "params.yaml").read_text()
    candidate = worktree.snapshot(folder)
    found = records.save(folder, "night-1", candidate, {"verdict": "ACCEPT"})
    assert [night.name for night in records.listing(plain.path)] == ["night-1"]
    assert records.find(plain.path, "night").commit == found.commit
    plain.run("git", "checkout", "--", "params.yaml")
    assert workspace(plain) == before
    (folder / ".git").unlink()  # a worktree that somebody broke is made anew
    assert (worktree.prepare(plain.path) / ".git").exists()


@pytest.mark.parametrize("gitdir", ["{folder}/.git\n", ""])
def test_a_kill_in_git_worktree_add_does_not_block_the_next_night(plain, gitdir) -> None:
    folder = plain.path / worktree.WORKTREE
    known = plain.path / ".git/worktrees/worktree"  # as git leaves it
    known.mkdir(parents=True)
    (known / "locked").write_text("initializing\n")
    (known / "gitdir").write_text(gitdir.format(folder=folder))
    assert worktree.prepare(plain.path) == folder
    assert (folder / "params.yaml").exists() and "locked" not in plain.run("git", "worktree", "list")


def test_a_source_that_is_a_link_is_followed_every_night(plain) -> None:
    from tasks.nightly import newer_sources

    for name in ("one", "two"):
        (plain.path / f"data/{name}").mkdir(parents=True)
        (plain.path / f"data/{name}/weights.json").write_text(name)
    plain.change({"fetch.model.path": "data/current"})
    plain.commit("a source that git ignores")
    folder, found = worktree.prepare(plain.path), []
    for name in ("one", "two"):
        (plain.path / "data/current").unlink(missing_ok=True)
        (plain.path / "data/current").symlink_to(name)
        found.append(newer_sources.digest(newer_sources.bring(plain.path, folder)))
        assert (folder / "data/current/weights.json").read_text() == name
    assert found[0] != found[1]


def test_sources_are_taken_as_they_lie_in_the_workspace(plain, tmp_path_factory) -> None:
    from tasks.nightly import newer_sources

    outside = tmp_path_factory.mktemp("outside")
    (plain.path.parent / "beside").mkdir(exist_ok=True)
    (plain.path.parent / "beside/test.jsonl").write_text("{}\n")
    (outside / "ood.jsonl").write_text("{}\n")
    raw = yaml.safe_load((plain.path / "params.yaml").read_text())
    raw["fetch"]["corpora"]["test"]["path"] = "../beside/test.jsonl"
    raw["fetch"]["corpora"]["test_ood"]["path"] = str(outside / "ood.jsonl")
    (plain.path / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    plain.commit("sources elsewhere")
    folder = worktree.prepare(plain.path)
    first = newer_sources.bring(plain.path, folder)
    assert (folder / "../beside/test.jsonl").exists()
    assert {source.name for source in first} == {"model", "corpora.train"}  # the toy's fetch depends on these
    plain.weights(1.0)
    changed = newer_sources.bring(plain.path, worktree.prepare(plain.path))
    assert json.loads((folder / "source/model/weights.json").read_text()) == {"nats": 1.0}
    assert newer_sources.digest(first) != newer_sources.digest(changed)
    plain.weights(0.0)
    assert newer_sources.bring(plain.path, worktree.prepare(plain.path)) == first


def test_a_night_pins_the_followed_branch_and_keeps_the_comments(plain, monkeypatch) -> None:
    import huggingface_hub

    from tasks.nightly import newer_sources

    text = (plain.path / "params.yaml").read_text()
    raw = yaml.safe_load(text)
    raw["fetch"]["model"] |= {"hub": "a/b", "revision": "0" * 40}
    raw["nightly"]["upstream"]["model"] = "main"
    (plain.path / "params.yaml").write_text("# kept\n" + yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    plain.commit("hub")
    asked = []

    class Api:
        def repo_info(self, repo, revision, repo_type):
            asked.append((repo, revision, repo_type))
            return type("Info", (), {"sha": "a" * 40})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    folder = worktree.prepare(plain.path)
    sources = newer_sources.bring(plain.path, folder)
    assert asked == [("a/b", "main", "model")]
    assert next(source for source in sources if source.name == "model") == ("model", "a/b", "a" * 40)
    written = (folder / "params.yaml").read_text()
    assert "# kept" in written and yaml.safe_load(written)["fetch"]["model"]["revision"] == "a" * 40


def recorded(project: NightlyProject, nats: float) -> str:
    """The name of a night, made without a server: `dvc repro` in the worktree, on these weights."""
    from tasks.nightly import newer_sources

    project.weights(nats)
    folder = worktree.prepare(project.path)
    newer_sources.bring(project.path, folder)
    project.run(sys.executable, "-m", "dvc", "--cd", str(folder), "repro", "-q")
    name = f"night-{nats}"
    records.save(folder, name, worktree.snapshot(folder), {"verdict": "ACCEPT", "stages": ""})
    project.run("git", "checkout", "--", "source")
    return name


def test_an_edit_of_a_file_with_any_name_is_not_overwritten(plain) -> None:
    notes = plain.path / "notes/Größe und *.md"
    notes.parent.mkdir()
    notes.write_text("old\n", encoding="utf-8")
    plain.commit("notes")
    first, second = recorded(plain, 0.001), recorded(plain, 0.002)
    records.apply(plain.path, first)
    with notes.open("a", encoding="utf-8") as file:
        file.write("MINE\n")
    with pytest.raises(InputError, match=r"uncommitted changes \(notes/Größe und \*.md, source/model/weights.json\)"):
        records.apply(plain.path, second)
    assert notes.read_text(encoding="utf-8") == "old\nMINE\n"
    notes.write_text("old\n", encoding="utf-8")
    records.apply(plain.path, second)  # what is left was only brought back before
    assert json.loads((plain.path / "data/package/model/model.safetensors").read_text())["nats"] == 0.002


@pytest.fixture
def below(tmp_path):
    """The project in a subfolder of a larger repository, beside a folder with a committed corpus."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/train.jsonl").write_text('{"text": "x"}\n')
    path = tmp_path / "my project/Größe"
    path.mkdir(parents=True)
    found = NightlyProject(path, tmp_path)
    found.change({"fetch.corpora.train.path": "../../beside/train.jsonl"})
    found.run("git", "add", "-A", str(tmp_path))
    found.commit("beside")
    return found


def test_a_project_below_a_larger_repository_has_nights_of_its_own(below, tmp_path) -> None:
    (tmp_path / "beside/train.jsonl").write_text('{"text": "leak"}\n')  # uncommitted: taken as it lies
    name = recorded(below, 0.001)
    folder = below.path / worktree.WORKTREE / "my project/Größe"
    assert worktree.project(below.path) == folder
    assert (folder / "../../beside/train.jsonl").read_text() == '{"text": "leak"}\n'
    assert json.loads((folder / "data/package/model/model.safetensors").read_text())["nats"] == 0.001
    assert not (below.path / "data/package").exists()
    (night,) = records.listing(below.path)
    assert records.changed_parameters(below.path, [night]) == {name: {}}
    with pytest.raises(InputError, match=r"uncommitted changes \(beside/train.jsonl\)"):
        records.apply(below.path, name)
    below.run("git", "checkout", "--", str(tmp_path / "beside"))
    records.apply(below.path, name)
    assert json.loads((below.path / "data/package/model/model.safetensors").read_text())["nats"] == 0.001
    output = below.python("-m", "tasks", "night", "list")
    assert name in output
    assert "v0.0.1" in below.python("-m", "tasks", "registry", "promote", night.commit)
    assert "files: none differs" in below.python("-m", "tasks", "compare", "v0.0.1", ".")
    assert "test text in training text" in below.python("-m", "tasks", "gate", night.commit, expect=4)
    below.python("-m", "tasks", "retention")


def test_a_project_that_is_not_committed_is_told(below, tmp_path) -> None:
    below.run("git", "rm", "-q", "--cached", "-r", ".")
    below.run("git", "commit", "-qm", "without the project")
    with pytest.raises(InputError, match=r"dvc.yaml is not in commit .*; commit the project first"):
        worktree.prepare(below.path)


def test_git_s_refusal_of_another_user_s_folder_is_told(plain, monkeypatch) -> None:
    monkeypatch.chdir(plain.path)
    assert worktree.root() == plain.path
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(InputError, match="safe.directory"):
        worktree.root()


def test_another_user_s_folder_is_refused_in_git_s_words_unless_git_was_told(plain) -> None:
    other = {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}
    if os.geteuid() == 0:  # pygit2 doesn't know that variable
        subprocess.run(["chown", "-R", "12345:12345", str(plain.path)], check=True)
    told = other | {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    for words in (["night", "list"], ["compare", "HEAD", "HEAD"], ["registry", "list"], ["gate", "HEAD"]):
        output = plain.run(sys.executable, "-m", "tasks", *words, env=other, expect=1)
        assert "git config --global --add safe.directory" in output and output.count("\n") == 1
        output = plain.run(sys.executable, "-m", "tasks", *words, env=told, expect=int(words[0] == "gate"))
        assert "Traceback" not in output and "safe.directory" not in output
