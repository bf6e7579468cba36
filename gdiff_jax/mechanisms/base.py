"""The contract of a mechanism, what the mechanisms share, and how they are joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.pytrees import pytree

T = TypeVar("T")
Gradient = Any  # a pytree of arrays


class Mechanism(Protocol):
    """A callable pytree `leak = mechanism(key, gradient)`, and pure.

    Its numbers are leaves, so a grid over them compiles once; what decides shapes is static. Every noise is given by its
    *standard deviation* sigma, in gradient units and per coordinate, so that Gaussian, Laplace and uniform noise of one sigma
    have equal variance.

    Attributes:
      differentiable: whether `simulate` is its derivative, or (False) a stand-in for one that is zero or random.
      keeps_pattern: whether zeros of its input, and no others that it did not mean, can be read off the leak. Behind a stage
        that fills or makes zeros at random `simulate` gets None for the leak.
    """

    @property
    def differentiable(self) -> bool: ...

    @property
    def keeps_pattern(self) -> bool: ...

    def __call__(self, key: jax.Array, gradient: Gradient) -> Gradient:
        """The leak of a gradient."""

    def norm_bound(self, norm: float, size: int) -> float:
        """A bound on the L2 norm of what it lets through of one example.

        Given a bound on the norm of the example's gradient (inf: none) and its number of coordinates. Before noise is added
        this is the L2 sensitivity of a sum over examples under add/remove adjacency.
        """

    def simulate(self, gradient: Gradient, leak: Gradient | None) -> Gradient:
        """What an attacker who knows the mechanism expects it to make of a candidate's gradient, given the leak.

        Deterministic, with a derivative: `GradientMatching` matches through it.
        """


def check_number(name: str, value: Any, *, above_zero: bool) -> None:
    """That a number is none that makes of a mechanism something else; arrays, which may be traced, are not looked at.

    Raises:
      ValueError: where it is nan, below zero, or zero where that is not allowed.
    """
    if not isinstance(value, int | float | np.number) or value > 0 or (value == 0 and not above_zero):
        return
    raise ValueError(f"{name} {value} must be {'above 0' if above_zero else '0 or more'}")


def stages_of(mechanism: Mechanism | None) -> tuple[Any, ...]:
    """What a mechanism does one after the other; a single one is its own only stage, and so is None."""
    return mechanism.stages if isinstance(mechanism, Chain) else (mechanism,)


def per_leaf(key: jax.Array, gradient: Gradient, change: Callable[[jax.Array, jax.Array], jax.Array]) -> Gradient:
    leaves, tree = jax.tree.flatten(gradient)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [change(k, g) for k, g in zip(keys, leaves, strict=True)])


def seen(gradient: Gradient, leak: Gradient) -> Gradient:
    """The coordinates that the leak shows; where it is zero nothing was sent."""
    return jax.tree.map(lambda g, s: jnp.where(s != 0, g, jnp.zeros_like(g)), gradient, leak)


@pytree
class Chain:
    """Several mechanisms, the first applied first: `Chain((Clip(1.0), GaussianNoise(sigma)))` is the Gaussian mechanism."""

    stages: tuple[Any, ...]

    @property
    def differentiable(self) -> bool:
        return all(stage.differentiable for stage in self.stages)

    @property
    def keeps_pattern(self) -> bool:
        return all(stage.keeps_pattern for stage in self.stages)

    def __call__(self, key: jax.Array, gradient: Gradient) -> Gradient:
        for i, stage in enumerate(self.stages):
            gradient = stage(jax.random.fold_in(key, i), gradient)
        return gradient

    def norm_bound(self, norm: float, size: int) -> float:
        for stage in self.stages:
            norm = stage.norm_bound(norm, size)
        return norm

    def simulate(self, gradient: Gradient, leak: Gradient | None) -> Gradient:
        for i, stage in enumerate(self.stages):
            readable = all(later.keeps_pattern for later in self.stages[i + 1 :])
            gradient = stage.simulate(gradient, leak if readable else None)
        return gradient
