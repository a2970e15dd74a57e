"""Whether what a stage takes away is worth it so far: told when the stage ends, not hours later by the report.

Right after a stage that removes weights, or that recovers what it cost, two models are quantised quickly (GPTQ without
search and descent, on a few calibration windows, nothing is written): the stage's, under its masks with the bits of
`gptq`, and the one before all pruning with as many bits as give as many bytes. Perplexity on these windows says where
pruning stands against plain quantisation. What is still to come may change it: recovery, and the package's own figures
are the report's.

It is advice: no artifact depends on it, so no stage's list of code has it (`tasks.runtime.execution` imports it by
name), and its figures are in the stage's lineage record. Of small models, whose DAG takes minutes, it says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tasks.algorithms.model import head
from tasks.algorithms.model.shape import shape_of_config
from tasks.algorithms.quantisation import gptq_walk, masked_gptq, packable
from tasks.compression import block_quantisation
from tasks.models import dense_folder, mask_files, model_files, streamed_folder
from tasks.parameters import rules

if TYPE_CHECKING:
    from tasks.parameters.schema import Gptq
    from tasks.runtime.stage import Stage

PLAIN = Path("data/vocabulary/model")
"""The model before anything is pruned."""
CALIBRATION = Path("data/calibrate/windows.safetensors")
WINDOWS = 8
"""Of the calibration windows: the first ones."""


class Standing(NamedTuple):
    """Perplexities on calibration windows of a stage's model and of the plain one in as many bytes, once quantised."""

    own: float
    plain: float
    bits: float
    """Bits per weight of the plain one."""


def tell(stage: Stage) -> None:
    """Print where the stage's model stands, and note it in the stage's record; of small models nothing.

    Args:
        stage: depth_prune, wanda or lora, with its outputs written.
    """
    chosen, device = stage.everything.gptq, stage.everything.device
    if not (chosen.enabled and CALIBRATION.is_file() and (PLAIN / model_files.CONFIG).is_file()):
        return
    plain = dense_folder.config(PLAIN)
    if shape_of_config(plain).hidden <= rules.SMALL:
        return
    ours = stage.output("model")
    masks = {"wanda": stage.output, "lora": stage.input}.get(stage.name)
    keep, pattern = mask_files.load_masks(masks("masks.safetensors")) if masks else ({}, "dense")
    if not keep and shape_of_config(dense_folder.config(ours)).layers == shape_of_config(plain).layers:
        return  # nothing is pruned
    windows = load_file(CALIBRATION)["input_ids"][:WINDOWS]
    found = compare(ours, PLAIN, keep, pattern, chosen, windows, device)
    stage.note(standing=found._asdict())
    print(sentence(found, chosen.bits))


def sentence(found: Standing, bits: int) -> str:
    """What the figures say."""
    text = (
        f"quantised to {bits} bits now, its perplexity would be {found.own:.4g} on {WINDOWS} calibration windows; of"
        f" the model with nothing pruned, in as many bytes ({found.bits:.2f} bits per weight), {found.plain:.4g}"
    )
    if found.own <= found.plain:
        return f"{text}: pruning is worth it so far"
    factor = f"{found.own / found.plain:.3g}"
    return f"warning: {text}: pruning loses so far, and what follows has to win back a factor of {factor}"


def compare(
    ours: Path, plain: Path, keep: Mapping[str, Tensor], pattern: str, chosen: Gptq, windows: Tensor, device: str
) -> Standing:
    """Quantise both and measure.

    Args:
        ours, plain: dense folders.
        keep, pattern: masks of `ours`.
        windows: [windows, length].
    """
    model = streamed_folder.open_dense(ours, device)
    shapes = block_quantisation.shapes(model)
    sizes = block_quantisation.choices({}, shapes, keep, pattern, chosen).sizes
    budget = sum(each[chosen.bits] for each in sizes.values())
    own = perplexity(model, keep, dict.fromkeys(shapes, chosen.bits), chosen, windows, device)
    model = streamed_folder.open_dense(plain, device)
    shapes = block_quantisation.shapes(model)
    widths = plain_widths(shapes, budget, chosen)
    weights = {name: rows * columns for name, (rows, columns) in shapes.items()}
    bits = sum(widths[name] * count for name, count in weights.items()) / sum(weights.values())
    return Standing(own, perplexity(model, {}, widths, chosen, windows, device), bits)


def plain_widths(shapes: Mapping[str, tuple[int, int]], budget: int, chosen: Gptq) -> dict[str, int]:
    """Bits per linear that take about `budget` bytes: two neighbouring widths, the wider one evenly spread.

    Args:
        shapes: full module name -> (out_features, in_features), nothing pruned.
        budget: bytes of all linears when packed; the narrowest width is taken where even that one takes more.
    """
    sizes = block_quantisation.choices({}, shapes, {}, "dense", chosen).sizes
    totals = {bits: sum(each[bits] for each in sizes.values()) for bits in packable.WIDTHS}
    narrow = max((bits for bits in packable.WIDTHS if totals[bits] <= budget), default=min(packable.WIDTHS))
    wide = min((bits for bits in packable.WIDTHS if bits > narrow), default=narrow)
    share = max(0.0, (budget - totals[narrow]) / (totals[wide] - totals[narrow])) if wide > narrow else 0.0
    found, spent = {}, 0.0
    for name in shapes:
        spent += share
        found[name] = wide if spent >= 1 else narrow
        spent -= spent >= 1
    return found


def perplexity(
    model: nn.Module,
    keep: Mapping[str, Tensor],
    widths: Mapping[str, int],
    chosen: Gptq,
    windows: Tensor,
    device: str,
) -> float:
    """Perplexity on the windows of a dense model when it is quantised quickly, calibrated on the same windows."""
    quick = chosen.model_copy(update={"mse": 0.0})
    config = block_quantisation.settings(quick, widths, device)
    led = masked_gptq.Settings(chosen.scale_steps)
    hidden = gptq_walk.quantise(model, windows, keep, config, lambda *_: None, led)  # [windows, length, hidden]
    ids = windows.long().to(hidden.device)
    pairs = zip(hidden.split(1), ids.split(1), strict=True)
    # -log p(x_t | x_<t): the logits at t - 1 predict the token at t, those of a window's last one nothing that is known
    nats = [head.nats_after(model, states, given.roll(-1, dims=1))[:, :-1] for states, given in pairs]
    return math.exp(torch.cat(nats).double().mean())
