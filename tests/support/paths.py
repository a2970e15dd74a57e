"""Where this repository is, the real models and texts of its tests, and those that may lie beside it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests/data"
"""Real models and texts, each with its licence in README.md; STORIES is a trained Llama of 260 thousand weights."""
STORIES, STORIES_TEXT = DATA / "stories260k", DATA / "tinystories/test.jsonl"
SHARED = ROOT.parent / "shared"
"""Models and texts too large for git, or without a licence to pass on.

A test that reads them says why it skips where they are absent.
"""
