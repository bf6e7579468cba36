"""Objectives whose derivatives are known, of images of six pixels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

SHAPE = (2, 3, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    """|| A x0 - b ||."""

    a: jax.Array
    b: jax.Array

    def __call__(self, x0: jax.Array) -> jax.Array:
        return jnp.linalg.norm(self.a @ x0.ravel() - self.b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flat:
    """An objective without a slope."""

    value: jax.Array

    def __call__(self, x0: jax.Array) -> jax.Array:
        return self.value + 0 * x0.sum()


def normal(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.normal(key, SHAPE), np.float64).ravel()
