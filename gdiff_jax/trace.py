"""What guides an iterative attack, and what each attack reports of its steps, whether it has a prior or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Objective = Callable[[jax.Array], jax.Array]  # scalar distance of an image to the leak, a pytree


class StepInfo(NamedTuple):
    """What a step reports, float32 scalars; a trace stacks them to (steps,), a sampler's with the noisiest step first.

    An attack that measures more reports a NamedTuple of its own, which begins with these three.
    """

    distance: jax.Array  # objective(x0hat); nan where the step was not guided
    guidance_norm: jax.Array  # || grad_{x_t} objective(x0hat(x_t)) ||; nan where the step was not guided
    x0_error: jax.Array  # mean over pixels of (x0hat - truth)^2, images in [-1, 1]; nan without a truth


@jax.custom_jvp
def norm(v: jax.Array) -> jax.Array:
    """|| v || over all axes, with derivative 0 at v = 0, where that of a square root is nan: a sample can be differentiated."""
    return jnp.linalg.norm(v)


@norm.defjvp
def _norm_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (v,), (change,) = primals, tangents
    length = norm(v)
    return length, jnp.vdot(v, change) / jnp.where(length == 0, 1.0, length)


def x0_error(x0: jax.Array, truth: jax.Array | None) -> jax.Array:
    """Mean squared error of x0hat, or nan without a truth."""
    return jnp.full((), jnp.nan, x0.dtype) if truth is None else jnp.square(x0 - truth).mean()
