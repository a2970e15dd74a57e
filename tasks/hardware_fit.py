"""Stage hardware_fit: the packaged model against the device profiles of data/devices.

What counts are bytes in a device's memory, which follow from the model's matrices and the formats that the device takes
(tasks.algorithms.device_fit.footprint), and all files beside the tensors (tokenizer, configs, manifest). The fetched
model is judged beside it as if stored in bf16, which is what compression has to beat. "Does not fit" is a result. It
loads no weights. The same verdict without the DAG, for any folder: `edgepress fit`.
"""

from __future__ import annotations

import csv
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tasks.algorithms.device_fit import footprint
from tasks.algorithms.device_fit.verdict import Fit, judge
from tasks.algorithms.errors import InputError
from tasks.device_profiles import contents, profiles, tables
from tasks.runtime import files

if TYPE_CHECKING:
    from tasks.runtime.stage import Stage


def run(stage: Stage) -> None:
    """Judge the packaged (and the fetched) model on every device; the chosen one's verdict is the result."""
    params = stage.params.hardware_fit
    if params.device == profiles.HOST:
        raise InputError(
            f"hardware_fit.device = {profiles.HOST} is this machine, and the DAG's results are the same on all: name a "
            "profile of data/devices, or run edgepress fit --device host"
        )
    known = profiles.load_all(stage.input("devices"))
    chosen = profiles.pick(known, params.device)
    workload = footprint.Workload(params.context, params.batch, params.kv_bits, params.activation_bits)
    model = contents.read(stage.model_in)
    found = {name: judge(profile.device(), model, workload) for name, profile in known.items()}
    fetched: dict[str, Fit] = {}
    if stage.has_input("fetch/model"):
        base = contents.read(stage.input("fetch/model"))
        dense = footprint.in_bf16(base)
        fetched = {name: judge(profile.device(), dense, workload) for name, profile in known.items()}
    result = {"device": chosen.name, **asdict(found[chosen.name])}
    if fetched:
        result["fetched"] = {"device": chosen.name, **asdict(fetched[chosen.name]), "stored_bytes": base.stored}
    result |= {
        "all_devices": [_row(name, one, fetched.get(name)) for name, one in found.items()],
        "description": chosen.description,
        "safety_margin": chosen.safety_margin.value,
        "sources": chosen.sources(),
        "stored_bytes": model.stored,
        "workload": asdict(workload),
    }
    files.write_json(stage.output("fit.json"), result)
    rows = [tables.row(name, one, fetched[name].verdict if fetched else "") for name, one in found.items()]
    _write(stage, rows)
    base_line = f"fetched model in bf16: {fetched[chosen.name].verdict}" if fetched else "fetched model: not compared"
    others = [f"{row['device']}: {row['verdict']}, {row['total_bytes']:,} bytes in all" for row in rows]
    print("\n".join([*tables.summary(chosen.name, found[chosen.name], workload), base_line, *others]))


def skip(stage: Stage) -> None:
    """Nothing was checked."""
    result = {"verdict": "NOT_CHECKED"}
    files.write_json(stage.output("fit.json"), result)
    _write(stage, [])


def _write(stage: Stage, rows: list[dict[str, Any]]) -> None:
    """devices.csv: a row per device."""
    with stage.output("devices.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, tables.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _row(name: str, result: Fit, fetched: Fit | None) -> dict[str, Any]:
    row = {"device": name, **{key: value for key, value in asdict(result).items() if key != "placement"}}
    return row | ({"fetched_verdict": fetched.verdict} if fetched else {})
