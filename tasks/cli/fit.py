"""`edgepress fit`: whether a model fits a device, without the DAG, and what would make it fit. No weights are read.

    edgepress fit --model DIR --device raspberry-pi-5       one device; the exit code is the verdict
    edgepress fit --model DIR                               a table of all
    edgepress fit --model CONFIG.json --bits 4 --group-size 128 --embedding-bits 4     a model yet to be made

DIR is packed, quantised by gptqmodel or dense; with an option of planning its config.json alone counts. The profiles
are those of data/devices; `--device host` is this machine, once `edgepress profile` has measured it.

Exit codes: 0 FITS, 1 FITS_STREAMING, 2 DOES_NOT_FIT, 3 refused or a wrong call; of the table of all devices 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.algorithms.errors import InputError
from tasks.cli import console, exit_codes

if TYPE_CHECKING:
    from rich.table import Table

    from tasks.algorithms.device_fit.footprint import Model, Workload
    from tasks.algorithms.device_fit.verdict import Fit
    from tasks.device_profiles import profiles

PROFILES = Path(__file__).resolve().parents[2] / "data" / "devices"
CONTEXT = 2048
"""Tokens in the KV cache unless said otherwise, where the model has as many positions."""
PLAN = ("bits", "group_size", "pattern", "embedding_bits", "embedding_group", "dtype")
"""Options of a model yet to be made, as `tasks.packed.plan.Plan` names them."""
MATRIX_BITS, DTYPES = (4, 8, 16), ("F32", "F16", "BF16")
"""What `contents` knows, written again, as importing it takes seconds, which --help needn't; a test compares them."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--model", type=Path, required=True, help="a model folder, or a config.json")
    parser.add_argument("--device", help="a profile's name, or host; default: a table of all")
    parser.add_argument("--profiles", type=Path, default=PROFILES, help="folder of device profiles")
    parser.add_argument("--context", type=int, help=f"tokens in the KV cache; default {CONTEXT}, or what the model has")
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
    plan.add_argument("--dtype", choices=DTYPES, help="of what isn't quantised; default BF16")


def main(given: argparse.Namespace) -> int:
    """Judge, print, and end with the verdict's code where one device was asked for."""
    from tasks.algorithms.device_fit import verdict
    from tasks.algorithms.device_fit.footprint import Workload
    from tasks.device_profiles import tables

    model = _model(given)
    context = min(CONTEXT, model.shape.context or CONTEXT) if given.context is None else given.context
    workload = Workload(context, given.batch, given.kv_bits, given.activation_bits)
    fits = {name: verdict.judge(profile.device(), model, workload) for name, profile in _chosen(given).items()}
    if given.json:
        console.show_json(_plain(fits, model, workload, given.device))
    elif given.device:
        console.show(_stored(model), *tables.summary(given.device, fits[given.device], workload))
    else:
        console.show(_stored(model), *_shown([tables.row(name, fit) for name, fit in fits.items()]))
    return exit_codes.FIT[fits[given.device].verdict] if given.device else exit_codes.DONE


def _shown(rows: list[dict[str, Any]]) -> Iterable[Table | str]:
    """All devices, one a line; then what would make it fit those that it doesn't."""
    columns = ("device", "verdict", "weights", "total", "over", "free", "tokens/s", "limited by")
    counted = ("weights_bytes", "total_bytes", "bytes_over", "headroom_bytes")
    yield console.table(
        columns,
        [
            [row["device"], row["verdict"]]
            + [f"{row[name]:,}" for name in counted]
            + [f"{row['tokens_per_second_bound']:,.1f}", row["limited_by"]]
            for row in rows
        ],
        left=("verdict", "limited by"),
    )
    for row in rows:
        if row["ways_to_fit"]:
            yield f"{row['device']} would fit with: {row['ways_to_fit'].replace('; ', ', or ')}"


def _plain(fits: Mapping[str, Fit], model: Model, workload: Workload, device: str | None) -> dict[str, Any]:
    """As fit.json: one device's verdict, or the rows of all."""
    about = {"workload": asdict(workload), "stored_bytes": model.stored}
    if device:
        return {"device": device, **asdict(fits[device]), **about}
    return {"devices": [{"device": name, **asdict(fit)} for name, fit in fits.items()], **about}


def _stored(model: Model) -> str:
    parameters = sum(m.rows * m.cols for m in model.matrices() if m.component != "adapter")
    return f"{model.stored:,} bytes {'in its files' if model.metadata else 'when packed'}, {parameters:,} weights"


def _chosen(given: argparse.Namespace) -> dict[str, profiles.Profile]:
    from tasks.device_profiles import profiles

    if given.device is None:
        return profiles.load_all(given.profiles)
    if given.device == profiles.HOST:
        return {profiles.HOST: profiles.load_host(given.profiles)}
    return {given.device: profiles.pick(profiles.load_all(given.profiles), given.device)}


def _model(given: argparse.Namespace) -> Model:
    """The model of the folder, or the planned one.

    Raises:
        InputError: a number that is none; as `contents` says.
    """
    from tasks.device_profiles import contents
    from tasks.device_profiles.planned_contents import planned
    from tasks.models import model_files
    from tasks.packed.plan import Plan

    for name in ("context", "batch"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} is not positive: expected the number of tokens or sequences, from 1 on")
    plan = {name: getattr(given, name) for name in PLAN if getattr(given, name) is not None}
    if plan or given.model.is_file():
        return planned(contents.config_of(given.model), Plan(**({"bits": None, "dtype": "BF16"} | plan)))
    without_weights = given.model.is_dir() and not model_files.weights(given.model)
    if without_weights and (given.model / contents.CONFIG).exists():
        raise InputError(
            f"{given.model} holds no {model_files.SINGLE} and no index of shards; to plan a model from its config.json"
            " say how: --bits 4, or --dtype BF16"
        )
    return contents.read(given.model)
