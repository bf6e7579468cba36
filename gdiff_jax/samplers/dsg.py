"""DSG, guidance with a spherical Gaussian constraint (Yang et al., ICML 2024, arXiv 2402.03201).

Every step ends on the sphere on which a Gaussian of the reverse step's standard deviation concentrates, so that however
strong the guidance, the iterate stays as noisy as the prior expects it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdiff_jax.samplers import base
from gdiff_jax.samplers.base import Denoise, ShareOf, Signal, Start
from gdiff_jax.schedule import Schedule
from gdiff_jax.trace import Objective, StepInfo, norm, x0_error


class SignalInfo(NamedTuple):
    """What a step reports whose guidance is judged by a `Signal`: a `StepInfo`'s fields, then a `Share`'s.

    Float32 scalars; nan where the step was not guided.
    """

    distance: jax.Array
    guidance_norm: jax.Array
    x0_error: jax.Array
    signal: jax.Array
    pull: jax.Array
    noise_pull: jax.Array
    curvature: jax.Array


def _unit(v: jax.Array) -> jax.Array:
    """v / ||v||, and 0 for v = 0 (where the objective is flat there is no direction to go)."""
    length = norm(v)
    return v / jnp.where(length > 0, length, 1.0)


def dsg_step(
    key: jax.Array,
    x: jax.Array,
    i: jax.Array,
    denoise: Denoise,
    objective: Objective,
    schedule: Schedule,
    *,
    guidance_rate: jax.Array | float,
    interval: int = 1,
    clip: bool = True,
    through_prior: bool = True,
    share: ShareOf | None = None,
    truth: jax.Array | None = None,
) -> tuple[jax.Array, StepInfo | SignalInfo]:
    """x_{t-1} = mu + r dm / ||dm||. Arguments as in `dsg_sample`; x is x_t, i the index of the step."""
    z = jax.random.normal(key, x.shape)
    root_n = x.size**0.5

    def guided(x: jax.Array) -> tuple[jax.Array, StepInfo | SignalInfo]:
        p, grad, worth, info = base.guided_posterior(denoise, objective, schedule, x, i, clip, through_prior, share, truth)
        # The paper's r = sqrt(n) sigma, d* = -r G/||G||, ds = sigma z, dm = ds + rate (d* - ds), all divided by sigma, which
        # is 0 in the last step; a learned sigma then scales each pixel, and the sphere becomes an ellipsoid [inferred].
        toward = -root_n * _unit(grad)
        turn = guidance_rate
        if worth is not None:  # no further than the cosine to the clean guidance allows, nor past its least distance
            radius = norm(p.std * toward)
            turn = jnp.minimum(jnp.sqrt(worth.signal) * turn, worth.length() / jnp.where(radius > 0, radius, 1.0))
        mixed = z + turn * (toward - z)
        return p.mean + p.std * root_n * _unit(mixed), info if worth is None else SignalInfo(*info, *worth)

    def skipped(x: jax.Array) -> tuple[jax.Array, StepInfo | SignalInfo]:
        p = base.posterior(denoise, schedule, x, i, clip)
        nan = jnp.full((), jnp.nan, x.dtype)
        info = StepInfo(nan, nan, x0_error(p.x0, truth))
        return p.mean + p.std * z, info if share is None else SignalInfo(*info, nan, nan, nan, nan)

    if interval == 1:
        return guided(x)
    return jax.lax.cond(i % interval == 0, guided, skipped, x)


def dsg_sample(
    key: jax.Array,
    denoise: Denoise,
    objective: Objective,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    guidance_rate: jax.Array | float = 0.2,
    interval: int = 1,
    clip: bool = True,
    through_prior: bool = True,
    signal: Signal | None = None,
    start: Start | None = None,
    truth: jax.Array | None = None,
) -> tuple[jax.Array, StepInfo | SignalInfo]:
    """One reconstruction by DSG.

    Args:
      key: typed PRNG key of the trial.
      denoise: `eps, v = denoise(x_t, t)`, a pytree (see `samplers.base`).
      objective: scalar distance of an image (H, W, C) to the leak; only the direction of its gradient is used.
      schedule: kept timesteps of the prior.
      shape: (H, W, C) of the image.
      guidance_rate: in [0, 1]; how far each step's direction is turned from the random to the steepest one. An array is
        traced, so a grid of it needs one compilation. At 1 a step is deterministic; at 0 it is the unguided step with
        its noise put on the sphere of radius sqrt(n) sigma.
      interval: guide the steps whose index is a multiple of it; the others are unguided and cost half.
      clip: clip x0hat to [-1, 1] and differentiate through the clip, so a saturated pixel gets no guidance.
      through_prior: False guides by the objective's gradient at x0hat in place of its pull-back to x_t (see
        `samplers.base.guided_posterior`): the prior's backward pass is saved, some quality is lost.
      signal: what the guidance is worth, such as `gdiff_jax.NoiseCalibration`. Then guidance_rate is the most: each step turns
        by at most sqrt(signal) of it, the expected cosine to the guidance without noise, and no further than to where the
        distance without noise is least along it, a step of x_{t-1} taken for one of x0hat [our choice].
      start: where to begin, `start_from` an estimate of the image; pure noise at the last index if None.
      truth: (H, W, C); only fills `x0_error` of the trace, the sampler does not use it.

    Returns:
      image (H, W, C), about [-1, 1], and the trace, a `SignalInfo` where there is a `signal`. The last step is unguided: the
      posterior's deviation there is 0.
    """
    if interval < 1:
        raise ValueError(f"interval {interval} must be at least 1; 1 guides every step")

    def step(key: jax.Array, x: jax.Array, i: jax.Array, share: ShareOf | None = None) -> tuple[jax.Array, Any]:
        return dsg_step(
            key, x, i, denoise, objective, schedule,
            guidance_rate=guidance_rate, interval=interval, clip=clip, through_prior=through_prior, share=share, truth=truth,
        )  # fmt: skip

    if signal is None:
        return base.reverse(key, step, schedule, shape, start)
    first = (schedule.num_steps - 1 if start is None else start.step) // interval

    def judged(key: jax.Array, state: Any, i: jax.Array) -> tuple[Any, SignalInfo]:
        x, noise_pull = state
        share = functools.partial(signal, jax.random.fold_in(key, 1), first - i // interval, noise_pull)
        x, info = step(key, x, i, share)
        return (x, jnp.where(jnp.isnan(info.noise_pull), noise_pull, info.noise_pull)), info

    return base.reverse_with_memory(key, judged, schedule, shape, start, jnp.nan)
