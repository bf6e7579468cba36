"""What happens to a gradient before it leaves the client. sigma is a standard deviation in gradient units, per coordinate.

A mechanism is a callable pytree `leak = mechanism(key, gradient)`; its parameters are leaves, so a grid over them compiles
once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianNoise:
    """g + sigma n with n standard normal in every coordinate.

    The noise of a key does not depend on sigma, so leaks of one key at several sigmas share their random numbers. Without
    clipping the sensitivity is unbounded: no (epsilon, delta) follows from sigma alone.

    Attributes:
      sigma: standard deviation, >= 0, gradient units.
    """

    sigma: jax.Array | float

    def __call__(self, key: jax.Array, gradient: Any) -> Any:
        leaves, tree = jax.tree.flatten(gradient)
        keys = jax.random.split(key, len(leaves))
        noisy = [g + self.sigma * jax.random.normal(k, g.shape, g.dtype) for k, g in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, noisy)
