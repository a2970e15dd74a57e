"""DVC's internals that the flow uses: they are as it expects, and what is put in their place writes the same bytes."""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from pathlib import Path

import dvc.dependency.param
import dvc.rwlock
import dvc.stage.decorators
import dvc.stage.run
import yaml
from dvc import dvcfile
from dvc.repo import Repo, lock_repo
from dvc.repo import reproduce as dvc_reproduce
from dvc.stage import Stage as DvcStage
from dvc.stage.cache import StageCache
from dvc.utils.serialize import dumps_yaml, modify_yaml

from flows import dvc_internals
from tests.support.paths import ROOT


def test_dvc_still_has_what_the_flow_uses_of_its_internals() -> None:
    planned = inspect.getsource(dvc_reproduce.reproduce)
    for used in ("collect_stages(self, targets_list", "get_active_graph(self.index.graph)", "plan_repro(graph, stages"):
        assert used in planned
    assert "graph.successors(node)" in inspect.getsource(dvc_reproduce._get_upstream_downstream_nodes)
    assert list(inspect.signature(dvc_reproduce._reproduce_stage).parameters) == ["stage", "kwargs"]
    assert {"allow_missing", "upstream"} <= set(inspect.signature(DvcStage.changed).parameters)
    assert "run_env" in inspect.signature(dvc.stage.run.cmd_run).parameters
    assert list(inspect.signature(StageCache.restore).parameters)[:2] == ["self", "stage"]
    assert list(inspect.signature(dvc_internals._get_stage_hash).parameters) == ["stage"]
    assert list(inspect.signature(dvc_internals._can_hash).parameters) == ["stage"]
    assert "self.stage_cache" in inspect.getsource(Repo.__init__)
    assert "with modify_yaml(self.path, fs=self.repo.fs) as data" in inspect.getsource(dvcfile.Lockfile.dump_stages)
    assert dvcfile.modify_yaml is modify_yaml
    assert "load_path(path, fs, **load_kwargs)" in inspect.getsource(dvc.dependency.param.read_param_file)


def test_dvc_still_locks_as_threads_need_it() -> None:
    assert "with repo.lock:" in inspect.getsource(lock_repo)
    command = inspect.getsource(dvc.stage.decorators.unlocked_repo)
    assert command.index("lock.unlock()") < command.index("repo._reset()") < command.index("lock.lock()")
    assert "unlocked_repo(cmd_run)" in inspect.getsource(dvc.stage.run.run_stage)
    assert "from dvc.rwlock import rwlock" in inspect.getsource(dvc.stage.decorators.rwlocked)
    assert list(inspect.signature(dvc.rwlock.rwlock).parameters)[:3] == ["tmp_dir", "fs", "cmd"]


def test_dvc_lock_has_the_bytes_that_dvc_gives_it(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".dvc/tmp").mkdir(parents=True)
    text = (ROOT / "dvc.lock").read_text(encoding="utf-8")
    assert dvc_internals.dumped(yaml.safe_load(text)) == text  # DVC wrote it
    odd = {"none": None, "words": ["no", "1", "1.5", "null", "~", "", "a: b", "# c", "é", "- d", "x" * 300, "a  b "]}
    odd |= {"numbers": [0.0, 1e-05, 1e16, 0.1, -3, 10**20], "empty": [{}, []], "ordered": OrderedDict(b=1, a=[True])}
    odd |= {"lines": "one\ntwo\n", "long": " ".join(["word"] * 60)}
    for name, value in odd.items():
        if dvc_internals.dumped({name: value}) != dumps_yaml({name: value}):
            assert name in ("numbers", "words", "lines", "long")  # then DVC's own writer is left to it, as below
    content = {"schema": "2.0", "stages": {"a": {"cmd": "x", "outs": [{"path": "é", "size": 1}]}}}
    for start in (content, content | {"odd": "word " * 60}):
        written = {}
        for name, modify in (("dvc", modify_yaml), ("flow", None)):
            Path(name).write_text(dumps_yaml(start), encoding="utf-8")
            if modify:
                with modify(name) as data:
                    data["stages"]["b"] = OrderedDict(cmd="y", params={"p": None})
            else:
                with dvc_internals._lock_written_at_once(), dvcfile.modify_yaml(name) as data:
                    data["stages"]["b"] = OrderedDict(cmd="y", params={"p": None})
            written[name] = Path(name).read_text(encoding="utf-8")
        assert written["flow"] == written["dvc"]
    with dvc_internals._lock_written_at_once(), dvcfile.modify_yaml("new") as data:
        data["stages"] = {}
    assert Path("new").read_text() == dumps_yaml({"stages": {}})


def test_two_threads_are_two_users_for_dvc(tmp_path) -> None:
    from dvc.fs import localfs

    seen = []
    both = threading.Barrier(2, timeout=30)
    turn = threading.Lock()  # the flow holds DVC's lock here

    def read():
        manager = dvc.rwlock.rwlock(str(tmp_path), localfs, "dvc repro", ["/x"], [], False)
        with turn:
            manager.__enter__()
        both.wait()
        with turn:
            seen.append((tmp_path / "rwlock").read_text())
            manager.__exit__(None, None, None)
            seen.append((tmp_path / "rwlock").read_text())

    with dvc_internals._users_by_thread():
        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen[0].count("dvc repro") == 2 and seen[1].count("dvc repro") == 1 and "dvc repro" not in seen[3]


def test_parameters_are_parsed_again_when_they_changed(tmp_path, monkeypatch) -> None:
    from dvc.fs import localfs

    path, parsed = tmp_path / "params.yaml", []
    monkeypatch.setattr(
        dvc_internals, "load_path", lambda path, fs: parsed.append(1) or yaml.safe_load(Path(path).read_text())
    )
    before = dvc.dependency.param.load_path
    with dvc_internals._parameters_parsed_once():
        for text in ("a: [1]", "a: [1, 2]"):
            path.write_text(text)
            for _ in range(3):
                found = dvc.dependency.param.read_param_file(localfs, str(path), ["a"])
                assert found == yaml.safe_load(text)
                found["a"].append("mine")
    assert len(parsed) == 2 and dvc.dependency.param.load_path is before


def test_a_stage_whose_input_is_not_there_yet_has_no_key(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Repo.init(no_scm=True).close()
    stages = {"made": {"cmd": "cp first.txt last.txt", "deps": ["first.txt"], "outs": ["last.txt"], "frozen": True}}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    Path("first.txt").write_text("1", encoding="utf-8")
    Path("last.txt").write_text("1", encoding="utf-8")
    with Repo() as repo:
        repo.commit("made", force=True)
    project = dvc_internals.Project()
    [stage] = project.repo.index.stages
    with project.lock:
        assert project.key(stage, stale=False) and project.key(stage, stale=True)
    Path("first.txt").unlink()
    again = dvc_internals.Project()
    [stage] = again.repo.index.stages
    with again.lock:
        assert not stage.changed_outs() and again.key(stage, stale=False) is again.key(stage, stale=True) is None
