"""`edgepress export`: write a model folder for an engine of small devices, and say what that changed and cost.

    edgepress export --format onnx-int4 --model data/package/model --out DIR [--text CORPUS.jsonl]

onnx-int4: ONNX Runtime GenAI with the package's own codes and scales. onnx-int8: the same engine, weights quantised
again. gguf: llama.cpp, the package's codes and scales. gguf-f32: llama.cpp with every weight in float32. With --text
the export is run and compared with the PyTorch model. DIR gets the engine's files and export.json, which --json prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tasks.cli import console

FORMATS = ("onnx-int4", "onnx-int8", "gguf", "gguf-f32")
"""What `tasks.export.export` knows, written again, as importing it takes seconds; a test compares them."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--model", type=Path, required=True, help="a packed, quantised or dense model folder")
    parser.add_argument("--out", type=Path, required=True, help="a folder that isn't there yet")
    parser.add_argument("--text", type=Path, help='JSONL of {"text"}: compare perplexity and greedy tokens on it')
    parser.add_argument("--json", action="store_true", help="print the content of export.json")


def main(given: argparse.Namespace) -> None:
    """Export, and print what it changed."""
    from tasks.export import export

    report = export.export(given.model, given.format, given.out, given.text)
    if given.json:
        console.show_json(report)
    else:
        console.show(*_lines(given, report))


def _lines(given: argparse.Namespace, report: Mapping[str, Any]) -> Iterable[str]:
    size = report["bytes"]
    yield f"{given.out}: {size['export']:,} bytes, {size['ratio']:.2f} of the {size['source']:,} of {given.model}"
    for what, change in report["changes"].items():
        yield f"  {what}: {change['done']} ({change['bytes']:+,} bytes{'' if change['exact'] else ', not exact'})"
    if check := report.get("check"):
        perplexity = check["perplexity"]
        yield (
            f"  perplexity {perplexity['export']:.4f} ({perplexity['change']:+.3%}); greedy tokens the same on "
            f"{check['same_prompts']} of {check['prompts']} prompts, {check['same_argmax']:.2%} of most likely tokens"
        )
