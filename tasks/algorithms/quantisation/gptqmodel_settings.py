"""gptqmodel's settings, for whatever quantises or rounds by its grid."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tasks.algorithms.errors import InputError
from tasks.algorithms.quantisation import gptqmodel_library as library


def config(
    bits: int | Mapping[str, int],
    group_size: int,
    symmetric: bool,
    damp: float,
    act_order: str,
    mse: float = 0.0,
    device: str = "cpu",
) -> Any:
    """Make gptqmodel's QuantizeConfig, with everything off that would make a result depend on more than these.

    Args:
        bits: 2, 3, 4 or 8; or full module name -> bits, of all linears.
        group_size: inputs that share a scale; -1 is the whole row.
        symmetric: zero is the middle code; else each group has its own integer zero point (zero is exact in both).
        damp: share of the Hessian's mean diagonal added to it.
        act_order: which columns are quantised first: "none", the leftmost; "descending", those with the largest
            Hessian diagonal, which adds an index per input to the file; "group_aware", the same, but groups stay
            together (Gafni et al., arXiv 2505.14638), which adds nothing.
        mse: norm of the error that a grid search of each scale minimises; 0 takes the range.
        device: on which gptqmodel computes, "cpu" or "cuda"; the last bits of a result depend on it.

    Raises:
        InputError: "group_aware" without groups.
    """
    if act_order == "group_aware" and group_size == -1:
        raise InputError("gptq.act_order = group_aware orders groups, and gptq.group_size = -1 has one: choose another")
    dynamic = None
    if isinstance(bits, Mapping):
        widths, bits = bits, _most_common(bits.values())
        dynamic = {f"+:^{re.escape(name)}$": {"bits": width} for name, width in widths.items() if width != bits}
    return library.gptqmodel.QuantizeConfig(
        bits=bits,
        dynamic=dynamic or None,
        group_size=group_size,
        sym=symmetric,
        desc_act=act_order == "descending",
        act_group_aware=act_order == "group_aware",  # None would be on
        damp_percent=damp,
        mse=mse,
        device=device,
        offload_to_disk=False,
        fallback=None,  # the default answers NaN or few samples with round-to-nearest, silently
        pack_impl="original",  # the default compiles a C++ extension into ~/.cache at first use
    )


def _most_common(widths: Iterable[int]) -> int:
    """Find the most common width; of equally common ones the smallest."""
    counts = Counter(widths)
    return min(counts, key=lambda bits: (-counts[bits], bits))
