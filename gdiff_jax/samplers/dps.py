"""DPS, diffusion posterior sampling (Chung et al., ICLR 2023, arXiv 2209.14687, Alg. 1).

A gradient step on the objective after each reverse step.
"""

from __future__ import annotations

from typing import Any

import jax

from gdiff_jax.samplers import base
from gdiff_jax.samplers.base import Denoise, Start
from gdiff_jax.schedule import Schedule
from gdiff_jax.trace import Objective, StepInfo


def dps_step(
    key: jax.Array,
    x: jax.Array,
    i: jax.Array,
    denoise: Denoise,
    objective: Objective,
    schedule: Schedule,
    *,
    zeta: jax.Array | float,
    clip: bool = True,
    through_prior: bool = True,
    truth: jax.Array | None = None,
) -> tuple[jax.Array, StepInfo]:
    """x_{t-1} = mu + sigma z - zeta G. Arguments as in `dps_sample`; x is x_t, i the index of the step."""
    p, grad, _, info = base.guided_posterior(denoise, objective, schedule, x, i, clip, through_prior, truth=truth)
    z = jax.random.normal(key, x.shape)
    return p.mean + p.std * z - zeta * grad, info


def dps_sample(
    key: jax.Array,
    denoise: Denoise,
    objective: Objective,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    zeta: jax.Array | float = 8.0,
    clip: bool = True,
    through_prior: bool = True,
    start: Start | None = None,
    truth: jax.Array | None = None,
) -> tuple[jax.Array, StepInfo]:
    """One reconstruction by DPS.

    Args:
      key: typed PRNG key of the trial.
      denoise: `eps, v = denoise(x_t, t)`, a pytree (see `samplers.base`).
      objective: scalar distance of an image (H, W, C) to the leak. The gradient step is taken on it as it is: give the
        *un-squared* norm, which is per trial, to have the paper's zeta_i = zeta' / ||r||; on the squared norm
        the paper's zeta' equals zeta / 2.
      schedule: kept timesteps of the prior.
      shape: (H, W, C) of the image.
      zeta: step size, >= 0; an array is traced, so a grid of it needs one compilation. 0 gives the unguided sampler.
      clip: clip x0hat to [-1, 1] and differentiate through the clip, so a saturated pixel gets no guidance.
      through_prior: False guides by the objective's gradient at x0hat in place of its pull-back to x_t (see
        `samplers.base.guided_posterior`): the prior's backward pass is saved, some quality is lost.
      start: where to begin, `start_from` an estimate of the image; pure noise at the last index if None.
      truth: (H, W, C); only fills `x0_error` of the trace, the sampler does not use it.

    Returns:
      image (H, W, C), about [-1, 1], and the trace. The last step, at t = 0, is guided too.
    """

    def step(key: jax.Array, x: jax.Array, i: jax.Array) -> tuple[jax.Array, StepInfo]:
        options: dict[str, Any] = dict(clip=clip, through_prior=through_prior, truth=truth)
        return dps_step(key, x, i, denoise, objective, schedule, zeta=zeta, **options)

    return base.reverse(key, step, schedule, shape, start)
