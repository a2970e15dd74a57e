"""Amounts of work of several kinds, and the seconds that they take at a machine's speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What has to be done; amounts add up.

    Attributes:
        products, doubles: floating-point operations of matrix products, in float32 and float64.
        spectra: cubes of the sides of matrices whose eigenvalues and vectors are computed.
        bytes: read and written by what computes little.
        exps: values that go through an exponential function, a power or the like.
        calls: of PyTorch on a few values, and what Python does meanwhile.
        starts: imports of PyTorch.
    """

    products: float = 0.0
    doubles: float = 0.0
    spectra: float = 0.0
    bytes: float = 0.0
    exps: float = 0.0
    calls: float = 0.0
    starts: float = 0.0

    def __add__(self, other: Work) -> Work:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Work(*(one + more for one, more in zip(mine, theirs, strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(amount * times for amount in dataclasses.astuple(self)))

    __rmul__ = __mul__

    def seconds(self, speed: Mapping[str, float]) -> float:
        """How long it takes where a second brings so much of each kind."""
        return sum(amount / speed[name] for name, amount in dataclasses.asdict(self).items())
