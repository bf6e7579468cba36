"""Which parameters a loss has a gradient of, by its program: what a gradient that is not zero tells is never missed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdiff_jax.matching import victim_gradient
from gdiff_jax.victims.reached import reached

PARAMS = {name: jnp.asarray(np.random.default_rng(i).normal(size=(3, 3)), jnp.float32) for i, name in enumerate("abc")}
X, Y = jnp.linspace(-1, 1, 3), jnp.asarray(1)


@jax.custom_vjp
def straight(x):
    return jax.lax.stop_gradient(jnp.round(x))


straight.defvjp(lambda x: (straight(x), None), lambda _, g: (g,))


def scanned(p, x, y):
    """`b` comes into what is carried on in the last step's result two steps later; `c` in what is thrown away."""

    def step(carry, _):
        first, second, third = carry
        return (first + second, second + (third @ p["b"]).sum(), third + 1), (p["c"] @ third).sum()

    (first, _, _), _ = jax.lax.scan(step, (x @ p["a"], jnp.zeros(3), x), None, length=3)
    return first.sum()


LOSSES = {
    "all": (lambda p, x, y: (x @ p["a"] @ p["b"] @ p["c"]).sum(), "abc"),
    "unused": (lambda p, x, y: (x @ p["a"]).sum(), "a"),
    "thrown away": (lambda p, x, y: ((x @ p["a"] @ p["b"]).sum(), (x @ p["a"] @ p["c"]).sum())[0], "ab"),
    "thrown away in a call": (lambda p, x, y: jax.jit(lambda: (x @ p["a"], jnp.tanh(x @ p["b"])))()[0].sum(), "a"),
    "a branch": (lambda p, x, y: jax.lax.cond(y > 0, lambda: x @ p["a"], lambda: x @ p["b"]).sum(), "ab"),
    "detached": (lambda p, x, y: (x @ p["a"] + jax.lax.stop_gradient(x @ p["b"])).sum(), "a"),
    "detached in a call": (lambda p, x, y: jax.jit(lambda w: jax.lax.stop_gradient(w))(p["b"]).sum() * p["a"].sum(), "a"),
    "detached once": (lambda p, x, y: (p["a"] * jax.lax.stop_gradient(p["a"])).sum(), "a"),
    "chosen by": (lambda p, x, y: (x @ p["a"])[jnp.argmax(x @ p["b"])] + jnp.where(p["c"] > 0, x, -x).sum(), "a"),
    "remembered": (lambda p, x, y: jax.checkpoint(lambda w, v: (x @ w, x @ v))(p["a"], p["c"])[0].sum(), "a"),
    "a rule of its own": (lambda p, x, y: straight(x @ p["a"]).sum(), "a"),
    "scanned": (scanned, "ab"),
    "scanned over": (lambda p, x, y: jax.lax.scan(lambda h, w: (jnp.tanh(h * w), None), x, p["a"])[0].sum(), "a"),
    "a loop": (lambda p, x, y: jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["a"]), x).sum(), "a"),
    "constant": (lambda p, x, y: jnp.zeros(()), ""),
    "itself": (lambda p, x, y: p["a"][0, 0], "a"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_gradients_of_what_reaches_it(name):
    loss, expected = LOSSES[name]
    gradients = [victim_gradient(loss, PARAMS, X, y) for y in (Y, Y - 1)]  # the one takes a branch, the other the other
    assert {name for gradient in gradients for name, value in gradient.items() if np.any(value)} == set(expected)
    assert reached(loss, PARAMS, X, Y) == set(expected)
