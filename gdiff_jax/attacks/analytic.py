"""The first dense layer gives its input away (Phong et al. 2017; Geiping et al. 2020, Prop. 3.1): no iterations.

With z = K^T x + b the layer's gradients are dL/dK = x delta^T and dL/db = delta, so every neuron j with delta_j != 0 holds the
whole image: x = dL/dK_j / dL/db_j.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdiff_jax.attacks.base import eigh_alone
from gdiff_jax.first_dense import FirstDense


class LayerInput(NamedTuple):
    """What the gradient of a dense layer tells of its input.

    Attributes:
      x: (inputs,) estimate.
      std: scalar, standard deviation of its error in each input for sigma = 1 on the gradient, 1 / ||delta||; the error of
        the scale, common to all inputs, is as large relative to x.
    """

    x: jax.Array
    std: jax.Array


def dense_layer_input(kernel_gradient: jax.Array, bias_gradient: jax.Array) -> LayerInput:
    """Input of a dense layer from its leaked gradient, for one image; exact where nothing was done to the gradient.

    [dL/dK; dL/db] = [x; 1] delta^T has rank one. Its leading singular pair is the maximum-likelihood estimate under Gaussian
    noise of equal variance; it averages over all neurons with weights delta_j, where dividing by a single bias gradient
    would magnify that neuron's noise [derived]. Under noise near the edge where the singular value drowns, at
    sigma (inputs neurons)^(1/4) = ||x|| ||delta||, nothing of x is left in it.

    Args:
      kernel_gradient: (inputs, neurons).
      bias_gradient: (neurons,).

    Returns:
      the estimate, in the layer's units. Where delta is zero (no neuron is active) x is nan and std infinite: the image cannot
      be had.
    """
    if kernel_gradient.shape[1:] != bias_gradient.shape:
        raise ValueError(f"a kernel (inputs, neurons) {kernel_gradient.shape} does not go with a bias {bias_gradient.shape}")
    rows = jnp.concatenate([kernel_gradient, bias_gradient[None]])
    direction = eigh_alone(rows.T @ rows)[1][:, -1]  # delta / ||delta||, up to its sign
    delta_norm = bias_gradient @ direction
    return LayerInput(kernel_gradient @ direction / delta_norm, 1 / jnp.abs(delta_norm))


def read_first_dense(first_dense: FirstDense, leak: Mapping[str, jax.Array], shape: tuple[int, ...]) -> LayerInput:
    """The image that a leak gives away by a first dense layer, by `dense_layer_input`.

    Args:
      first_dense: which of the leak's arrays are the layer's, and what lies between the image and its input.
      leak: arrays by name, the gradient of one image.
      shape: (H, W, C) of the image.

    Returns:
      x (H, W, C), in the image's units, and std in these, of the channel where it is largest. Of a dead layer, whose delta is
      zero, x is nan and std infinite.
    """
    x, std = dense_layer_input(first_dense.kernel_of(leak), leak[first_dense.bias])
    x = x.reshape(shape)
    by_channel = lambda numbers: jnp.asarray(numbers).reshape(1, 1, -1)
    if first_dense.shift is not None:
        x = x - by_channel(first_dense.shift)
    if first_dense.scale is not None:
        scale = by_channel(first_dense.scale)
        x, std = x / scale, std / jnp.abs(scale).min()
    return LayerInput(x, std)
