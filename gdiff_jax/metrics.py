"""How much of an image came back. Images are float in [0, 1], (H, W, C) or (N, H, W, C); one value an image.

MSE, PSNR and SSIM are dm-pix's (SSIM with its defaults: 11-pixel Gaussian window of sigma 1.5, Wang et al. 2004).
"""

from __future__ import annotations

import dm_pix
import jax
import jax.numpy as jnp
import optax

from gdiff_jax.images import to_unit

MIN_SSIM_SIZE = 11


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity, in [-1, 1].

    Raises:
      ValueError: for images under 11 pixels, where the window does not fit and the number would mean nothing.
    """
    if min(a.shape[-3:-1]) < MIN_SSIM_SIZE:
        raise ValueError(f"SSIM needs at least {MIN_SSIM_SIZE} pixels each way; the images are {a.shape[-3:-1]}")
    with jax.numpy_dtype_promotion("standard"):  # dm_pix adds an integer array to a float, an error where a caller is strict
        return dm_pix.ssim(a, b)


def image_metrics(reconstruction: jax.Array, truth: jax.Array) -> dict[str, jax.Array]:
    """MSE (of pixels in [0, 1]), PSNR (dB) and, from 11 pixels on, SSIM of images in [-1, 1], which are clipped to it."""
    a, b = to_unit(reconstruction), to_unit(truth)
    values = {"mse": dm_pix.mse(a, b), "psnr": dm_pix.psnr(a, b)}
    if min(a.shape[-3:-1]) >= MIN_SSIM_SIZE:
        values["ssim"] = ssim(a, b)
    return values


def match_images(reconstruction: jax.Array, truth: jax.Array) -> jax.Array:
    """Order (B,) in which `reconstruction[order]` is closest to the truth, both (B, H, W, C): least total squared error.

    The gradient of a batch does not tell the order of its images, so none is asked of a reconstruction (Hungarian algorithm).
    """
    if reconstruction.shape != truth.shape:
        raise ValueError(f"images {reconstruction.shape} cannot be matched one to one to {truth.shape}")
    cost = jnp.square(to_unit(truth)[:, None] - to_unit(reconstruction)[None]).mean((-3, -2, -1))
    cost = jnp.where(jnp.isfinite(cost), cost, jnp.finfo(cost.dtype).max / cost.shape[0] ** 2)  # a failed image goes last
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # inside optax
        rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros_like(columns).at[rows].set(columns)


def psnr_from_error(error: jax.Array) -> jax.Array:
    """PSNR in dB from a mean squared error of images in [-1, 1] (the trace's `x0_error`), whose range is 2."""
    return 10 * jnp.log10(4.0 / error)
