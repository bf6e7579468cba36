"""Several reconstructions of one leak, combined into the image of least expected error: no truth is looked at.

Exact posterior samples a_1 .. a_K are exchangeable with the truth x: E<a_i - m, x - m> = E<a_i - m, a_j - m> for i != j, m the
mean of images. So how far the samples agree with each other says how far their mean agrees with the truth, and
m + w (mean of a - m) has the least expected squared error at w = c / ((v + (K - 1) c) / K), with v = E|| a_i - m ||^2 and c the
mean of <a_i - m, a_j - m> [derived]. Where the leak tells nothing w is 0 and the answer m; where it tells all, w is 1. Samples
of a guided sampler are not exact, so this is a rule of thumb there [our choice].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gdiff_jax.metrics import match_images
from gdiff_jax.samplers.base import Report

CHAINS = 4


def posterior_mean(samples: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The combined image and the weight w in [0, 1].

    Args:
      samples: (K, ...) reconstructions of one leak by independent keys, K >= 2.
      mean: (...) of the images one may expect, such as a prior's `mean_image`.
    """
    k = len(samples)
    if k < 2:
        raise ValueError(f"{k} samples do not say how far they agree; give two or more")
    away = samples - mean[None]
    average = away.mean(0)
    energy = jnp.vdot(average, average)  # (v + (K - 1) c) / K of these samples
    agreement = (k**2 * energy - jnp.vdot(away, away)) / (k * (k - 1))
    weight = jnp.clip(agreement / jnp.where(energy > 0, energy, 1.0), 0.0, 1.0)
    return mean + weight * average, weight


def mean_of_chains(
    key: jax.Array, sample: Callable[[jax.Array], tuple[jax.Array, Report]], mean: jax.Array, chains: int = CHAINS
) -> tuple[jax.Array, Report]:
    """`posterior_mean` of independent reconstructions of one leak, clipped to [-1, 1].

    Args:
      key: typed PRNG key of the trial.
      sample: `image, trace = sample(key)`, such as `gdiff_jax.dsg_sample` with all but its key given.
      mean: of the images one may expect, (H, W, C) or what broadcasts to it.
      chains: how many, 2 or more; they run at once, in as many times the memory of one.

    Returns:
      The image (H, W, C), or for a leak of several (B, H, W, C), and the trace of the first chain, which does not end in that
      image. One chain that is not finite makes the image so.
    """
    samples, trace = jax.vmap(sample)(jax.random.split(key, chains))
    samples, mean = jnp.clip(samples, -1.0, 1.0), jnp.broadcast_to(mean, samples.shape[-3:])
    if samples.ndim == 4:
        image, _ = posterior_mean(samples, mean)
    else:  # a chain has the images of a group in an order of its own: they are combined in the first chain's
        samples = jax.vmap(lambda images: images[match_images(images, samples[0])])(samples)
        image, _ = jax.vmap(posterior_mean, (1, None))(samples, mean)
    return image, jax.tree.map(lambda a: a[0], trace)
