"""DDNM: what a linear system leaves open is drawn from the prior (Wang, Yu & Zhang, ICLR 2023, arXiv 2212.00490).

In every reverse step x0hat keeps its part in the null space alone, the rest is the system's. Linear inequalities that hold
besides are met within the null space [our choice].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.samplers import base
from gdiff_jax.samplers.base import Denoise
from gdiff_jax.schedule import Schedule
from gdiff_jax.trace import StepInfo, norm, x0_error

INNER = 15  # accelerated gradient steps by which the inequalities are met


class NullSpace(NamedTuple):
    """What is open of an image: x = image + basis @ a, flat, with inequalities `matrix @ a <= bound`.

    Attributes:
      basis: (H W C, k) orthonormal; columns may be 0.
      matrix, bound: (m, k) and (m,); m may be 0.
    """

    basis: jax.Array
    matrix: jax.Array
    bound: jax.Array


def null_space_of(basis: np.ndarray, matrix: np.ndarray, bound: np.ndarray, multiple: int = 512) -> NullSpace:
    """The null space in float32, its sizes k and m raised to a multiple: one program serves the spaces of many images.

    Directions and inequalities that are put in are zero, and so is what becomes of them: no sample is another for it.
    """
    more = lambda n: (0, -n % multiple)
    (_, k), m = basis.shape, len(bound)
    padded = (np.pad(basis, ((0, 0), more(k))), np.pad(matrix, (more(m), more(k))), np.pad(bound, more(m)))
    return NullSpace(*(jnp.asarray(a, jnp.float32) for a in padded))


def null_space_sample(
    key: jax.Array,
    denoise: Denoise,
    schedule: Schedule,
    image: jax.Array,
    space: NullSpace,
    *,
    clip: bool = True,
    truth: jax.Array | None = None,
) -> tuple[jax.Array, StepInfo]:
    """One image that is `image` but for its part in the null space, which the prior fills.

    Args:
      key: typed PRNG key of the trial.
      denoise: `eps, v = denoise(x_t, t)`, a pytree (see `samplers.base`).
      schedule: kept timesteps of the prior.
      image: (H, W, C), right but for its part in the null space, which is not looked at.
      space: the null space, and the inequalities that hold in it.
      clip: clip x0hat to [-1, 1] in every step, before the system's part is put in.
      truth: (H, W, C); only fills `x0_error` of the trace.

    Returns:
      image (H, W, C), about [-1, 1], and the trace, whose guidance_norm is how far each x0hat was from the system's part; its
      distance is nan.
    """
    curvature = _largest_eigenvalue(space.matrix)

    def step(key: jax.Array, x: jax.Array, i: jax.Array) -> tuple[jax.Array, StepInfo]:
        p = base.posterior(denoise, schedule, x, i, clip)
        a = _within(space, curvature, space.basis.T @ (p.x0 - image).ravel())
        x0 = image + (space.basis @ a).reshape(image.shape)
        info = StepInfo(jnp.full((), jnp.nan, x.dtype), norm(x0 - p.x0), x0_error(x0, truth))
        return schedule.posterior_mean(x0, x, i) + p.std * jax.random.normal(key, x.shape), info

    return base.reverse(key, step, schedule, image.shape)


def _largest_eigenvalue(matrix: jax.Array) -> jax.Array:
    """Of M^T M, by power iteration, and a tenth more; 1 for no rows."""
    power = lambda v: matrix.T @ (matrix @ v)
    v = jax.lax.fori_loop(
        0, 30, lambda _, v: (w := power(v)) / jnp.maximum(jnp.linalg.norm(w), 1e-30), jnp.ones(matrix.shape[1])
    )
    largest = 1.1 * jnp.linalg.norm(power(v))
    return jnp.where(largest > 0, largest, 1.0)


def _within(space: NullSpace, curvature: jax.Array, a: jax.Array) -> jax.Array:
    """a moved to where the inequalities are met, or nearly: Nesterov's steps on half the squared violation."""

    def step(state: tuple[jax.Array, jax.Array], k: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        a, ahead = state
        after = ahead - space.matrix.T @ jnp.maximum(space.matrix @ ahead - space.bound, 0.0) / curvature
        return (after, after + k / (k + 3) * (after - a)), None

    (a, _), _ = jax.lax.scan(step, (a, a), jnp.arange(INNER, dtype=a.dtype))
    return a
