"""A small git and DVC repository with packages to register, written by the test itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import yaml
from dvc.repo import Repo

from tasks.registry import versions
from tasks.runtime import files
from tests.support.paths import ROOT


class Night:
    """A repository whose stage `package` is written by the test, and committed as DVC commits."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git("init", "-q", "-b", "main")
        Repo.init(str(root)).close()
        shutil.copyfile(ROOT / "params.yaml", root / "params.yaml")
        outs = ["data/package", "data/evaluate/package"]
        stage = {"cmd": "false", "params": ["wanda"], "outs": outs}
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"package": stage}}))
        (root / ".gitignore").write_text("/data\n")

    def git(self, *arguments: str) -> str:
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        done = subprocess.run(["git", *who, *arguments], cwd=self.root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def make(self, weights: str, perplexity: float, keep: int = 2) -> None:
        """Write a package and its figures into the workspace, and dvc.lock."""
        folder = self.root / "data/package/model"
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (self.root / "data/evaluate/package").mkdir(parents=True, exist_ok=True)
        for name, text in (("model.bin", weights * 1000), ("sub/tokenizer.json", "{}")):
            (folder / name).unlink(missing_ok=True)  # it may be a link to DVC's cache
            (folder / name).write_text(text)
        named = {"model.bin": {"bytes": len(weights) * 1000, "sha256": files.sha256(folder / "model.bin")}}
        metrics = self.root / "data/evaluate/package/metrics.json"
        for path, content in (
            (folder / "manifest.json", {"files": named}),
            (metrics, {"perplexity": {"test": perplexity}}),
        ):
            path.unlink(missing_ok=True)
            path.write_text(json.dumps(content))
        params = yaml.safe_load((self.root / "params.yaml").read_text())
        params["wanda"]["keep"] = keep
        (self.root / "params.yaml").write_text(yaml.safe_dump(params))
        with contextlib.chdir(self.root), Repo() as repo:
            repo.commit(force=True)

    def commit(self, weights: str, perplexity: float = 40.0, keep: int = 2) -> str:
        """A commit of the branch."""
        self.make(weights, perplexity, keep)
        self.git("add", "-A")
        self.git("commit", "-qm", weights)
        return self.git("rev-parse", "HEAD")

    def content(self) -> str:
        """Of the promoted model."""
        return (self.root / versions.current(self.root).folder / "model.bin").read_text()[:1]

    def state(self) -> tuple:
        """Branch, commit, index, status and all files of the workspace but the registry's."""
        hashes = {
            str(path.relative_to(self.root)): hashlib.md5(path.read_bytes()).hexdigest()
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and ".git" not in path.parts and ".dvc" not in path.parts
        }
        kept = {name: value for name, value in hashes.items() if not name.startswith("data/registry")}
        return self.git("symbolic-ref", "HEAD"), self.git("rev-parse", "HEAD"), self.git("ls-files", "-s"), kept
