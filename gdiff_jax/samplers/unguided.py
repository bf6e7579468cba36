"""The prior alone: ancestral sampling (DDPM, Ho et al. 2020, Alg. 2). What an attacker gets who ignores the leak."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gdiff_jax.samplers import base
from gdiff_jax.samplers.base import Denoise
from gdiff_jax.schedule import Schedule
from gdiff_jax.trace import StepInfo, x0_error


def unguided_step(
    key: jax.Array,
    x: jax.Array,
    i: jax.Array,
    denoise: Denoise,
    schedule: Schedule,
    *,
    clip: bool = True,
    truth: jax.Array | None = None,
) -> tuple[jax.Array, StepInfo]:
    """x_{t-1} = mu + sigma z. Arguments as in `unguided_sample`; x is x_t, i the index of the step."""
    p = base.posterior(denoise, schedule, x, i, clip)
    z = jax.random.normal(key, x.shape)
    nan = jnp.full((), jnp.nan, x.dtype)
    return p.mean + p.std * z, StepInfo(nan, nan, x0_error(p.x0, truth))


def unguided_sample(
    key: jax.Array,
    denoise: Denoise,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    clip: bool = True,
    truth: jax.Array | None = None,
) -> tuple[jax.Array, StepInfo]:
    """One sample of the prior.

    Args:
      key: typed PRNG key of the trial.
      denoise: `eps, v = denoise(x_t, t)`, a pytree (see `samplers.base`).
      schedule: kept timesteps of the prior.
      shape: (H, W, C) of the image.
      clip: clip x0hat to [-1, 1] in every step.
      truth: (H, W, C); only fills `x0_error` of the trace.

    Returns:
      image (H, W, C), about [-1, 1], and the trace, whose distance and guidance_norm are nan.
    """

    def step(key: jax.Array, x: jax.Array, i: jax.Array) -> tuple[jax.Array, StepInfo]:
        return unguided_step(key, x, i, denoise, schedule, clip=clip, truth=truth)

    return base.reverse(key, step, schedule, shape)
