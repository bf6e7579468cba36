"""Objectives whose derivatives are known, of images of six pixels; and weights and arrays that compile nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.modules import Params, Spec, param_shapes
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


def random_weights(spec: Spec) -> Params:
    """Weights of a network by NumPy, which compiles nothing; none is zero, so every path carries signal."""
    rng, params = np.random.default_rng(1), {}
    for name, shape in param_shapes(spec).items():
        scale = 1 / np.sqrt(np.prod(shape[:-1])) if name.endswith("kernel") else 0.05
        params[name] = float32(name.endswith("scale") + scale * rng.normal(size=shape))
    return params


def normal(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.normal(key, SHAPE), np.float64).ravel()
