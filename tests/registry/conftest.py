"""A repository to register versions in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.registry_project import Night


@pytest.fixture
def night(tmp_path: Path) -> Night:
    (tmp_path / "project").mkdir()
    return Night(tmp_path / "project")
