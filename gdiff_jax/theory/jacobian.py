"""J = d(grad_W L)/dx, the p x d Jacobian of the leaked gradient with respect to the pixels, without ever storing it.

`J v` is a forward derivative of the gradient, `J^T u` one mixed partial. All functions take any pure `loss(params, x, y)`,
compute in the dtype of params and x, at full matmul precision, and may be jitted with `loss` static.

The paper's reconstruction vulnerability (Definition 3) is RV = max_x || J(x) ||_F [known, from the follow-up's summary],
estimated here over a set of images.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdiff_jax.forward import jvp
from gdiff_jax.matching import Loss, at_full_precision, mixed_partial, victim_gradient
from gdiff_jax.mechanisms import Gradient

PROBE_BATCH = 16  # probes computed side by side; they are independent, so this decides memory and speed only


class Estimate(NamedTuple):
    """A Monte Carlo mean, or a function of one, and its standard error (0 where it is exact)."""

    value: jax.Array
    standard_error: jax.Array


@at_full_precision
def push(loss: Loss, params: Any, x: jax.Array, y: jax.Array, v: jax.Array) -> Gradient:
    """J v for a direction v shaped as x; shaped as params."""
    return jvp(lambda x: victim_gradient(loss, params, x, y), x, v)


def gram_vector(loss: Loss, params: Any, x: jax.Array, y: jax.Array, v: jax.Array) -> jax.Array:
    """J^T J v for a direction v shaped as x; shaped as x."""
    return mixed_partial(loss, params, x, y, push(loss, params, x, y, v))


def gram(loss: Loss, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """J^T J, (d, d), exact, column by column: d forward derivatives and d mixed partials. For d up to a few thousand.

    Its eigenvalues are the squared singular values of J; those below the dtype's epsilon times the largest are rounding.
    """
    column = lambda i: gram_vector(loss, params, x, y, jax.nn.one_hot(i, x.size, dtype=x.dtype).reshape(x.shape)).ravel()
    columns = jax.lax.map(column, jnp.arange(x.size), batch_size=PROBE_BATCH)
    return (columns + columns.T) / 2


def _energies(loss: Loss, params: Any, x: jax.Array, y: jax.Array, v: jax.Array) -> Gradient:
    """|| J_l v ||^2 of each array l of the parameters."""
    return jax.tree.map(lambda g: jnp.vdot(g, g), push(loss, params, x, y, v))


def frobenius_exact(loss: Loss, params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Gradient]:
    """|| J ||_F of one image from all d columns, and the share of each array of the parameters in || J ||_F^2."""
    column = lambda i: _energies(loss, params, x, y, jax.nn.one_hot(i, x.size, dtype=x.dtype).reshape(x.shape))
    energies = jax.tree.map(jnp.sum, jax.lax.map(column, jnp.arange(x.size), batch_size=PROBE_BATCH))
    total = sum(jax.tree.leaves(energies))
    return jnp.sqrt(total), jax.tree.map(lambda e: e / jnp.where(total > 0, total, 1.0), energies)


def frobenius(
    key: jax.Array, loss: Loss, params: Any, x: jax.Array, y: jax.Array, probes: int = 64
) -> tuple[Estimate, Gradient]:
    """|| J ||_F of one image by Hutchinson's estimator: the mean of || J v ||^2 over random signs v.

    Args:
      key: typed PRNG key of the signs.
      loss: `loss(params, x, y)`.
      params: the victim's parameters.
      x: one image.
      y: its label.
      probes: number of directions, >= 2.

    Returns:
      The estimate, and for each array of the parameters an `Estimate` of its share in || J ||_F^2. Standard errors of the
      root and of the shares are by the delta method.
    """
    if probes < 2:
        raise ValueError(f"probes {probes} must be at least 2; the standard error needs them")
    signs = jax.random.rademacher(key, (probes, *x.shape), x.dtype)
    energies = jax.lax.map(lambda v: _energies(loss, params, x, y, v), signs, batch_size=PROBE_BATCH)
    total = functools.reduce(jnp.add, jax.tree.leaves(energies))
    mean = total.mean()
    error = lambda samples: samples.std(ddof=1) / probes**0.5
    root, scale = jnp.sqrt(mean), jnp.where(mean > 0, mean, 1.0)

    def share(energy: jax.Array) -> Estimate:
        part = energy.mean() / scale
        return Estimate(part, error(energy - part * total) / scale)  # of a ratio of means

    return Estimate(root, error(total) / (2 * jnp.sqrt(scale))), jax.tree.map(share, energies)


class Vulnerability(NamedTuple):
    """RV over a set of images."""

    rv: Estimate  # of the image with the largest estimate; the largest of noisy estimates errs upwards
    per_image: Estimate  # (N,) || J(x) ||_F, the distribution
    shares: Gradient  # (N,) for each array of the parameters: an `Estimate` of its share in || J(x) ||_F^2


def reconstruction_vulnerability(
    key: jax.Array, loss: Loss, params: Any, x: jax.Array, y: jax.Array, probes: int = 64
) -> Vulnerability:
    """RV = max_x || J(x) ||_F (Definition 3) over the images x (N, H, W, C) with labels y (N,), and its distribution."""
    keys = jax.random.split(key, len(x))
    per_image, shares = jax.lax.map(lambda a: frobenius(a[0], loss, params, a[1], a[2], probes), (keys, x, y))
    worst = jnp.argmax(per_image.value)
    return Vulnerability(Estimate(per_image.value[worst], per_image.standard_error[worst]), per_image, shares)


def i2f(loss: Loss, params: Any, x: jax.Array, y: jax.Array, delta: Gradient, lambda_max: jax.Array) -> jax.Array:
    """Inversion influence function || J^T delta || / lambda_max(J J^T) (Zhang et al., NeurIPS 2023, arXiv 2309.13016).

    A first-order lower bound of the distance by which an inversion misses the image when the gradient is moved by
    `delta`; it needs no attack. Large means hard to reconstruct.
    """
    return jnp.linalg.norm(mixed_partial(loss, params, x, y, delta).ravel()) / lambda_max


def i2f_of_noise(sigma: jax.Array | float, frobenius_norm: jax.Array, lambda_max: jax.Array) -> jax.Array:
    """Root mean square of I2F over noise of standard deviation sigma: E|| J^T delta ||^2 = sigma^2 || J ||_F^2 [derived]."""
    return sigma * frobenius_norm / lambda_max
