"""Where this repository is, and the data that may lie beside it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
"""Models and texts too large for git; a test that reads them says why it skips where they are absent."""
