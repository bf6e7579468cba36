"""Reverse diffusion in which each x0hat takes a few Gauss-Newton steps towards what was measured (DiffPIR, Zhu et al., CVPR
Workshops 2023, arXiv 2305.08995, with a residual that is not linear).

x0hat + r n is what the prior says of the image at a noise level; the measurement's residual, each entry by its deviation, is as
Gaussian. The mode of both is the step's image, to which the noise of the next level is added anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.samplers import base
from gdiff_jax.samplers.base import Denoise
from gdiff_jax.schedule import Schedule
from gdiff_jax.trace import norm, x0_error

Residual = Callable[[jax.Array], list[jax.Array]]
PIXEL_VARIANCE = 0.25  # of images in [-1, 1] about their mean: what the prior says at most of a pixel
LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.0)  # of a Gauss-Newton step, of which the best is taken


class ProximalInfo(NamedTuple):
    """What a step reports: `StepInfo`'s fields, and the worst block's residual, 1 where it is what its deviations say."""

    distance: jax.Array
    guidance_norm: jax.Array
    x0_error: jax.Array
    misfit: jax.Array


def gauss_newton(residual: Residual, x: jax.Array, x0: jax.Array, variance: jax.Array, iterations: int) -> jax.Array:
    """One step from x towards the least || residual ||^2 + || x - x0 ||^2 / variance, by conjugate gradients.

    Args:
      residual: a list of arrays, each entry by its deviation.
      x: (H, W, C).
      x0: where the prior's Gaussian is centred.
      variance: of it, in each pixel, scalar.
      iterations: of the conjugate gradients, each one Jacobian-vector product and one of its transpose.
    """

    def cost(x: jax.Array) -> jax.Array:
        return jnp.stack([jnp.vdot(r, r) for r in [*residual(x), (x - x0) / jnp.sqrt(variance)]]).sum()

    r, along = jax.linearize(residual, x)
    back = jax.linear_transpose(along, x)
    downhill = -back(r)[0] - (x - x0) / variance
    step, _ = jax.scipy.sparse.linalg.cg(lambda p: back(along(p))[0] + p / variance, downhill, tol=1e-6, maxiter=iterations)
    lengths = jnp.asarray(LENGTHS)
    costs = jax.lax.map(lambda length: cost(x + length * step), lengths)
    best = jnp.argmin(jnp.where(jnp.isfinite(costs), costs, jnp.inf))
    return jnp.where(jnp.isfinite(costs[best]), x + lengths[best] * step, x)


def _sizes(residual: Residual, x: jax.Array) -> jax.Array:
    """Of each block its rms, and 1 where that is less: by how much its deviations are too small."""
    return jnp.stack([jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(r))), 1.0) for r in residual(x)])


def _tempered(residual: Residual, sizes: jax.Array) -> Residual:
    return lambda x: [r / size for r, size in zip(residual(x), sizes, strict=True)]


def proximal_sample(
    key: jax.Array,
    denoise: Denoise,
    schedule: Schedule,
    measured: Callable[[jax.Array, jax.Array], Residual],
    shape: tuple[int, ...],
    *,
    levels: int = 25,
    inner: int = 2,
    iterations: int = 10,
    clip: bool = True,
    truth: jax.Array | None = None,
) -> tuple[jax.Array, ProximalInfo]:
    """One reconstruction of what was measured.

    Args:
      key: typed PRNG key of the trial.
      denoise: `eps, v = denoise(x_t, t)`, a pytree (see `samplers.base`).
      schedule: kept timesteps of the prior.
      measured: `residual = measured(x, variance)` at an estimate and the variance of its error in each pixel; residual(x) is a
        list of arrays, each entry by its deviation. It is asked anew before each Gauss-Newton step.
      shape: (H, W, C).
      levels: of the schedule's steps so many are taken, evenly; all, if there are no more.
      inner: Gauss-Newton steps a level.
      iterations: conjugate gradients in each of them.
      clip: clip x0hat to [-1, 1].
      truth: (H, W, C); only fills `x0_error` of the trace.

    Returns:
      image (H, W, C), about [-1, 1], and the trace: nan for steps that are not taken. guidance_norm is how far x0hat was moved;
      distance is nan.
    """
    last = schedule.num_steps - 1
    kept = np.unique(np.round(np.linspace(0, last, min(levels, last + 1))).astype(int))[::-1]
    after = jnp.append(schedule.abar[kept[1:]], 1.0)
    k_init, k_steps = jax.random.split(key)
    x = jax.random.normal(k_init, shape)

    def step(state: tuple[jax.Array, jax.Array], at: tuple[jax.Array, jax.Array]) -> tuple[Any, ProximalInfo]:
        (x, sizes), (i, abar_after) = state, at
        p = base.posterior(denoise, schedule, x, i, clip)
        level = (1 - schedule.abar[i]) / schedule.abar[i]
        variance = level * PIXEL_VARIANCE / (level + PIXEL_VARIANCE)

        def closer(state: tuple[jax.Array, jax.Array], _: None) -> tuple[Any, None]:
            x0, sizes = state
            residual = measured(x0, level)
            x0 = gauss_newton(_tempered(residual, sizes), x0, p.x0, variance, iterations)
            return (x0, _sizes(residual, x0)), None

        (x0, sizes), _ = jax.lax.scan(closer, (p.x0, sizes), length=inner)
        info = ProximalInfo(jnp.full((), jnp.nan), norm(x0 - p.x0), x0_error(x0, truth), sizes.max())
        noise = jax.random.normal(jax.random.fold_in(k_steps, i), shape)
        return (jnp.sqrt(abar_after) * x0 + jnp.sqrt(1 - abar_after) * noise, sizes), info

    nothing = jnp.zeros(shape)
    (x, _), taken = jax.lax.scan(step, (x, _sizes(measured(nothing, jnp.ones(())), nothing)), (jnp.asarray(kept), after))
    rows = last - kept
    return x, jax.tree.map(lambda a: jnp.full(schedule.num_steps, jnp.nan).at[rows].set(a), taken)
