"""Conjugate gradients that compile little: the operator stands once in the program, where JAX's own have it twice."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Operator = Callable[[jax.Array], jax.Array]


def conjugate_gradients(
    curvature: Operator, right: jax.Array, tolerance: float, most: int, precondition: Operator = lambda r: r
) -> jax.Array:
    """x of `curvature(x) = right`, from 0 on (Hestenes & Stiefel 1952; preconditioned).

    Args:
      curvature: linear, symmetric and positive.
      right: an array of any shape.
      tolerance: ends where || right - curvature(x) || is at most that of || right ||.
      most: steps.
      precondition: about the inverse of `curvature`, linear, symmetric and positive.
    """
    State = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
    enough = tolerance**2 * jnp.vdot(right, right)

    def step(state: State) -> State:
        k, x, r, direction, before = state
        z = precondition(r)
        product = jnp.vdot(r, z)
        direction = z + jnp.where(k > 0, product / before, 0.0) * direction
        along = curvature(direction)
        length = product / jnp.vdot(direction, along)
        return k + 1, x + length * direction, r - length * along, direction, product

    going = lambda state: (state[0] < most) & (jnp.vdot(state[2], state[2]) > enough)
    zero = jnp.zeros_like(right)
    return jax.lax.while_loop(going, step, (jnp.asarray(0), zero, right, zero, jnp.ones((), right.dtype)))[1]
