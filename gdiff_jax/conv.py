"""Convolutions, NHWC x HWIO, each written for the derivative that its user takes.

The first two compute what `jax.lax.conv_general_dilated` computes. They differ in what their derivatives compile to:

* `conv_prior` is differentiated with respect to its *input*, inside `lax.scan`. XLA:CPU runs the transposed
  convolution that `lax.conv` would produce there about three times slower than the forward one, so the pull-back
  is written as a plain forward convolution.
* `conv_upsampled` is `conv_prior` of an image that was doubled first, at 4/9 of the multiplications.
* `conv_victim` is differentiated with respect to its *kernel*, under `vmap` over trials. Batched kernel gradients of
  `lax.conv` become grouped convolutions, slow on every backend; as patches times a matrix they stay matmuls under
  every derivative.

`benchmarks/guided_step.py` measures both against `lax.conv`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]

_NHWC = ("NHWC", "HWIO", "NHWC")


def _forward(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=_NHWC)


def _adjoint(kernel: jax.Array) -> jax.Array:
    return jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_prior(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Padding = ((1, 1), (1, 1))) -> jax.Array:
    """Convolution whose input pull-back is a forward convolution (reverse mode only, no jvp).

    Args:
      x: (N, H, W, C_in).
      kernel: (kh, kw, C_in, C_out), same dtype as x.
      stride: step in both directions.
      padding: ((top, bottom), (left, right)) zeros.
    """
    return _forward(x, kernel, stride, padding)


def _conv_fwd(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _forward(x, kernel, stride, padding), (x, kernel)


def _conv_bwd(
    stride: int, padding: Padding, residual: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residual
    # The kernel's cotangent is only wanted in training; while sampling jit drops it as dead code.
    _, pull_kernel = jax.vjp(lambda k: _forward(x, k, stride, padding), kernel)
    # Spread the cotangent back to stride 1, pad it to "full", and convolve with the flipped, transposed kernel. The padding
    # is the convolution's own: XLA:CPU runs one over an input that was padded before it up to three times slower.
    pads = []
    for axis in (0, 1):
        k, (lo, hi) = kernel.shape[axis], padding[axis]
        reach = (g.shape[axis + 1] - 1) * stride + k  # padded rows that some window saw
        unseen = x.shape[axis + 1] + lo + hi - reach
        pads.append((k - 1 - lo, k - 1 - hi + unseen))
    grad_x = lax.conv_general_dilated(g, _adjoint(kernel), (1, 1), pads, lhs_dilation=(stride, stride), dimension_numbers=_NHWC)
    return grad_x, pull_kernel(g)[0]


conv_prior.defvjp(_conv_fwd, _conv_bwd)


def _doubled(kernel: jax.Array) -> jax.Array:
    """The 4 x 4 kernel that does to an image with zeros between its pixels what the 3 x 3 one does to the doubled image."""
    wide = jnp.pad(kernel, ((1, 1), (1, 1), (0, 0), (0, 0)))
    tall = wide[:4] + wide[1:]
    return tall[:, :4] + tall[:, 1:]


@jax.custom_vjp
def conv_upsampled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The 3 x 3 convolution, zero-padded by 1, of x doubled by nearest neighbour (reverse mode only, no jvp).

    Args:
      x: (N, H, W, C_in).
      kernel: (3, 3, C_in, C_out), same dtype as x.

    Returns:
      (N, 2 H, 2 W, C_out).
    """
    pads, spread = ((2, 2), (2, 2)), (2, 2)
    return lax.conv_general_dilated(x, _doubled(kernel), (1, 1), pads, lhs_dilation=spread, dimension_numbers=_NHWC)


def _conv_upsampled_bwd(residual: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residual
    twice = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    _, pull_kernel = jax.vjp(lambda k: _forward(twice, k, 1, ((1, 1), (1, 1))), kernel)  # in training only, as above
    return _forward(g, _adjoint(_doubled(kernel)), 2, ((1, 1), (1, 1))), pull_kernel(g)[0]


conv_upsampled.defvjp(lambda x, kernel: (conv_upsampled(x, kernel), (x, kernel)), _conv_upsampled_bwd)


def conv_victim(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Padding = ((1, 1), (1, 1))) -> jax.Array:
    """Convolution as shifted slices times a matrix: stays a matmul under every derivative and every vmap.

    Args and result as in `conv_prior`.
    """
    kh, kw, c_in, c_out = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows = (x.shape[1] - kh) // stride + 1
    cols = (x.shape[2] - kw) // stride + 1
    # Columns first, then rows: k + k slices instead of k^2, which halves the time to compile a LeNet.
    x = jnp.concatenate([x[:, :, j : j + (cols - 1) * stride + 1 : stride] for j in range(kw)], axis=-1)
    x = jnp.concatenate([x[:, i : i + (rows - 1) * stride + 1 : stride] for i in range(kh)], axis=-1)
    return x @ kernel.reshape(kh * kw * c_in, c_out)
