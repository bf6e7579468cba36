"""How a leak follows from a gradient: a factor, and a rest that rounding and noise explain or do not. Pure NumPy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

ROUNDING = 0.1  # of its norm, by which a gradient that was computed or kept in bfloat16 differs from one in float32
SURE = 5  # standard errors
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A leak as factor * own + rest, the factor by least squares.

    Attributes:
      factor: <own, leak> / ||own||^2.
      error: its standard error, from the noise that the leak is said to hold.
      cosine: of the two.
      off: || leak - own || / || own ||.
      off_scaled: || leak - factor * own || / || factor * own ||.
      noise: || noise || / || own ||, as it is expected.
      count: of coordinates.
    """

    factor: float
    error: float
    cosine: float
    off: float
    off_scaled: float
    noise: float
    count: int

    @property
    def is_own(self) -> bool:
        """Whether rounding and noise explain the difference."""
        near = abs(self.factor - 1) <= max(ROUNDING, SURE * self.error)
        return near and self.off <= ROUNDING + self._most(1.0) and not self.is_scaled

    @property
    def is_scaled(self) -> bool:
        """Whether it is a multiple of the own gradient, up to rounding and noise, and surely not 1 times it."""
        if abs(self.factor) <= SURE * self.error:
            return False
        most = self._most(abs(self.factor))
        rounding = math.sqrt(max(self.off_scaled**2 - most**2, 0.0))
        return self.off_scaled <= ROUNDING + most and abs(self.factor - 1) > max(0.01, SURE * self.error, rounding)

    def _most(self, factor: float) -> float:
        """The largest norm of noise that is to be expected, over that of factor * own."""
        return self.noise * (1 + SURE / math.sqrt(2 * self.count)) / factor

    @property
    def tells(self) -> bool:
        """Whether the noise leaves something to be seen of a gradient that is there."""
        return SURE * self.error < 0.9

    @property
    def sigma_over_norm(self) -> float:
        """What noise would be if the whole difference were noise, over the own norm."""
        return self.off / math.sqrt(self.count)


def fit(leak: Arrays, own: Arrays, sigma: float) -> Fit:
    """How a leak that is said to hold noise of `sigma` follows from a gradient that is not zero."""
    g, s = (np.concatenate([np.asarray(a[name], np.float64).ravel() for name in own]) for a in (own, leak))
    return _fit(float(g @ g), float(g @ s), float(s @ s), sigma, g.size)


def _fit(gg: float, gs: float, ss: float, sigma: float, count: int) -> Fit:
    norm, factor = math.sqrt(gg), gs / gg
    off = math.sqrt(max(ss - 2 * gs + gg, 0.0)) / norm
    rest = math.sqrt(max(ss - gs**2 / gg, 0.0)) / norm
    off_scaled = rest / abs(factor) if factor else math.inf
    cosine = gs / math.sqrt(gg * ss) if ss else 0.0
    return Fit(factor, sigma / norm, cosine, off, off_scaled, sigma * math.sqrt(count) / norm, count)


def norm_of(tree: Any) -> float:
    """L2, over all arrays."""
    return math.sqrt(sum(float(np.square(np.asarray(value, np.float64)).sum()) for value in tree.values()))
