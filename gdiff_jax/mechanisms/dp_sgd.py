"""DP-SGD: what a client releases of a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from gdiff_jax.mechanisms.base import Gradient
from gdiff_jax.mechanisms.compression import Clip
from gdiff_jax.mechanisms.noise import GaussianNoise


def dp_sgd_gradient(
    key: jax.Array,
    loss: Callable[[Any, jax.Array, jax.Array], jax.Array],
    params: Any,
    x: jax.Array,
    y: jax.Array,
    clip_norm: jax.Array | float,
    sigma: jax.Array | float,
) -> Gradient:
    """What DP-SGD releases of a batch (Abadi et al. 2016, Alg. 1): each example's gradient clipped, their sum noised, over B.

    Args:
      key: typed PRNG key of the noise.
      loss: `loss(params, x, y)` of one example.
      params: the model's parameters.
      x: (B, H, W, C).
      y: (B,).
      clip_norm: C > 0; the L2 sensitivity of the sum under add/remove adjacency.
      sigma: standard deviation of the noise on the *sum*; the noise multiplier is z = sigma / C.

    Returns:
      (sum of clipped gradients + sigma n) / B, shaped as params. B is taken as public; under Poisson sampling
      Abadi et al. divide by the expected size instead.
    """
    clip = Clip(clip_norm)
    with jax.default_matmul_precision("highest"):
        clipped = jax.vmap(lambda x, y: clip.simulate(jax.grad(loss)(params, x, y), None))(x, y)
    total = jax.tree.map(lambda g: g.sum(0), clipped)
    return jax.tree.map(lambda g: g / x.shape[0], GaussianNoise(sigma)(key, total))
