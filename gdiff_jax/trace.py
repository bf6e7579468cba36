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


def norm(v: jax.Array) -> jax.Array:
    """|| v || over all axes, with derivative 0 at v = 0, where that of a square root is nan: a sample can be differentiated."""
    square = jnp.sum(v * v)
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def x0_error(x0: jax.Array, truth: jax.Array | None) -> jax.Array:
    """Mean squared error of x0hat, or nan without a truth."""
    return jnp.full((), jnp.nan, x0.dtype) if truth is None else jnp.square(x0 - truth).mean()
