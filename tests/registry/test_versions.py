"""Versions in small git and DVC repositories: promotion, rollback, kills in between, clean-up, the command."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo
from dvc_data.hashfile.gc import gc

from tasks.algorithms.errors import InputError
from tasks.registry import contents, overview, tags, versions
from tests.support.command import edgepress
from tests.support.paths import ROOT
from tests.support.registry_project import Night

VERDICT = {"verdict": "ACCEPT"}


def run(night: Night, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> tuple:
    """(exit code, stdout, stderr) of the command."""
    monkeypatch.chdir(night.root)
    return edgepress(capsys, *arguments)


def test_promote_and_roll_back_and_what_the_manifest_says(night: Night) -> None:
    first, second = night.commit("a", 41.0), night.commit("b", 40.0)
    assert versions.current(night.root) is None
    assert versions.promote(night.root, first).name == "v0.0.1"
    assert versions.promote(night.root, second, {"perplexity_test": 39.0}, VERDICT).name == "v0.0.2"
    manifest = versions.current(night.root)
    assert (manifest.version, manifest.revision, manifest.tag) == ("v0.0.2", second, "edgepress#prod#2")
    assert manifest.figures == {"perplexity_test": 39.0} and manifest.verdict == VERDICT
    expected = hashlib.sha256(b"b" * 1000).hexdigest()
    assert manifest.package["files"]["model.bin"]["sha256"] == expected and night.content() == "b"
    stored = json.loads((night.root / versions.MANIFEST).read_text())
    assert (stored["version"], stored["package"]) == ("v0.0.2", manifest.package)
    described = manifest.package["files"].items()
    listed = json.dumps([{"md5": file["md5"], "relpath": name} for name, file in sorted(described)])
    assert manifest.package["md5"] == hashlib.md5(listed.encode()).hexdigest() + ".dir"  # as DVC hashes a folder
    assert versions.rollback(night.root, reason="slow").name == "v0.0.1"
    assert (versions.current(night.root).figures["perplexity_test"], night.content()) == (41.0, "a")
    with pytest.raises(InputError, match="no version was promoted before v0.0.1"):
        versions.rollback(night.root)
    with pytest.raises(InputError, match=r"v0.0.2 was rolled back \(slow\); promote it --again"):
        versions.promote(night.root, second)
    assert versions.promote(night.root, "v0.0.2", again=True).name == "v0.0.2" and night.content() == "b"
    assert versions.rollback(night.root).name == "v0.0.1"


def test_a_second_promotion_of_the_same_bytes_changes_nothing(night: Night) -> None:
    first = night.commit("a")
    versions.promote(night.root, first)
    night.make("a", 40.0)
    (night.root / "params.yaml").open("a").write("# a comment\n")
    night.git("commit", "-qam", "another commit, the same bytes")
    assert versions.promote(night.root, "HEAD").name == "v0.0.1"
    assert len(night.git("tag").split()) == 2


def test_rolling_back_twice_goes_further_back(night: Night) -> None:
    for letter in "abc":
        versions.promote(night.root, night.commit(letter))
    with pytest.raises(InputError, match="v9.9.9 was not promoted before v0.0.3; to choose from: v0.0.1, v0.0.2"):
        versions.rollback(night.root, "v9.9.9")
    assert [versions.rollback(night.root).name for _ in range(2)] == ["v0.0.2", "v0.0.1"]
    assert [row["stage"] for row in overview.versions(night.root)] == ["rolled back", "rolled back", "prod"]


def test_a_night_outside_of_every_branch_leaves_the_workspace_as_it_is(night: Night) -> None:
    night.commit("a")
    night.git("worktree", "add", "-q", "--detach", "../night")
    cache = night.root / ".dvc/cache"
    (night.root.parent / "night/.dvc/config.local").write_text(f"[cache]\n    dir = {cache}\n")
    away = Night.__new__(Night)
    away.root = night.root.parent / "night"
    away.git("update-ref", "refs/exps/aa/bb/night-1", away.commit("b"))
    night.git("worktree", "remove", "--force", "../night")
    (night.root / "params.yaml").open("a").write("# being edited\n")
    (night.root / "staged").write_text("x")
    night.git("add", "staged")
    before = night.state()
    assert versions.promote(night.root, "refs/exps/aa/bb/night-1").name == "v0.0.1"
    assert night.content() == "b" and night.state() == before
    night.git("update-ref", "-d", "refs/exps/aa/bb/night-1")
    night.git("-c", "gc.pruneExpire=now", "-c", "gc.reflogExpire=now", "gc", "-q")
    contents.remove(night.root / "data/registry")
    assert night.content() == "b"  # the tag kept the commit


KILLS = {
    "before the version's tag": ("tasks.registry.tags.register", None),
    "before the stage's tag": ("tasks.registry.tags.assign", "v0.0.2"),
    "before the manifest": ("tasks.runtime.files.write_text", "v0.0.2"),
    "before the manifest takes its name": ("os.fsync", None),
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_in_a_promotion(night: Night, moment: str) -> None:
    """SIGKILL: the old model is in use until the stage's tag is there, then the new one; the next call completes it."""
    for letter in "ab":
        revision = night.commit(letter)
        if letter == "a":
            versions.promote(night.root, revision)
    where, registered = KILLS[moment]
    module, _, name = where.rpartition(".")
    script = (
        f"import os, signal, {module}\nfrom pathlib import Path\nfrom tasks.registry import versions\n"
        f"{module}.{name} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"versions.promote(Path({str(night.root)!r}), {revision!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    tagged = "edgepress#prod#2" in night.git("tag")
    assert tagged == (where == "tasks.runtime.files.write_text")
    assert json.loads((night.root / versions.MANIFEST).read_text())["version"] == "v0.0.1"  # whole, and the old one
    assert list(tags.read(night.root).versions) == ["v0.0.1", *filter(None, [registered])]
    assert night.content() == ("b" if tagged else "a")
    assert versions.promote(night.root, revision).name == "v0.0.2" and night.content() == "b"
    assert night.git("tag", "--list", "edgepress#prod#*").split() == ["edgepress#prod#1", "edgepress#prod#2"]
    assert sorted(path.name for path in (night.root / "data/registry").iterdir() if path.suffix != ".tmp") == [
        "current.json",
        "v0.0.1",
        "v0.0.2",
    ]


def objects(night: Night) -> set[str]:
    return {path.parent.name + path.name for path in (night.root / ".dvc/cache/files/md5").rglob("*") if path.is_file()}


def md5(letter: str) -> str:
    return hashlib.md5(letter.encode() * 1000).hexdigest()


def test_gc_keeps_the_last_promoted_and_drops_the_others(night: Night) -> None:
    commits = {letter: night.commit(letter) for letter in "abcde"}
    for letter in "abd":  # c was never promoted, e is the workspace
        versions.promote(night.root, commits[letter])
    revisions = [version.revision for version in versions.kept(night.root, 2)]
    assert revisions == [commits["d"], commits["b"]]
    with contextlib.chdir(night.root), Repo() as repo:  # as `dvc gc --rev`, which takes one revision
        used = {found for some in repo.used_objs(revs=revisions).values() for found in some}
        gc(repo.cache.local, used)
    assert {letter for letter in "abcde" if md5(letter) in objects(night)} == {"b", "d", "e"}
    versions.prune(night.root, 2)
    assert [row["data"] for row in overview.versions(night.root)] == ["kept", "kept", "gone"]


def test_a_bare_gc_can_t_take_what_was_promoted(night: Night) -> None:
    for letter in "abc":
        revision = night.commit(letter)
        if letter < "c":
            versions.promote(night.root, revision)
    with Repo(str(night.root)) as repo:
        repo.gc(workspace=True, force=True)
    assert md5("a") not in objects(night)
    assert versions.rollback(night.root).name == "v0.0.1" and night.content() == "a"


def test_rollback_is_refused_where_the_bytes_are_gone_or_damaged(night: Night) -> None:
    for letter in "ab":
        versions.promote(night.root, night.commit(letter))
    kept = night.root / "data/registry/v0.0.1/model.bin"
    kept.write_text("x" * 1000)
    assert versions.rollback(night.root).name == "v0.0.1" and night.content() == "a"  # mended from DVC's cache
    versions.promote(night.root, "v0.0.2", again=True)
    kept.write_text("x" * 1000)
    cached = night.root / ".dvc/cache/files/md5" / md5("a")[:2] / md5("a")[2:]
    cached.chmod(0o644)
    cached.write_text("a" * 999 + "b")
    for sentence in ("in DVC's cache is damaged: its md5 is not", "is gone from DVC's cache"):
        with pytest.raises(InputError, match=sentence):
            versions.rollback(night.root)
        assert night.content() == "b" and "edgepress#prod#4" not in "".join(night.git("tag").split("#prod#4")[1:])
        cached.unlink(missing_ok=True)
    assert night.git("tag", "--list", "edgepress#prod#*").split()[-1] == "edgepress#prod#4"


def test_rollback_passes_over_what_was_withdrawn(night: Night) -> None:
    for letter in "abc":
        versions.promote(night.root, night.commit(letter))
    versions.start_canary(night.root, "v0.0.2", 0.05)
    versions.stop_canary(night.root, "worse", withdraw=True)
    assert versions.rollback(night.root).name == "v0.0.1" and night.content() == "a"
    assert [row["stage"] for row in overview.versions(night.root)] == ["rolled back", "rolled back", "prod"]


def test_one_that_was_withdrawn_can_be_gone_back_to_by_name(night: Night) -> None:
    for letter in "ab":
        versions.promote(night.root, night.commit(letter))
    versions.start_canary(night.root, "v0.0.1", 0.05)
    versions.stop_canary(night.root, "worse", withdraw=True)
    with pytest.raises(InputError, match="and not withdrawn: name the one"):
        versions.rollback(night.root)
    assert versions.rollback(night.root, "v0.0.1").name == "v0.0.1"
    assert [row["stage"] for row in overview.versions(night.root)] == ["rolled back", "prod"]


def test_what_is_in_use_may_be_gone_and_the_registry_still_works(night: Night, tmp_path: Path) -> None:
    for letter in "ab":
        versions.promote(night.root, night.commit(letter))
    night.make("c", 39.0)
    shutil.rmtree(night.root / "data/registry/v0.0.2")
    (night.root / ".dvc/cache/files/md5" / md5("b")[:2] / md5("b")[2:]).unlink()
    with pytest.raises(InputError, match="is gone from DVC's cache"):
        versions.current(night.root)
    assert [row["data"] for row in overview.versions(night.root)] == ["gone", "kept"]
    assert versions.rollback(night.root).name == "v0.0.1" and night.content() == "a"
    subprocess.run(["git", "clone", "-q", str(night.root), str(tmp_path / "clone")], check=True)
    assert [row["data"] for row in overview.versions(tmp_path / "clone")] == ["gone", "gone"]


def test_the_command_in_a_subfolder_answers_as_above_and_leaves_nothing_there(night, monkeypatch, capsys) -> None:
    for letter in "ab":
        versions.promote(night.root, night.commit(letter))
    (night.root / "src/deep").mkdir(parents=True)
    monkeypatch.chdir(night.root)
    above = edgepress(capsys, "registry", "list")
    for arguments in (["list"], ["promote", "../.."], ["promote", "HEAD"], ["rollback"]):
        monkeypatch.chdir(night.root / "src/deep")
        code, out, errors = edgepress(capsys, "registry", *arguments)
        assert code == 0 and (arguments != ["list"] or (code, out, errors) == above)
    assert night.content() == "a" and not list((night.root / "src/deep").iterdir())


def test_tags_are_signed_by_nobody_where_git_was_told_of_nobody(night: Night, monkeypatch) -> None:
    commit = night.commit("a")
    monkeypatch.setenv("HOME", str(night.root / "nowhere"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "user.useConfigOnly")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "true")
    versions.promote(night.root, commit)
    form = "%(taggername) %(taggeremail)"
    assert set(night.git("for-each-ref", f"--format={form}", "refs/tags").splitlines()) == {
        "edgepress <edgepress@localhost>"
    }
    night.git("config", "user.name", "Ö Ü")
    night.git("config", "user.email", "o@example.org")
    versions.promote(night.root, night.commit("b"))
    assert "Ö Ü <o@example.org>" in night.git("for-each-ref", f"--format={form}", "refs/tags")


def test_a_checkout_that_may_only_be_read_is_read(night: Night, monkeypatch) -> None:
    versions.promote(night.root, night.commit("a"))
    before = overview.versions(night.root), versions.current(night.root)
    monkeypatch.setattr(tags.locks, "held", refused)
    assert (overview.versions(night.root), versions.current(night.root)) == before
    with pytest.raises(PermissionError):
        versions.promote(night.root, "HEAD")


def refused(path: Path, *_, **__):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_a_lost_or_edited_manifest_is_made_anew(night: Night) -> None:
    versions.promote(night.root, night.commit("a"))
    path = night.root / versions.MANIFEST
    text = path.read_text()
    for damage in (lambda: path.unlink(), lambda: path.write_text("{"), lambda: path.write_bytes(b"\xff")):
        damage()
        assert versions.current(night.root).version == "v0.0.1" and path.read_text() == text


def test_canary_from_start_to_either_end(night: Night) -> None:
    for letter in "ab":
        night.git("tag", letter, night.commit(letter))
    with pytest.raises(InputError, match="nothing is promoted that a canary could be compared with"):
        versions.start_canary(night.root, "b", 0.05)
    versions.promote(night.root, "a")
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match="must be above 0 and below 1"):
            versions.start_canary(night.root, "b", share)
    with pytest.raises(InputError, match="it can't be its own canary"):
        versions.start_canary(night.root, "a", 0.05)
    begun = versions.start_canary(night.root, "b", 0.05, {"perplexity_test": 1.0}, VERDICT)
    assert (begun.version, begun.share) == ("v0.0.2", 0.05)
    assert json.loads((night.root / versions.MANIFEST).read_text())["canary"]["share"] == 0.05
    assert versions.start_canary(night.root, "v0.0.2", 0.2).share == 0.2
    assert {version.name for version in versions.kept(night.root, 2)} == {"v0.0.1", "v0.0.2"}
    with pytest.raises(InputError, match="v0.0.2 is a canary already"):
        versions.start_canary(night.root, night.commit("c"), 0.05)
    versions.promote(night.root, "v0.0.2")
    manifest = versions.current(night.root)
    assert manifest.canary is None and manifest.version == "v0.0.2" and manifest.verdict == VERDICT
    versions.start_canary(night.root, "HEAD", 0.5)
    assert versions.stop_canary(night.root, "too slow", withdraw=True) == "v0.0.3"
    with pytest.raises(InputError, match=r"v0.0.3 was rolled back \(too slow\)"):
        versions.promote(night.root, "v0.0.3")
    with pytest.raises(InputError, match="there is no canary"):
        versions.stop_canary(night.root)


def test_two_promotions_at_once_are_one_after_the_other(night: Night) -> None:
    commits = [night.commit(letter) for letter in "ab"]
    script = (
        "import sys\nfrom pathlib import Path\nfrom tasks.registry import versions\nversions.promote(Path({!r}), {!r})"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script.format(str(night.root), commit)], cwd=ROOT) for commit in commits
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    assert len(night.git("tag").split()) == 4 and night.content() in "ab"


def test_parameters_that_cannot_be_read_are_no_equal_ones(night: Night) -> None:
    first = night.commit("a", 41.0)
    (night.root / "params.yaml").write_text("wanda: [", encoding="utf-8")
    night.git("commit", "-qam", "b")
    with pytest.raises(InputError, match=f"the parameters of commit {night.git('rev-parse', 'HEAD')[:12]} can't be re"):
        overview.diff(night.root, first, "HEAD")


def test_the_command(night: Night, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run(night, monkeypatch, capsys, "registry", "list")[1].startswith("There are no versions yet")
    assert run(night, monkeypatch, capsys, "registry", "rollback")[2] == (
        "error: nothing is promoted, so there is nothing to roll back\n"
    )
    night.commit("a", 41.0, keep=2)
    assert run(night, monkeypatch, capsys, "registry", "promote", ".")[1].startswith(
        "v0.0.1 is in use (edgepress#prod#1): "
    )
    night.commit("b", 40.0, keep=1)
    code, out, _ = run(night, monkeypatch, capsys, "registry", "promote", "HEAD", "--json")
    assert (code, json.loads(out)["version"]) == (0, "v0.0.2")
    assert run(night, monkeypatch, capsys, "registry", "promote", "v0.0.2")[1].startswith("v0.0.2 is in use already")
    rows = json.loads(run(night, monkeypatch, capsys, "registry", "list", "--json")[1])
    assert [(row["version"], row["stage"], row["data"]) for row in rows] == [
        ("v0.0.2", "prod", "kept"),
        ("v0.0.1", "before", "kept"),
    ]
    lines = run(night, monkeypatch, capsys, "registry", "list")[1].splitlines()
    assert "40.000" in lines[2] and "by hand" in lines[2] and "41.000" in lines[3]
    found = json.loads(run(night, monkeypatch, capsys, "compare", "v0.0.1", "HEAD", "--json")[1])
    assert found["parameters"] == {"wanda.keep": [2, 1]} and set(found["files"]) == {"manifest.json", "model.bin"}
    assert found["figures"] == {"perplexity_test": [41.0, 40.0]}
    assert "-2.44%" in run(night, monkeypatch, capsys, "compare", "v0.0.1", "v0.0.2")[1]
    assert "v0.0.1 is in use again" in run(night, monkeypatch, capsys, "registry", "rollback", "--reason", "slow")[1]
    assert run(night, monkeypatch, capsys, "registry", "verify")[1].endswith("3 files are those of v0.0.1\n")
    (night.root / "data/registry/v0.0.1/model.bin").write_text("x")
    code, _, error = run(night, monkeypatch, capsys, "registry", "verify")
    assert code == 1 and error.startswith("error: data/registry/v0.0.1/model.bin was altered")
    assert run(night, monkeypatch, capsys, "registry", "promote", "nonsense")[2].startswith(
        "error: 'nonsense' is no version, folder"
    )


def test_the_canary_s_command(night: Night, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for letter in "abc":
        night.git("tag", letter, night.commit(letter))
    run(night, monkeypatch, capsys, "registry", "promote", "a")
    assert run(night, monkeypatch, capsys, "canary", "route", "7")[1] == "v0.0.1 data/registry/v0.0.1\n"
    assert "v0.0.2 is the canary with 5.000%" in run(night, monkeypatch, capsys, "canary", "start", "b")[1]
    rows = [{"version": f"v0.0.{1 + (i % 2)}", "latency_ms": 5.0, "correct": True} for i in range(2000)]
    telemetry = night.root.parent / "telemetry.jsonl"
    telemetry.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run(night, monkeypatch, capsys, "canary", "judge", str(telemetry), "--apply")
    assert code == 0 and out.startswith("v0.0.2 against v0.0.1: promote (800 samples") and "v0.0.2 is in use" in out
    run(night, monkeypatch, capsys, "canary", "start", "c", "--share", "0.5")
    bad = [{"version": f"v0.0.{2 + (i % 2)}", "latency_ms": 5.0, "correct": i % 2 == 0} for i in range(1000)]
    telemetry.write_text("".join(json.dumps(row) + "\n" for row in bad))
    assert ": rollback (" in run(night, monkeypatch, capsys, "canary", "judge", str(telemetry))[1]
    assert versions.current(night.root).canary.version == "v0.0.3"  # judged, not applied
    routed = {run(night, monkeypatch, capsys, "canary", "route", str(i))[1].split()[0] for i in range(12)}
    assert routed == {"v0.0.2", "v0.0.3"}
    assert "v0.0.3 is withdrawn" in run(night, monkeypatch, capsys, "canary", "judge", str(telemetry), "--apply")[1]
    assert run(night, monkeypatch, capsys, "canary", "judge", str(telemetry))[2].startswith("error: there is no canary")


def test_the_command_needs_neither_prefect_nor_torch() -> None:
    script = "import sys, tasks.cli.registry; sys.exit(bool({'prefect', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ).returncode == 0
