"""The Jensen gap of guided diffusion: what it costs to judge x0hat = E[x0 | x_t] in place of the images that x_t may become.

For a function f the gap at x_t is E[f(x0) | x_t] - f(x0hat). The paper bounds it from above for the likelihood of the leak
(Theorem 1) and from below for convex f (Theorem 2); `draw_given` and `gap` measure it and show whether they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdiff_jax.samplers import unguided_step
from gdiff_jax.samplers.base import Denoise, posterior
from gdiff_jax.schedule import Schedule
from gdiff_jax.theory.jacobian import Estimate


def theorem1_upper_bound(d: int, sigma: Any, max_jacobian_norm: Any, m1: Any) -> jax.Array:
    """Theorem 1: gap of the likelihood <= d / sqrt(2 pi s^2) exp(-1 / (2 s^2)) max||grad_x A|| m1 [inferred; DPS's part known].

    As printed in DPS (Chung et al. 2023, Theorem 1) with A = grad_W F. Its noise factor is not monotone: it grows up to
    s = 1 and falls after. It is also not a bound: the proof needs the Lipschitz constant of the Gaussian density, which is
    exp(-1/2) / (sqrt(2 pi) s^2) in one dimension, and takes the density at distance 1 from the mean for it, so for small s
    the gap can be larger (`likelihood_gap_bound` has the constant; tests/theory/test_limits.py a counterexample) [derived].

    Args:
      d: dimension of the image in the paper.
      sigma: s > 0, standard deviation of the noise on the gradient.
      max_jacobian_norm: largest norm of J.
      m1: E || x0 - x0hat || given x_t.
    """
    return d * max_jacobian_norm * m1 / jnp.sqrt(2 * math.pi) / sigma * jnp.exp(-1 / (2 * jnp.square(sigma)))


def likelihood_gap_bound(m: int, sigma: Any, max_jacobian_norm: Any, m1: Any) -> jax.Array:
    """log of the bound that Theorem 1's proof gives with the Gaussian's own Lipschitz constant [derived].

    |gap| <= (2 pi s^2)^(-m/2) exp(-1/2) / s max||J|| m1 for the density N(leak; A(x), s^2 I) in m dimensions, that of the
    gradient. In logs, since the density of a million coordinates is no float.
    """
    density = -0.5 * m * jnp.log(2 * math.pi * jnp.square(sigma))
    return density - 0.5 + jnp.log(max_jacobian_norm * m1 / sigma)


def theorem2_lower_bound(lambda_min: Any, trace_covariance: Any) -> jax.Array:
    """Theorem 2: gap of || A(x) - g ||^2 >= lambda_min(J^T J) tr(Sigma) [inferred].

    From (beta / 2) tr(Sigma) for a beta-strongly convex f, with the Gauss-Newton beta = 2 lambda_min(J^T J): exact for linear
    A; elsewhere the curvature of A is left out, and f need not be convex.

    Args:
      lambda_min: smallest eigenvalue of J^T J.
      trace_covariance: tr(Sigma), Sigma the covariance of x0 given x_t.
    """
    return jnp.asarray(lambda_min * trace_covariance)


def gauss_newton_upper_bound(lambda_max: Any, trace_covariance: Any) -> jax.Array:
    """The other side of `theorem2_lower_bound`: gap <= lambda_max(J^T J) tr(Sigma) for linear A [derived]."""
    return jnp.asarray(lambda_max * trace_covariance)


class Gap(NamedTuple):
    """The gap at one x_t, by Monte Carlo, with what the bounds need."""

    gap: Estimate  # mean of f(x0) - f(x0hat)
    m1: Estimate  # mean of || x0 - x0hat ||
    trace_covariance: Estimate  # mean of || x0 - x0hat ||^2, which is tr(Sigma) where x0hat is the mean


def draw_given(
    key: jax.Array,
    denoise: Denoise,
    schedule: Schedule,
    x_t: jax.Array,
    i: int,
    samples: int,
    *,
    clip: bool = True,
    batch: int = 8,
) -> tuple[jax.Array, jax.Array]:
    """x0hat at x_t, and images x0 that the prior draws from there: the reverse process, unguided.

    Args:
      key: typed PRNG key.
      denoise: the prior.
      schedule: its kept timesteps.
      x_t: (H, W, C) at index i.
      i: index of the schedule, static: i + 1 steps are taken.
      samples: number of images.
      clip: clip x0hat to [-1, 1], as the sampler does.
      batch: images drawn side by side.

    Returns:
      x0hat (H, W, C) and the images (samples, H, W, C).
    """

    def one(key: jax.Array) -> jax.Array:
        def step(x: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
            return unguided_step(jax.random.fold_in(key, j), x, j, denoise, schedule, clip=clip)[0], None

        return jax.lax.scan(step, x_t, jnp.arange(i, -1, -1))[0]

    x0hat = posterior(denoise, schedule, x_t, jnp.array(i), clip).x0
    return x0hat, jax.lax.map(one, jax.random.split(key, samples), batch_size=batch)


def gap(f: Callable[[jax.Array], jax.Array], x0hat: jax.Array, x0: jax.Array) -> Gap:
    """The Jensen gap of a scalar function f of an image, over x0 (N, H, W, C), N >= 2, drawn by `draw_given`."""
    if len(x0) < 2:
        raise ValueError(f"{len(x0)} image is too few; the standard error needs two")
    gaps = jax.lax.map(f, x0, batch_size=8) - f(x0hat)
    squares = jnp.square(x0 - x0hat[None]).reshape(len(x0), -1).sum(1)
    mean = lambda v: Estimate(v.mean(), v.std(ddof=1) / len(x0) ** 0.5)
    return Gap(mean(gaps), mean(jnp.sqrt(squares)), mean(squares))


def prior_error(
    key: jax.Array, denoise: Denoise, schedule: Schedule, images: jax.Array, *, clip: bool = True
) -> tuple[Estimate, Estimate]:
    """m1 = E|| x0 - x0hat || and tr(Sigma) = E|| x0 - x0hat ||^2 at every kept step, (num_steps,), mean over images.

    One noising of each image a step; x0hat is the prior's, so an imperfect prior makes both larger than the data's own.

    Args:
      key: typed PRNG key.
      denoise: the prior.
      schedule: its kept timesteps.
      images: (N, H, W, C) of the data that the prior stands for, in [-1, 1], N >= 2.
      clip: clip x0hat to [-1, 1].
    """

    def squares(i: jax.Array) -> jax.Array:
        def one(n: jax.Array) -> jax.Array:
            noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), n), images.shape[1:])
            x0hat = posterior(denoise, schedule, schedule.add_noise(images[n], noise, i), i, clip).x0
            return jnp.square(x0hat - images[n]).sum()

        return jax.lax.map(one, jnp.arange(len(images)), batch_size=8)

    values = jax.lax.map(squares, jnp.arange(schedule.num_steps))
    mean = lambda v: Estimate(v.mean(1), v.std(1, ddof=1) / len(images) ** 0.5)
    return mean(jnp.sqrt(values)), mean(values)
