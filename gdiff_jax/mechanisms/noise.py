"""Noise of one standard deviation and three shapes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gdiff_jax.mechanisms.base import Gradient, Mechanism, check_number, per_leaf, stages_of
from gdiff_jax.pytrees import pytree


@dataclasses.dataclass(frozen=True)
class _Noise:
    """Independent zero-mean noise of standard deviation sigma. A candidate's gradient is expected to come through unchanged."""

    sigma: jax.Array | float
    differentiable: ClassVar[bool] = True
    keeps_pattern: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number(f"{type(self).__name__}: sigma", self.sigma, above_zero=False)

    def norm_bound(self, norm: float, size: int) -> float:
        return norm  # of the example's part: the noise does not depend on it

    def simulate(self, gradient: Gradient, leak: Gradient | None) -> Gradient:
        return gradient


@pytree
class GaussianNoise(_Noise):
    """g + sigma n with n standard normal in every coordinate.

    The noise of a key does not depend on sigma, so leaks of one key at several sigmas share their random numbers. Without
    clipping the sensitivity is unbounded: no (epsilon, delta) follows from sigma alone.

    Attributes:
      sigma: standard deviation, >= 0, gradient units.
    """

    def __call__(self, key: jax.Array, gradient: Gradient) -> Gradient:
        return per_leaf(key, gradient, lambda k, g: g + self.sigma * jax.random.normal(k, g.shape, g.dtype))


@pytree
class LaplaceNoise(_Noise):
    """g + n with n Laplace in every coordinate, of scale b = sigma / sqrt(2). For pure epsilon-DP the L1 sensitivity counts.

    Attributes:
      sigma: standard deviation, >= 0, gradient units.
    """

    @classmethod
    def from_scale(cls, scale: float) -> LaplaceNoise:
        """With density exp(-|n| / scale) / (2 scale)."""
        return cls(math.sqrt(2) * scale)

    def __call__(self, key: jax.Array, gradient: Gradient) -> Gradient:
        unit = lambda k, g: jax.random.laplace(k, g.shape, g.dtype) / math.sqrt(2)
        return per_leaf(key, gradient, lambda k, g: g + self.sigma * unit(k, g))


@pytree
class UniformNoise(_Noise):
    """g + n with n uniform in [-a, a] in every coordinate, a = sqrt(3) sigma. It gives no differential privacy.

    Attributes:
      sigma: standard deviation, >= 0, gradient units.
    """

    @classmethod
    def from_half_width(cls, half_width: float) -> UniformNoise:
        """Uniform in [-half_width, half_width]."""
        return cls(half_width / math.sqrt(3))

    def __call__(self, key: jax.Array, gradient: Gradient) -> Gradient:
        unit = lambda k, g: jax.random.uniform(k, g.shape, g.dtype, -math.sqrt(3), math.sqrt(3))
        return per_leaf(key, gradient, lambda k, g: g + self.sigma * unit(k, g))


def noise_of(mechanism: Mechanism | None, otherwise: Any) -> Any:
    """Standard deviation of the noise that a mechanism's own stages add; `otherwise` where none of them is a `_Noise`."""
    sigmas = [stage.sigma for stage in stages_of(mechanism) if isinstance(stage, _Noise)]
    return otherwise if not sigmas else sigmas[0] if len(sigmas) == 1 else jnp.sqrt(sum(jnp.square(s) for s in sigmas))
