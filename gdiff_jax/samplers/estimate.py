"""One call of the denoiser: the posterior mean of an estimate whose error is Gaussian and white."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gdiff_jax.samplers.base import Denoise
from gdiff_jax.schedule import Schedule


def denoise_estimate(
    denoise: Denoise,
    schedule: Schedule,
    image: jax.Array,
    std: jax.Array | float,
    mean: jax.Array,
    *,
    clip: bool = True,
) -> jax.Array:
    """E[x | estimate] by the prior, of an estimate = x + std n, n standard normal.

    x + std n *is* x_t / sqrt(abar) where (1 - abar) / abar = std^2, so Tweedie's formula (Efron 2011; DPS, Eq. 10) is one call:
    estimate - std eps(estimate / sqrt(1 + std^2), t). Of all estimators it has the least expected squared error that the prior
    allows; `start_from` draws from the posterior instead. t is interpolated linearly in log std between the kept steps and
    rounded, as there are ten times as many timesteps as one keeps [our choice].

    Args:
      denoise: `eps, v = denoise(x_t, t)`, of one image, a pytree (see `samplers.base`).
      schedule: kept timesteps of the prior.
      image: (H, W, C), the estimate.
      std: scalar >= 0, of its error in each pixel. Below the least noise of the schedule the estimate itself is the answer.
      mean: (H, W, C) of the images that one may expect, returned for a std above the greatest noise.
      clip: clip the result to [-1, 1].

    Returns:
      (H, W, C). An estimate that is not finite gives one that is not finite, unless std is above the greatest noise.
    """
    std = jnp.asarray(std, image.dtype)
    levels = 0.5 * (jnp.log1p(-schedule.abar) - jnp.log(schedule.abar))  # log std of each kept step
    t = jnp.interp(jnp.log(jnp.maximum(std, 1e-30)), levels, schedule.t.astype(image.dtype))
    eps, _ = denoise(image / jnp.sqrt(1 + jnp.square(std)), jnp.round(t).astype(schedule.t.dtype))
    x = jnp.where(std < jnp.exp(levels[0]), image, image - std * eps)
    x = jnp.where(std > jnp.exp(levels[-1]), mean, x)
    return jnp.clip(x, -1.0, 1.0) if clip else x
