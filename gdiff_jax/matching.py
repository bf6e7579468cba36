"""How far a candidate's gradient is from the leaked one, and what that says about the candidate's pixels.

The derivative of any distance m(grad_W L(W, x)) with respect to x is one mixed partial,

    v = grad m at g = grad_W L(W, x),      d m / dx = d/ds grad_x L(W + s v, x) at s = 0,

a forward-mode derivative of an ordinary image gradient. It equals differentiating twice in reverse, costs less, and serves
every distance and every differentiable mechanism.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdiff_jax.mechanisms import Gradient, Mechanism

Loss = Callable[[Any, jax.Array, jax.Array], jax.Array]
Distance = Callable[[Gradient, Gradient], jax.Array]


def _dot(a: Gradient, b: Gradient) -> jax.Array:
    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def _safe_sqrt(s: jax.Array) -> jax.Array:
    """sqrt with derivative 0 at 0: a gradient that matches exactly asks for no change, not for nan."""
    positive = s > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, s, 1.0)), 0.0)


def squared_l2(gradient: Gradient, leak: Gradient) -> jax.Array:
    """|| g - g~ ||^2 over the whole gradient (DLG, Zhu et al. 2019)."""
    residual = jax.tree.map(jnp.subtract, gradient, leak)
    return _dot(residual, residual)


def l2(gradient: Gradient, leak: Gradient) -> jax.Array:
    """|| g - g~ ||, un-squared, over the whole gradient: the objective of DPS and DSG."""
    return _safe_sqrt(squared_l2(gradient, leak))


def cosine(gradient: Gradient, leak: Gradient) -> jax.Array:
    """1 - <g, g~> / (||g|| ||g~||), in [0, 2] (Inverting Gradients, Geiping et al. 2020); 1 where either is zero."""
    norms = _safe_sqrt(_dot(gradient, gradient)) * _safe_sqrt(_dot(leak, leak))
    return 1 - _dot(gradient, leak) / jnp.where(norms > 0, norms, 1.0)


def at_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Matmuls inside at float32: TPU's and GPU's faster default (bfloat16, tf32) drowns a small gradient difference."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return wrapped


@at_full_precision
def victim_gradient(loss: Loss, params: Any, x: jax.Array, y: jax.Array) -> Gradient:
    """grad_W L(W, x, y): what a client computes on its private example, at full precision."""
    return jax.grad(loss)(params, x, y)


@at_full_precision
def mixed_partial(loss: Loss, params: Any, x: jax.Array, y: jax.Array, v: Gradient) -> jax.Array:
    """grad_x <v, grad_W L(W, x, y)> for a fixed v shaped as the parameters; shape of x."""
    return jax.jvp(lambda p: jax.grad(loss, argnums=1)(p, x, y), (params,), (v,))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@at_full_precision
def _match(loss: Loss, distance: Distance, victim: tuple[Any, ...], x: jax.Array) -> jax.Array:
    params, y, leak, mechanism = victim
    return _compare(distance, victim_gradient(loss, params, x, y), leak, mechanism)


def _compare(distance: Distance, gradient: Gradient, leak: Gradient, mechanism: Mechanism | None) -> jax.Array:
    return distance(gradient if mechanism is None else mechanism.simulate(gradient, leak), leak)


@at_full_precision
def _match_fwd(loss: Loss, distance: Distance, victim: Any, x: Any) -> tuple[jax.Array, jax.Array]:
    if any(leaf.perturbed for leaf in jax.tree.leaves(victim)):
        raise TypeError("GradientMatching is differentiable in the image only, not in params, label, leak or mechanism")
    (params, y, leak, mechanism), x = jax.tree.map(lambda leaf: leaf.value, (victim, x))
    gradient = victim_gradient(loss, params, x, y)
    value, v = jax.value_and_grad(functools.partial(_compare, distance))(gradient, leak, mechanism)
    return value, mixed_partial(loss, params, x, y, v)


def _match_bwd(loss: Loss, distance: Distance, grad_x: jax.Array, g: Any) -> tuple[None, jax.Array]:
    return None, g * grad_x


_match.defvjp(_match_fwd, _match_bwd, symbolic_zeros=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientMatching:
    """objective(x0) = distance(M(grad_W L(W, x0, y)), leak): what guides a sampler towards the private image.

    A pytree (weights, label, leak and the mechanism's numbers are its leaves), so `jax.vmap` over it is a batch of trials and
    jit sees no constants. `jax.grad` of it with respect to x0 costs one mixed partial, always at full matmul precision.

    Attributes:
      params: the victim's parameters W, any pytree.
      label: y, whatever `loss` takes.
      leak: the released gradient g~, shaped as params.
      loss: scalar `loss(params, x, y)`, pure, twice differentiable almost everywhere; a victim network of the user's own fits.
      distance: `l2`, `squared_l2`, `cosine`, or any differentiable `distance(gradient, leak)`.
      mechanism: M, what the attacker knows to have happened to the gradient (`mechanisms.Mechanism.simulate`); None is the
        attacker who takes the leak for the bare gradient.
    """

    params: Any
    label: jax.Array
    leak: Gradient
    loss: Loss = dataclasses.field(metadata=dict(static=True))
    distance: Distance = dataclasses.field(default=l2, metadata=dict(static=True))
    mechanism: Mechanism | None = None

    def __call__(self, x0: jax.Array) -> jax.Array:
        return _match(self.loss, self.distance, (self.params, self.label, self.leak, self.mechanism), x0)
