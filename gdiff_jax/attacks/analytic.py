"""The first dense layer gives its input away (Phong et al. 2017; Geiping et al. 2020, Prop. 3.1): no iterations.

With z = K^T x + b the layer's gradients are dL/dK = x delta^T and dL/db = delta, so every neuron j with delta_j != 0 holds the
whole image: x = dL/dK_j / dL/db_j.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdiff_jax.attacks.base import eigh_alone


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
      the estimate, in the layer's units. Where delta is zero (no neuron is active) it is not finite: the image cannot be had.
    """
    if kernel_gradient.shape[1:] != bias_gradient.shape:
        raise ValueError(f"a kernel (inputs, neurons) {kernel_gradient.shape} does not go with a bias {bias_gradient.shape}")
    rows = jnp.concatenate([kernel_gradient, bias_gradient[None]])
    direction = eigh_alone(rows.T @ rows)[1][:, -1]  # delta / ||delta||, up to its sign
    delta_norm = bias_gradient @ direction
    return LayerInput(kernel_gradient @ direction / delta_norm, 1 / jnp.abs(delta_norm))
