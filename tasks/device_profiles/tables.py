"""The command that says whether a model fits a device, without the DAG; and the tables that hardware_fit shares.

    edgepress fit --model DIR --device raspberry-pi-5       one device; the exit code is the verdict
    edgepress fit --model DIR                               a table of all
    edgepress fit --model CONFIG.json --bits 4 --group-size 128 --embedding-bits 4     a model yet to be made

Exit codes: 0 `FITS`, 1 `FITS_STREAMING`, 2 `DOES_NOT_FIT`, 3 an error; of the table of all devices 0. DIR is packed,
quantised by gptqmodel or dense; with an option of planning its config.json alone counts. The profiles are those of
data/devices; `--device host` is this machine, once `edgepress profile` has measured it. No
weights are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from tasks.algorithms.device_fit import verdict
from tasks.algorithms.device_fit.footprint import Model, Workload
from tasks.algorithms.device_fit.verdict import FAILS, FITS, STREAMS, Fit
from tasks.algorithms.errors import InputError
from tasks.device_profiles import contents, profiles
from tasks.device_profiles.planned_contents import planned
from tasks.packed.plan import MATRIX_BITS, Plan

PROFILES = Path(__file__).resolve().parents[2] / "data" / "devices"
CODES = {FITS: 0, STREAMS: 1, FAILS: 2}
ERROR = 3
COLUMNS = (
    "device",
    "verdict",
    "weights_bytes",
    "kv_bytes",
    "activation_bytes",
    "total_bytes",
    "capacity_bytes",
    "headroom_bytes",
    "bytes_over",
    "limiting_term",
    "placement",
    "streamed_bytes_per_token",
    "bandwidth_seconds",
    "compute_seconds",
    "tokens_per_second_bound",
    "limited_by",
    "ways_to_fit",
    "notes",
    "fetched_verdict",
)
"""Of devices.csv. Bytes are those in the device's memories; `total_bytes` includes metadata."""
_CONTEXT = 2048
"""Tokens in the KV cache unless said otherwise, where the model has as many positions."""


def row(name: str, found: Fit, fetched: str = "") -> dict[str, Any]:
    """A device's row of devices.csv, by `COLUMNS`; fetched: the verdict of the fetched model, where it was judged."""
    known = {
        "device": name,
        "placement": "; ".join(_placed(found)),
        "bandwidth_seconds": found.seconds["bandwidth"],
        "compute_seconds": found.seconds["compute"],
        "tokens_per_second_bound": found.tokens_per_second.bound,
        "limited_by": limited_by(found),
        "ways_to_fit": "; ".join(way.text for way in found.ways_to_fit),
        "notes": "; ".join(found.notes),
        "fetched_verdict": fetched,
    }
    return {column: known[column] if column in known else getattr(found, column) for column in COLUMNS}


def limited_by(found: Fit) -> str:
    """The term of the roofline: "compute", or "bandwidth of" a memory."""
    speed = found.tokens_per_second
    return speed.limited_by if speed.limited_by == "compute" else f"bandwidth of {speed.tier}"


def summary(name: str, found: Fit, workload: Workload) -> list[str]:
    """A verdict for the terminal."""
    speed = found.tokens_per_second
    room = f"{found.bytes_over:,} bytes over" if found.bytes_over else f"{found.headroom_bytes:,} bytes free"
    lines = [
        f"{name}: {found.verdict}, limited by {found.limiting_term} ({room}), context {workload.context} x "
        f"{workload.batch}",
        f"in memory: weights {found.weights_bytes:,}, metadata {found.metadata_bytes:,}, KV cache {found.kv_bytes:,}, "
        f"activations and scratch {found.activation_bytes:,}, together {found.total_bytes:,} bytes",
        *(f"  {placed}" for placed in _placed(found)),
        f"at most {speed.bound:,.1f} tokens/s, limited by {limited_by(found)} (bandwidth "
        f"{1000 * found.seconds['bandwidth']:,.3f} ms, compute {1000 * found.seconds['compute']:,.3f} ms a step)",
    ]
    if found.streamed_bytes_per_token:
        lines.append(f"{found.streamed_bytes_per_token:,} bytes are streamed from storage in each step")
    if found.verdict != FITS:
        changes = ", or ".join(way.text for way in found.ways_to_fit)
        lines.append(f"what would make it fit: {changes or 'no single change'}")
    return lines + [f"note: {note}" for note in found.notes]


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """All devices, one a line."""
    lines = [
        f"{'device':<17}{'verdict':<16}{'weights':>14}{'total':>16}{'over':>16}{'free':>16}{'tokens/s':>13}  limited by"
    ]
    for one in rows:
        lines.append(
            f"{one['device']:<17}{one['verdict']:<16}{one['weights_bytes']:>14,}{one['total_bytes']:>16,}"
            f"{one['bytes_over']:>16,}{one['headroom_bytes']:>16,}{one['tokens_per_second_bound']:>13,.1f}  "
            f"{one['limited_by']}"
        )
        if one["ways_to_fit"]:
            lines.append(f"{'':<17}would fit with: {one['ways_to_fit'].replace('; ', ', or ')}")
    return lines


def _placed(found: Fit) -> list[str]:
    """Per memory in use what lies there: "dram 1,234 of 5,678: weights (layers.0 to layers.9), kv_cache"."""
    lines = []
    for place in found.placement:
        if place.items:
            names = [f"weights ({place.parts})" if n == "weights" else n for n in place.items if n != "metadata"]
            lines.append(f"{place.tier} {place.used:,} of {place.usable:,}: {', '.join(names) or 'metadata'}")
    return lines


def main(arguments: list[str] | None = None) -> NoReturn:
    """The command."""
    given = _parser().parse_args(arguments)
    try:
        model = _model(given)
        context = min(_CONTEXT, model.shape.context or _CONTEXT) if given.context is None else given.context
        workload = Workload(context, given.batch, given.kv_bits, given.activation_bits)
        chosen = _chosen(given)
        found = {name: verdict.judge(profile.device(), model, workload) for name, profile in chosen.items()}
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(ERROR)
    if given.json:
        print(json.dumps(_plain(found, model, workload, given.device), indent=1, sort_keys=True))
    elif given.device:
        print("\n".join([_stored(model), *summary(given.device, found[given.device], workload)]))
    else:
        print("\n".join([_stored(model), *table(row(name, one) for name, one in found.items())]))
    sys.exit(CODES[found[given.device].verdict] if given.device else 0)


def _plain(found: Mapping[str, Fit], model: Model, workload: Workload, device: str | None) -> dict[str, Any]:
    """As fit.json: one device's verdict, or the rows of all."""
    about = {"workload": asdict(workload), "stored_bytes": model.stored}
    if device:
        return {"device": device, **asdict(found[device]), **about}
    return {"devices": [{"device": name, **asdict(one)} for name, one in found.items()], **about}


def _stored(model: Model) -> str:
    parameters = sum(m.rows * m.cols for m in model.matrices() if m.component != "adapter")
    return f"{model.stored:,} bytes {'in its files' if model.metadata else 'when packed'}, {parameters:,} weights"


def _chosen(given: argparse.Namespace) -> dict[str, profiles.Profile]:
    if given.device is None:
        return profiles.load_all(given.profiles)
    if given.device == profiles.HOST:
        return {profiles.HOST: profiles.load_host(given.profiles)}
    return {given.device: profiles.pick(profiles.load_all(given.profiles), given.device)}


def _model(given: argparse.Namespace) -> Model:
    for name in ("context", "batch"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} is not positive: expected the number of tokens or sequences, from 1 on")
    plan = {name: getattr(given, name) for name in _PLAN if getattr(given, name) is not None}
    if plan or given.model.is_file():
        return planned(contents.config_of(given.model), Plan(**({"bits": None, "dtype": "BF16"} | plan)))
    if (
        given.model.is_dir()
        and not any(given.model.rglob("*.safetensors"))
        and (given.model / contents.CONFIG).exists()
    ):
        raise InputError(
            f"{given.model} holds no *.safetensors file; to plan a model from its config.json say how: --bits 4, or "
            "--dtype BF16"
        )
    return contents.read(given.model)


_PLAN = ("bits", "group_size", "pattern", "embedding_bits", "embedding_group", "dtype")
"""Options of a model yet to be made, as `Plan` names them."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ERROR, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="edgepress fit",
        description="Whether a model fits a device, and what would make it fit",
    )
    parser.add_argument("--model", type=Path, required=True, help="a model folder, or a config.json")
    parser.add_argument("--device", help="a profile's name, or host; default: a table of all")
    parser.add_argument("--profiles", type=Path, default=PROFILES, help="folder of device profiles")
    parser.add_argument(
        "--context", type=int, help=f"tokens in the KV cache; default {_CONTEXT}, or what the model has"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kv-bits", type=int, choices=(4, 8, 16, 32), default=16)
    parser.add_argument("--activation-bits", type=int, choices=(8, 16, 32), default=16)
    parser.add_argument("--json", action="store_true", help="print everything that is known, as JSON")
    plan = parser.add_argument_group("a model yet to be made, from its config.json alone")
    plan.add_argument("--bits", type=int, choices=range(2, 9), help="of the blocks' linears; default: not quantised")
    plan.add_argument("--group-size", type=int, help="inputs that share a scale, -1: the whole row; default 32")
    plan.add_argument("--pattern", help="keep:of, unstructured or dense")
    plan.add_argument("--embedding-bits", type=int, choices=MATRIX_BITS)
    plan.add_argument("--embedding-group", type=int, help="values of a row that share a scale; default 32")
    plan.add_argument("--dtype", choices=list(contents.DTYPES), help="of what isn't quantised; default BF16")
    return parser


if __name__ == "__main__":
    main()
