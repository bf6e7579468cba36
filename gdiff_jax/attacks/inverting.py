"""Inverting gradients (Geiping et al., NeurIPS 2020): signed Adam on a gradient distance, with total variation and a box."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from gdiff_jax.attacks import base
from gdiff_jax.trace import Objective, StepInfo


def total_variation(x: jax.Array) -> jax.Array:
    """Mean absolute difference of neighbours, down plus across; images (..., H, W, C)."""
    return jnp.abs(jnp.diff(x, axis=-3)).mean() + jnp.abs(jnp.diff(x, axis=-2)).mean()


def invert_gradients(
    key: jax.Array,
    objective: Objective,
    shape: tuple[int, ...],
    *,
    steps: int = 4000,
    learning_rate: float = 0.1,
    tv: jax.Array | float = 1e-2,
    restarts: int = 1,
    truth: jax.Array | None = None,
) -> tuple[jax.Array, StepInfo]:
    """One reconstruction by inverting gradients.

    Args:
      key: typed PRNG key of the trial.
      objective: scalar distance of an image to the leak; the paper's is 1 - cosine.
      shape: (H, W, C) of the image, or (B, H, W, C).
      steps: of Adam on the signs of the gradient.
      learning_rate: divided by 10 after 3/8, 5/8 and 7/8 of the steps, as in the paper.
      tv: weight of the total variation, >= 0; an array is traced. The best weight depends on victim and noise by a factor of
        200 (benchmarks/results/attacks.md); the default is a compromise.
      restarts: starts drawn from a standard normal; the one of least objective + TV is returned.
      truth: only fills `x0_error` of the trace.

    Returns:
      image of `shape` in [-1, 1] and a trace of up to 100 steps, whose distance is the objective without TV.
    """
    drops = {round(steps * share): 0.1 for share in (3 / 8, 5 / 8, 7 / 8)}
    signs = optax.stateless(lambda grad, _: jnp.sign(grad))
    optimiser = optax.chain(signs, optax.adam(optax.piecewise_constant_schedule(learning_rate, drops)))
    box = functools.partial(jnp.clip, min=-1.0, max=1.0)

    def run(key: jax.Array) -> base.Descent:
        start = box(jax.random.normal(key, shape))
        return base.descend(start, objective, lambda x: tv * total_variation(x), optimiser, box, steps, truth)

    return base.best_of(key, run, restarts)
