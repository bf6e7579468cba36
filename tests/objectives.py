"""Objectives whose derivatives are known, of images of six pixels."""

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.pytrees import pytree

SHAPE = (2, 3, 1)


@pytree
class Residual:
    """|| A x0 - b ||."""

    a: jax.Array
    b: jax.Array

    def __call__(self, x0: jax.Array) -> jax.Array:
        return jnp.linalg.norm(self.a @ x0.ravel() - self.b)


@pytree
class Flat:
    """An objective without a slope."""

    value: jax.Array

    def __call__(self, x0: jax.Array) -> jax.Array:
        return self.value + 0 * x0.sum()


def float32(a: np.ndarray) -> jax.Array:
    """On the device; `jnp.asarray` compiles a cast for each shape."""
    return jax.device_put(np.asarray(a, np.float32))


def normal(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.normal(key, SHAPE), np.float64).ravel()
