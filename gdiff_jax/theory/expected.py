"""How close an attacker may be expected to come to an image, without an attack: by what noise leaves to be seen, and the prior.

J^T J / sigma^2 says how sharply a noisy gradient shows the pixels, locally. It is put into one number, the deviation of white
noise on the pixels that would leave as much to be seen, and the prior's posterior mean under such noise is what comes back. It
needs the image, so it is an auditor's. An attack that only searches may stay far below it, and a network whose units switch
within the noise hides more than its derivative says.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gdiff_jax.matching import Loss, l2, victim_gradient
from gdiff_jax.metrics import image_metrics
from gdiff_jax.problem import ROUNDING, SPREAD
from gdiff_jax.samplers import denoise_estimate
from gdiff_jax.samplers.base import Denoise
from gdiff_jax.schedule import Schedule
from gdiff_jax.theory.jacobian import gram_vector
from gdiff_jax.theory.spectrum import Ritz, lanczos

PROBES, STEPS = 2, 16  # of Lanczos; four probes of 48 steps rank images alike [measured]
VARIANCE = SPREAD**2  # of a pixel


def hidden_share(ritz: Ritz, sigma: jax.Array | float, variance: float = VARIANCE) -> jax.Array:
    """tr((I + variance A / sigma^2)^-1) / d, in (0, 1]: what noise leaves open of independent pixels of that variance.

    It is van Trees' limit for white pixels over their variance, exact for the posterior mean of Gaussian ones in a linear
    leak [known], by stochastic Lanczos quadrature.

    Args:
      ritz: of A = J^T J, from probes of random signs: arrays (probes, steps).
      sigma: standard deviation of the noise, > 0, scalar.
      variance: of a pixel.
    """
    values = jnp.maximum(ritz.values, 0.0)
    return (ritz.weights / (1 + variance * values / jnp.square(sigma))).sum(-1).mean()


def equal_noise(hidden: jax.Array, variance: float = VARIANCE) -> jax.Array:
    """Standard deviation s of white noise on the pixels that leaves the share `hidden` open, s^2 / (s^2 + variance)."""
    return jnp.sqrt(variance * hidden / jnp.maximum(1 - hidden, 1e-12))


def expected_psnr(
    key: jax.Array,
    loss: Loss,
    params: Any,
    x: jax.Array,
    y: Any,
    sigmas: Any,
    denoise: Denoise,
    schedule: Schedule,
    mean: jax.Array,
    *,
    clip_norm: float | None = None,
    clip: bool = True,
) -> jax.Array:
    """PSNR in dB of what may be expected to come back of one image at each noise level, without an attack [our choice].

    Args:
      key: typed PRNG key, of probes and noise; the same for all images that are to be compared.
      loss: `loss(params, x, y)` of one image.
      params: the victim's parameters.
      x: (H, W, C) in [-1, 1], the image.
      y: its label.
      sigmas: (S,) standard deviations of the noise; where it is 0, of what rounding leaves.
      denoise: the prior, `eps, v = denoise(x_t, t)`.
      schedule: kept timesteps of the prior.
      mean: (H, W, C) of images like these.
      clip_norm: to which the gradient is clipped before noise is added; None for no clipping.
      clip: clip what comes back to [-1, 1], as the prior was trained.

    Returns:
      (S,); nan where the gradient is not finite.
    """
    k_probes, k_noise = jax.random.split(key)
    starts = jax.random.rademacher(k_probes, (PROBES, x.size), x.dtype)
    matvec = lambda v: gram_vector(loss, params, x, y, v.reshape(x.shape)).ravel()
    ritz = jax.lax.map(lambda start: lanczos(matvec, start, min(STEPS, x.size)), starts)
    gradient = victim_gradient(loss, params, x, y)
    norm = l2(gradient, jax.tree.map(jnp.zeros_like, gradient))
    size = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    # A gradient that is clipped is shorter by a factor, and so is its derivative but for the part along it, which is left out.
    longer = 1.0 if clip_norm is None else jnp.maximum(1.0, norm / clip_norm)
    noise = jax.random.normal(k_noise, x.shape, x.dtype)

    def at(sigma: jax.Array) -> jax.Array:
        std = equal_noise(hidden_share(ritz, jnp.maximum(sigma * longer, ROUNDING * norm / size**0.5)))
        return image_metrics(denoise_estimate(denoise, schedule, x + std * noise, std, mean, clip=clip), x)["psnr"]

    return jax.lax.map(at, jnp.asarray(sigmas, x.dtype))
