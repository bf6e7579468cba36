"""The image itself from what is known at one layer: Gauss-Newton steps, damped, by conjugate gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.algebra.conjugate import conjugate_gradients
from gdiff_jax.algebra.layers import Layer, Leaves, replaced
from gdiff_jax.algebra.system import Level, rms

STEPS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01)
INNER = 300  # conjugate gradient steps in each of them, at most
Residual = Callable[[Any, jax.Array], list[jax.Array]]


@functools.partial(jax.jit, static_argnums=0)
def _step(residual: Residual, data: Any, x: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tries, ...) of x, (tries,) their costs and the cost of x."""
    cost = lambda r: jnp.stack([jnp.vdot(a, a) for a in r]).sum()
    r, tangent = jax.linearize(lambda x: residual(data, x), x)
    cotangent = jax.linear_transpose(tangent, x)
    downhill = jax.tree.map(jnp.negative, cotangent(r)[0])
    step = conjugate_gradients(lambda v: cotangent(tangent(v))[0] + damping * v, downhill, 1e-10, INNER)
    tries = x + jnp.asarray(STEPS).reshape(-1, *(1,) * x.ndim) * step
    return tries, jax.lax.map(lambda x: cost(residual(data, x)), tries), cost(r)


def least_squares(residual: Residual, data: Any, x: np.ndarray, steps: int = 40) -> tuple[np.ndarray, float]:
    """x of (locally) least sum of squares, and that sum.

    Args:
      residual: `residual(data, x)`, a list of arrays; compiled once a function.
      data: what it takes beside x, any pytree.
      x: where to begin.
      steps: at most.
    """
    damping, costs = 1e-4, list[float]()
    for _ in range(steps):
        tries, after, now = jax.device_get(_step(residual, data, jnp.asarray(x), jnp.asarray(damping)))
        costs.append(float(now))
        after = np.where(np.isfinite(after), after, np.inf)
        best = int(after.argmin())
        if after[best] < now:
            x, damping = tries[best], damping * (0.1 if best == 0 else 1.0)
        else:
            damping *= 10
        if min(after[best], now) < 1e-11 or (len(costs) > 6 and costs[-4] < 1.02 * costs[-1]):
            break
    return x, float(min(costs[-1], after[best]))


def _size(g: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(g))), 1e-300)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients_below(
    layers: tuple[Layer, ...], own: tuple[int, ...], leaves: Leaves, d: jax.Array, x: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Of parameters `own`, where d is dL/dz at the layers' output z for the image x; and z."""

    def along(own_leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        full, out = replaced(leaves, dict(zip(own, own_leaves, strict=True))), x
        for layer in layers:
            out = layer(full, out)
        return jnp.vdot(d, out), out

    return jax.grad(along, has_aux=True)([leaves[k] for k in own])


@functools.lru_cache(maxsize=32)  # a residual is a static argument: a new one would compile anew
def residual_below(layers: tuple[Layer, ...], own: tuple[int, ...]) -> Residual:
    """Of a level: outputs that are known, or below their floor, and the gradients of parameters `own` by its d.

    Those of layers under a ReLU jump where a unit switches, which a step cannot see: take the top layer's alone there.
    """

    def residual(data: Any, x: jax.Array) -> list[jax.Array]:
        leaves, gradient, (z, known, below, d, size, floor) = data
        slopes, out = gradients_below(layers, own, leaves, d, x)
        over = jnp.where(below, jnp.maximum(out - floor, 0.0), 0.0)
        away = [(a - gradient[k]) / _size(gradient[k]) for a, k in zip(slopes, own, strict=True)]
        return [jnp.where(known, out - z, over) / size, *away]

    return residual


@functools.lru_cache(maxsize=32)
def residual_of_loss(loss: Callable[..., jax.Array], tree: Any) -> Residual:
    """Of the whole gradient, each array by its size; `tree` is that of the parameters and the label."""

    def residual(data: Any, x: jax.Array) -> list[jax.Array]:
        leaves, gradient = data
        params, y = jax.tree.unflatten(tree, leaves)
        slopes = jax.tree.leaves(jax.grad(loss)(params, x, y))
        return [(a - g) / _size(g) for a, g in zip(slopes, gradient, strict=True)]

    return residual


def below(residual: Residual, leaves: Leaves, gradient: Leaves, level: Level, x: np.ndarray) -> tuple[np.ndarray, float]:
    """The image by a level's residual, and its cost."""
    size = max(rms(level.z[level.known]), 1e-300)
    at = tuple(jnp.asarray(a) for a in (level.z, level.known, level.below, level.d, size, level.floor))
    return least_squares(residual, (list(leaves), list(gradient), at), x)
