"""Stage baseline: what plain quantisation makes of as many bytes as the package has.

The fetched model after the same recovery, nothing pruned, is quantised by GPTQ with the parameters of `gptq`, but with
bits per linear chosen by what stage sensitivity measured, so that its packed file is as large as it can be without
being larger than the package's. Embedding, scales and file format are treated alike, and where the package's codes are
trained (`qad`), so are these; there is no low-rank branch. A package that scores worse than this
model is not worth its pruning, and the report says so.

Sizes are planned and then measured. The plan counts the scales that rounding to the nearest has, and is right to a few
bytes; where the package is entropy coded, so is this model, and the plan counts the coded bytes of such codes. Where
the file came out larger than the limit all the same, or much smaller, the budget is moved by the difference and the
model quantised again. Where even the narrowest widths are larger than the package, they are taken,
and the report names both sizes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from safetensors.torch import load_file

from tasks.algorithms.model import checkpoints
from tasks.algorithms.model.shape import shape_of_config
from tasks.compression import block_quantisation, coded_sizes, linear_quantisation
from tasks.models import dense_folder, model_files, streamed_folder, tokenizer_archive
from tasks.models.tokenizer_files import copy_tokenizer
from tasks.packed import source_folder, writer
from tasks.packed.description import DESCRIPTION, FILE
from tasks.packed.packed_folder import is_packed
from tasks.packed.plan import Plan, planned, planned_bytes
from tasks.runtime import files

if TYPE_CHECKING:
    from torch import nn

    from tasks.algorithms.quantisation import rounding
    from tasks.runtime.stage import Stage

COLUMNS = ["linear", "weights", "bits", "bytes", "sensitivity"]
"""bytes: of the packed linear, entropy coded those of rounding to the nearest; sensitivity: divergence of the model's
predictions in nats per token with this linear alone rounded to the nearest."""
PLANS = 4
"""How often widths are planned before the model is quantised."""
SPARE = 2
"""So many more scales than rounding to the nearest has are planned for: GPTQ's weights reach a little further."""
ROUNDS = 6
"""How often the model is quantised, at most, until its size is near the limit."""
NEAR = 0.005
"""Share of the limit that may stay unused."""
SPREAD = 0.005
"""Share of the limit by which training its codes makes an entropy-coded file longer, a little more than the built-in's
0.0036: training is what takes long, and a file that comes out a little too long is trained again."""


def run(stage: Stage) -> None:
    """Write baseline/model (a packed folder) and bits.csv.

    Raises:
        InputError: the package isn't packed.
    """
    chosen = stage.params.gptq
    if not chosen.enabled:
        return skip(stage)
    dense, target = stage.model_in, stage.output("model")
    limit = shipped_bytes(stage.input("package/model"))
    coded = source_folder.read_codes(stage.input("sensitivity/embedding.safetensors"))
    start = streamed_folder.open_dense(dense, stage.params.device)
    block_quantisation.place(start, coded)
    harm = block_quantisation.read_harm(stage.input("sensitivity/sensitivity.csv"))
    choices = block_quantisation.choices(harm, block_quantisation.shapes(start), {}, "dense", chosen)
    if stage.params.package.coding == "entropy":
        choices = choices._replace(sizes=coded_sizes.of_linears(start, chosen, stage.params.device))
        widths = plan_coded(stage, choices, coded, limit - expected_growth(stage, limit))
    else:
        widths = plan(stage, choices, start, coded, limit)
    del start
    widths = fit(stage, choices, coded, limit, widths)
    copy_tokenizer(dense, target)
    if stage.params.package.coding == "entropy":
        tokenizer_archive.pack(target)
    files.write_csv(stage.output("bits.csv"), table(dense_folder.config(dense), choices, widths), "%.9g")
    found = shipped_bytes(target)
    mean = sum(widths.values()) / len(widths)
    print(f"{found} bytes ({limit} in the package), {mean:.2f} bits per linear on average")


def skip(stage: Stage) -> None:
    """Pass the dense model on; bits.csv has no rows."""
    stage.pass_on(stage.model_in, stage.output("model"))
    files.write_csv(stage.output("bits.csv"), pd.DataFrame(columns=COLUMNS))


def shipped_bytes(folder: Path) -> int:
    """Bytes of the files that hold a packed model, without tokenizer and manifest; of another folder, of its tensors.

    Raises:
        InputError: the folder holds neither.
    """
    paths = [folder / FILE, folder / DESCRIPTION] if is_packed(folder) else model_files.tensors(folder)
    return sum(path.stat().st_size for path in paths)


def plan(
    stage: Stage,
    choices: block_quantisation.Choices,
    model: nn.Module,
    coded: Mapping[str, rounding.Coded],
    limit: int,
) -> dict[str, int]:
    """Choose bits per linear whose model is planned to take at most `limit` bytes.

    Args:
        model: dense, whose linears will be quantised.
        coded: embedding (and head), as quantised.
        limit: bytes of model.safetensors and model.json.
    """
    widths, distinct = _narrowest(choices), 2**block_quantisation.SNAPPED_BITS
    around = planned_around(stage, choices, widths, distinct)
    for number in range(PLANS):
        widths = choices.within(max(_total(choices, _narrowest(choices)), limit - around))
        if number == 0:  # a width more or less hardly changes which scales there are: counted once
            counted = block_quantisation.distinct_scales(model, widths, coded, stage.params.gptq, stage.params.device)
            distinct, around = None if counted is None else counted + SPARE, 0
        # model.json is longer where widths differ: the longest so far is planned for
        around = max(around, planned_around(stage, choices, widths, distinct))
    return widths


def plan_coded(
    stage: Stage, choices: block_quantisation.Choices, coded: Mapping[str, rounding.Coded], limit: int
) -> dict[str, int]:
    """The same where the file is entropy coded, and `choices` counts such bytes."""
    around, tables = 0, sum(coded_sizes.of_table(each, stage.params.gptq) for each in coded.values())
    least = _narrowest(choices)
    widths = least
    for _ in range(PLANS):
        sizes = planned(dense_folder.config(stage.input("baseline_lora/model")), _stored(stage, widths, None)).sizes
        around = max(around, sizes["metadata"] + sizes["norms"] + (tables if coded else sizes["embedding"]))
        widths = choices.within(max(_total(choices, least), limit - around))
    return widths


class _Aim:
    """What a file is to be like.

    Attributes:
        limit: bytes that it may take.
        growth: bytes by which training its codes made one longer: coded ones, as they are spread further.
        trained: widths of the models whose codes were trained.
    """

    def __init__(self, limit: int, growth: int) -> None:
        self.limit, self.growth = limit, growth
        self.trained: list[Mapping[str, int]] = []

    def near(self, size: int, widths: Mapping[str, int]) -> bool:
        """Whether a model of these widths may stay as it is."""
        unused = NEAR + (SPREAD if widths in self.trained else 0.0)
        return 0 <= self.limit - size <= unused * self.limit


def expected_growth(stage: Stage, limit: int) -> int:
    """Bytes by which training its codes will make the file longer, about."""
    coded = stage.params.qad.enabled and stage.params.package.coding == "entropy"
    return round(SPREAD * limit) if coded else 0


def fit(
    stage: Stage,
    choices: block_quantisation.Choices,
    coded: Mapping[str, rounding.Coded],
    limit: int,
    widths: dict[str, int],
) -> dict[str, int]:
    """Quantise and pack into baseline/model so that it takes at most `limit` bytes, and hardly less; bits per linear.

    Args:
        coded: embedding (and head), as quantised.
        limit: bytes of model.safetensors and model.json.
        widths: the bits to begin with.
    """
    aim, least = _Aim(limit, expected_growth(stage, limit)), _total(choices, _narrowest(choices))
    found: dict[int, dict[str, int]] = {}  # bytes -> widths
    written = None
    while len(found) < ROUNDS:
        size, anew = _round(stage, len(found), widths, coded, aim)
        found[size], written = widths, widths if anew else None
        if aim.near(size, widths):
            break
        widths = choices.within(max(least, _total(choices, widths) + limit - size))
        if widths in found.values():
            break
    fitting = [size for size in found if size <= limit]
    best = found[max(fitting)] if fitting else choices.within(least)
    if best != written or (stage.params.qad.enabled and best not in aim.trained):
        quantise(stage, best, coded, stage.journal.part("final"))
    return best


def _round(
    stage: Stage, number: int, widths: Mapping[str, int], coded: Mapping[str, rounding.Coded], aim: _Aim
) -> tuple[int, bool]:
    """Bytes of the model with these widths, and whether it is in baseline/model: False where the journal had them."""
    saved = stage.journal.part(f"round{number}")
    if before := saved.load("bytes"):
        size, aim.growth, trained = before.values
        if trained:
            aim.trained.append(widths)
        return size, False
    work = saved.part("work")
    size = quantise(stage, widths, coded, work, aim)
    saved.save("bytes", {}, [size, aim.growth, widths in aim.trained])
    work.forget()
    return size, True


def planned_around(
    stage: Stage, choices: block_quantisation.Choices, widths: Mapping[str, int], distinct: int | None
) -> int:
    """Bytes of a packed model with these widths beyond what `choices` counts: embedding, norms, description, scales.

    Args:
        distinct: how many scales differ; None where all are stored as they are.
    """
    stored = _stored(stage, widths, distinct)
    return planned_bytes(dense_folder.config(stage.input("baseline_lora/model")), stored) - _total(choices, widths)


def _stored(stage: Stage, widths: Mapping[str, int], distinct: int | None) -> Plan:
    chosen = stage.params.gptq
    return Plan(
        bits=widths,
        group_size=chosen.group_size,
        embedding_bits=chosen.embedding.bits,
        embedding_group=chosen.embedding.group_size,
        zeros=not chosen.symmetric,
        order=chosen.act_order == "descending",
        distinct_scales=distinct if chosen.scale_steps else None,
    )


def quantise(
    stage: Stage,
    widths: Mapping[str, int],
    coded: Mapping[str, rounding.Coded],
    saved: checkpoints.Saved = checkpoints.NOTHING,
    aim: _Aim | None = None,
) -> int:
    """Quantise the dense model with these widths and pack it into baseline/model; bytes of what holds the model.

    Where the package's codes are trained, these are, if the file will be what it is to be.

    Args:
        aim: None: the model stays, whatever it takes.
    """
    dense, target, coding = stage.model_in, stage.output("model"), stage.params.package.coding
    windows = load_file(stage.input("windows.safetensors"))["input_ids"]
    model = streamed_folder.open_dense(dense, stage.params.device)
    block_quantisation.place(model, coded)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder, codes = Path(scratch) / "model", Path(scratch) / "embedding.safetensors"
        linear_quantisation.quantise_linears(stage, model, windows, {}, widths, folder, saved.part("linears"))
        del model
        block_quantisation.save_embedding(codes, coded, stage.params.gptq)
        writer.save(source_folder.read(folder, embedding=codes), target, coding)
        size = shipped_bytes(target)
        if not stage.params.qad.enabled:
            return size
        if aim and not aim.near(size + aim.growth, widths):
            return size + aim.growth
        from tasks.compression import qad_training  # here, as it imports PEFT

        trained, layers = Path(scratch) / "trained", shape_of_config(dense_folder.config(dense)).layers
        qad_training.distil(stage, folder, trained, dense, range(layers), saved=saved.part("qad"))
        writer.save(source_folder.read(trained, embedding=codes), target, coding)
        if aim:
            aim.growth = shipped_bytes(target) - size
            aim.trained.append(widths)
            print(f"{shipped_bytes(target)} bytes of at most {aim.limit}, {aim.growth:+} by training its codes")
        return shipped_bytes(target)


def table(described: Mapping, choices: block_quantisation.Choices, widths: Mapping[str, int]) -> pd.DataFrame:
    """One row per linear, in running order, with `COLUMNS`; `described` is the model's config.json."""
    shapes = shape_of_config(described).linears
    rows = []
    for name, bits in widths.items():
        rows_, columns = next(shape for short, shape in shapes.items() if name.endswith(f".{short}"))
        rows.append((name, rows_ * columns, bits, choices.sizes[name][bits], choices.harm[name][bits]))
    return pd.DataFrame(rows, columns=COLUMNS)


def _narrowest(choices: block_quantisation.Choices) -> dict[str, int]:
    return {name: min(sizes, key=sizes.__getitem__) for name, sizes in choices.sizes.items()}


def _total(choices: block_quantisation.Choices, widths: Mapping[str, int]) -> int:
    return sum(choices.sizes[name][bits] for name, bits in widths.items())
