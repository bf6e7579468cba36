"""DiffPIR with a nonlinear leak: Gauss-Newton steps from x0hat in every reverse step (Zhu et al. 2023, arXiv 2305.08995).

The proximal update x = argmin ||r(x)||^2 + damping ||x - x0hat||^2 has no closed form where r is the residual of a gradient: a
few Gauss-Newton steps stand in for it, each by conjugate gradients on J^T J [our choice]. For networks without kinks: where
units switch, J says nothing of the step that is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdiff_jax.samplers import base
from gdiff_jax.samplers.base import Denoise, Start
from gdiff_jax.samplers.proximal import gauss_newton
from gdiff_jax.schedule import Schedule
from gdiff_jax.trace import StepInfo, norm, x0_error

INNER = 2  # Gauss-Newton steps in a reverse step
STEPS_OF_CG = 20
SIZE = 0.5  # standard deviation of a pixel under the prior, about
Residual = Callable[[jax.Array], Any]


def proximal(residual: Residual, x0: jax.Array, precision: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """About argmin ||r(x)||^2 / s^2 + precision ||x - x0||^2 with s = max(rms of r, sigma), from x0 on.

    While the residual is more than noise, it errs by its own size: J is of the wrong place.
    """

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        r = jax.tree.leaves(residual(x))
        mean_square = jnp.stack([jnp.vdot(a, a) for a in r]).sum() / sum(a.size for a in r)
        damping = precision * jnp.maximum(mean_square, jnp.square(sigma))
        return gauss_newton(lambda x: jax.tree.leaves(residual(x)), x, x0, 1 / damping, STEPS_OF_CG), None

    return jax.lax.scan(step, x0, None, length=INNER)[0]


def gauss_newton_sample(
    key: jax.Array,
    denoise: Denoise,
    residual: Residual,
    schedule: Schedule,
    shape: tuple[int, ...],
    sigma: jax.Array | float,
    *,
    clip: bool = True,
    start: Start | None = None,
    truth: jax.Array | None = None,
) -> tuple[jax.Array, StepInfo]:
    """One reconstruction.

    Args:
      key: typed PRNG key of the trial.
      denoise: `eps, v = denoise(x_t, t)`, a pytree (see `samplers.base`).
      residual: r(x), a pytree of arrays, of an image: its gradient less the leak. It is differentiated forwards.
      schedule: kept timesteps of the prior.
      shape: (H, W, C) of the image.
      sigma: standard deviation of the noise in r, >= 0.
      clip: clip x0hat to [-1, 1] before the update.
      start: where to begin, `start_from` an estimate; from pure noise the steps end in local minima.
      truth: (H, W, C); only fills `x0_error` of the trace.

    Returns:
      image (H, W, C), about [-1, 1], and the trace: distance is ||r|| after each update, guidance_norm how far it moved.
    """

    def step(key: jax.Array, x: jax.Array, i: jax.Array) -> tuple[jax.Array, StepInfo]:
        p = base.posterior(denoise, schedule, x, i, clip)
        ratio = (1 - schedule.abar[i]) / schedule.abar[i]
        x0 = proximal(residual, p.x0, 1 / ratio + 1 / SIZE**2, sigma)  # x0hat errs by no more than the images do
        distance = norm(jnp.concatenate([a.ravel() for a in jax.tree.leaves(residual(x0))]))
        info = StepInfo(distance, norm(x0 - p.x0), x0_error(x0, truth))
        return jnp.where(i > 0, schedule.posterior_mean(x0, x, i) + p.std * jax.random.normal(key, x.shape), x0), info

    return base.reverse(key, step, schedule, shape, start)
