"""A night's worktree: its cache, its sources, the branch it follows, and a workspace that is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

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
