"""Clipping, and what makes a gradient smaller to send: sparsification, signs, quantisation."""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from gdiff_jax.mechanisms.base import Gradient, check_number, per_leaf, seen
from gdiff_jax.pytrees import at_least_float32, pytree, static


@pytree
class Clip:
    """g min(1, C / ||g||), over all coordinates together (DP-SGD, Abadi et al. 2016, Alg. 1).

    Attributes:
      norm: C > 0, gradient units.
    """

    norm: jax.Array | float
    differentiable: ClassVar[bool] = True
    keeps_pattern: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("Clip: norm", self.norm, above_zero=True)

    def __call__(self, key: jax.Array, gradient: Gradient) -> Gradient:
        return self.simulate(gradient, None)

    def norm_bound(self, norm: float, size: int) -> float:
        return min(norm, float(self.norm))

    def simulate(self, gradient: Gradient, leak: Gradient | None) -> Gradient:
        squared = sum(jnp.vdot(g, g) for g in jax.tree.leaves(at_least_float32(gradient)))
        inside = squared <= jnp.square(self.norm)
        scale = jnp.where(inside, 1.0, self.norm / jnp.sqrt(jnp.where(inside, 1.0, squared)))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradient)


@pytree
class TopK:
    """Keeps the largest coordinates in absolute value, of all together, and sends zeros for the rest (Aji & Heafield 2017).

    The attacker sees which were kept and matches those: that the others were smaller is not used.

    Attributes:
      fraction: of the coordinates that are kept, in (0, 1]; at least one is. Equal ones on the edge are all kept.
    """

    fraction: float = static()
    differentiable: ClassVar[bool] = True
    keeps_pattern: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    def __call__(self, key: jax.Array, gradient: Gradient) -> Gradient:
        return self._largest(gradient)

    def _largest(self, gradient: Gradient) -> Gradient:
        sizes = jnp.sort(jnp.abs(ravel_pytree(gradient)[0]))
        kept = max(1, round(self.fraction * sizes.size))
        edge = sizes[sizes.size - kept]
        return jax.tree.map(lambda g: jnp.where(jnp.abs(g) >= edge, g, jnp.zeros_like(g)), gradient)

    def norm_bound(self, norm: float, size: int) -> float:
        return norm

    def simulate(self, gradient: Gradient, leak: Gradient | None) -> Gradient:
        return self._largest(gradient) if leak is None else seen(gradient, leak)


@pytree
class RandomSparsification:
    """Keeps each coordinate with probability `fraction`, divided by it, so that the mean is the gradient (Wangni et al. 2018).

    Attributes:
      fraction: in (0, 1].
    """

    fraction: float = static()
    differentiable: ClassVar[bool] = True
    keeps_pattern: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    def __call__(self, key: jax.Array, gradient: Gradient) -> Gradient:
        keep = lambda k, g: jnp.where(jax.random.bernoulli(k, self.fraction, g.shape), g / self.fraction, jnp.zeros_like(g))
        return per_leaf(key, gradient, keep)

    def norm_bound(self, norm: float, size: int) -> float:
        return norm / self.fraction

    def simulate(self, gradient: Gradient, leak: Gradient | None) -> Gradient:
        return gradient if leak is None else jax.tree.map(lambda g: g / self.fraction, seen(gradient, leak))


@pytree
class Sign:
    """The sign of every coordinate (signSGD, Bernstein et al. 2018); a coordinate that is exactly zero stays zero.

    Its derivative is zero, so the attacker's is a straight-through one: the candidate's signs are compared, and where they
    differ the gradient itself is pushed [inferred].
    """

    differentiable: ClassVar[bool] = False
    keeps_pattern: ClassVar[bool] = True

    def __call__(self, key: jax.Array, gradient: Gradient) -> Gradient:
        return jax.tree.map(jnp.sign, gradient)

    def norm_bound(self, norm: float, size: int) -> float:
        return math.sqrt(size)

    def simulate(self, gradient: Gradient, leak: Gradient | None) -> Gradient:
        return jax.tree.map(lambda g: g + jax.lax.stop_gradient(jnp.sign(g) - g), gradient)


@pytree
class StochasticQuantisation:
    """QSGD (Alistarh et al. 2017, section 3.1): ||g|| sign(g_i) l_i / s, l_i an integer in 0..s drawn so that the mean is g_i.

    A bucket, over which the norm is taken, is one array of the gradient. The attacker matches the mean, which is the gradient.

    Attributes:
      levels: s >= 1.
    """

    levels: int = static()
    differentiable: ClassVar[bool] = False
    keeps_pattern: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(f"levels {self.levels} must be at least 1")

    def __call__(self, key: jax.Array, gradient: Gradient) -> Gradient:
        def quantise(k: jax.Array, g: jax.Array) -> jax.Array:
            x = at_least_float32(g)
            norm = jnp.linalg.norm(x.ravel())
            place = jnp.abs(x) / jnp.where(norm > 0, norm, 1.0) * self.levels
            level = jnp.floor(place + jax.random.uniform(k, x.shape, x.dtype))
            return (norm * jnp.sign(x) * level / self.levels).astype(g.dtype)

        return per_leaf(key, gradient, quantise)

    def norm_bound(self, norm: float, size: int) -> float:
        return norm * (1 + math.sqrt(size) / self.levels)  # a coordinate moves by less than ||g|| / s

    def simulate(self, gradient: Gradient, leak: Gradient | None) -> Gradient:
        return gradient


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} of coordinates to keep must lie in (0, 1]")
