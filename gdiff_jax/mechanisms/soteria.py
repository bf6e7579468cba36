"""Soteria: pruning of the representation that a dense layer sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from gdiff_jax.mechanisms.base import Gradient, seen
from gdiff_jax.pytrees import pytree, static


@pytree
class PruneRepresentation:
    """Zeroes the rows of a dense layer's kernel gradient that belong to pruned features of its input (after Soteria).

    Attributes:
      kept: (features,) 1 for a kept and 0 for a pruned feature, of `soteria_mask`.
      kernel: key of the kernel (features, outputs) in the gradient, which is a dict.
    """

    kept: jax.Array
    kernel: str = static()
    differentiable: ClassVar[bool] = True
    keeps_pattern: ClassVar[bool] = True

    def __call__(self, key: jax.Array, gradient: dict[str, jax.Array]) -> dict[str, jax.Array]:
        kernel = gradient[self.kernel]
        return {**gradient, self.kernel: kernel * self.kept.astype(kernel.dtype)[:, None]}

    def norm_bound(self, norm: float, size: int) -> float:
        return norm

    def simulate(self, gradient: Gradient, leak: Gradient | None) -> Gradient:
        if leak is None:
            return gradient
        return {**gradient, self.kernel: seen(gradient[self.kernel], leak[self.kernel])}


def soteria_mask(
    key: jax.Array, features: Callable[[jax.Array], jax.Array], x: jax.Array, fraction: float, probes: int = 64
) -> jax.Array:
    """Which features Soteria (Sun et al., CVPR 2021) keeps for an image: pruned are those of largest |r_i| / ||dr_i/dx||.

    A large score marks a feature that tells much of the image while changing it costs the prediction little. The norms of
    the rows of dr/dx come from `probes` forward derivatives in random directions (about 1 / sqrt(2 probes) off each)
    where Soteria takes one backward pass a feature [inferred: the ranking is what counts].

    Args:
      key: typed PRNG key of the directions.
      features: r(x), the input of the defended dense layer, (features,).
      x: the private image.
      fraction: of the features that are pruned, in [0, 1).
      probes: number of directions.

    Returns:
      (features,) 1 where kept, 0 where pruned. Features that are zero score 0: they leak nothing and go last.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction {fraction} of features to prune must lie in [0, 1)")
    directions = jax.random.normal(key, (probes, *x.shape), x.dtype)
    r, push = jax.linearize(features, x)
    norms = jnp.sqrt(jnp.square(jax.lax.map(push, directions)).mean(0))
    score = jnp.where(norms > 0, jnp.abs(r) / jnp.where(norms > 0, norms, 1.0), 0.0)
    rank = jnp.argsort(jnp.argsort(score))
    return (rank < r.size - round(fraction * r.size)).astype(x.dtype)
