"""The tokens of a dense layer whose outputs' positions are learned, under noise: a linear system with errors in its matrix.

With A (T, d_in) and Delta (T, d_out) the position gradient, dL/dK = A^T Delta + N. Delta is measured with the same noise, which
enters as A^T N': as if dL/dK had noise of variance sigma^2 (1 + E|a|^2), a an input of all tokens [our choice: not correlated].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.algebra.layers import input_before, split_of
from gdiff_jax.algebra.structure import Loss, entry_of, on_host, structure_of, wide
from gdiff_jax.algebra.system import Level, system_of

VARIANCE = 0.1  # of a pixel about the mean image, as `tokens_under_noise` takes it


class Tokens(NamedTuple):
    """tokens (T, d_in), the posterior mean, and std (T,) of the error of each token's entries."""

    tokens: np.ndarray
    std: np.ndarray


def tokens_under_noise(
    kernel_gradient: np.ndarray, delta: np.ndarray, sigma: float, mean: np.ndarray, variance: float
) -> Tokens:
    """The posterior mean of the inputs whose entries are `mean` + Gaussian of `variance`, in float64.

    Args:
      kernel_gradient: (d_in, d_out).
      delta: (T, d_out), dL/dZ of each token.
      sigma: standard deviation of the noise in both, > 0. Where sigma sqrt(d_out) is not small against delta's singular values,
        noise passes for delta there, and the error is larger than `std` says.
      mean: (T, d_in).
      variance: of an entry, > 0; of pixels in [-1, 1] 0.1 gave more than 0.25 [measured].
    """
    gradient, delta, mean = (np.asarray(a, np.float64) for a in (kernel_gradient, delta, mean))
    noise = sigma**2 * (1 + len(delta) * variance + np.square(mean).sum(0).mean())
    covariance = np.linalg.inv(delta @ delta.T / noise + np.eye(len(delta)) / variance)
    away = covariance @ (delta @ (gradient - mean.T @ delta).T / noise)
    return Tokens(mean + away, np.sqrt(np.diag(covariance)))


def image_of_tokens(
    loss: Loss, params: Any, leak: Any, image_shape: tuple[int, ...], y: Any, sigma: float, expected: np.ndarray
) -> np.ndarray | None:
    """The image (H, W, C) whose tokens a first layer's gradient gives away under noise; None where it gives none.

    Args:
      loss: `loss(params, x, y)` of one image; the layer is found in its jaxpr.
      params: any pytree of float arrays.
      leak: its gradient, with noise of standard deviation sigma > 0 in every entry.
      image_shape: (H, W, C).
      y: the label.
      sigma: of the noise.
      expected: (H, W, C), the mean of images one may expect.
    """
    y = jax.tree.map(jnp.asarray, y)
    structure = structure_of(loss, params, image_shape, y)
    with on_host():
        leaves, gradient = wide((params, y)), wide(leak)
        index, leaf = entry_of(structure, leaves) or (None, 0)
        if index != 0:
            return None
        layer = structure.layers[0]
        d = np.asarray(gradient[leaf]).reshape(layer.out_shape)
        split = split_of(layer, leaves, jnp.asarray(d), set(structure.own))
        if split is None:
            return None
        nothing = np.zeros(d.shape, bool)
        system = system_of(layer, leaves, gradient, Level(0, np.zeros(d.shape), nothing, nothing, d, 1.0), split)
        inputs = np.asarray(layer.prepared(jnp.asarray(expected, jnp.float64)))
        mean = np.moveaxis(inputs, split.u_axis, -1).reshape(system.rows, system.channels)
        found = tokens_under_noise(system.right.T, system.matrix.T, sigma, mean, VARIANCE)
        return input_before(layer, system.as_input(found.tokens))
