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


def posterior_mean(samples: jax.Array, mean: jax.Array, needed: jax.Array | int | None = None) -> tuple[jax.Array, jax.Array]:
    """The combined image and the weight w in [0, 1].

    Args:
      samples: (K, ...) reconstructions of one leak by independent keys, K >= 2.
      mean: (...) of the images one may expect, such as a prior's `mean_image`.
      needed: how many of the samples count, the first; one alone has the weight 1. None: all.
    """
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} samples do not say how far they agree; give two or more")
    count = jnp.asarray(len(samples) if needed is None else needed)
    counts, k = (jnp.arange(len(samples)) < count).reshape(-1, *(1,) * mean.ndim), count.astype(samples.dtype)
    away = jnp.where(counts, samples - mean[None], 0.0)
    average = away.sum(0) / jnp.maximum(k, 1.0)
    energy = jnp.vdot(average, average)  # (v + (K - 1) c) / K of these samples
    agreement = (k**2 * energy - jnp.vdot(away, away)) / jnp.maximum(k * (k - 1), 1.0)
    weight = jnp.where(k > 1, jnp.clip(agreement / jnp.where(energy > 0, energy, 1.0), 0.0, 1.0), 1.0)
    return mean + weight * average, weight


def mean_of_chains(
    key: jax.Array,
    sample: Callable[[jax.Array], tuple[jax.Array, Report]],
    mean: jax.Array,
    chains: int = CHAINS,
    needed: jax.Array | None = None,
) -> tuple[jax.Array, Report]:
    """`posterior_mean` of independent reconstructions of one leak, clipped to [-1, 1].

    Args:
      key: typed PRNG key of the trial.
      sample: `image, trace = sample(key)`, such as `gdiff_jax.dsg_sample` with all but its key given.
      mean: of the images one may expect, (H, W, C) or what broadcasts to it.
      chains: how many, 2 or more; they run at once, in as many times the memory of one.
      needed: how many of them are, which may be traced: those run one after another, and the others not at all. Of one its
        image is the answer, of none the mean. None: all, at once.

    Returns:
      The image (H, W, C), or for a leak of several (B, H, W, C), and the trace of the first chain, which does not end in that
      image. One chain that is not finite makes the image so.
    """
    keys = jax.random.split(key, chains)
    if needed is None:
        samples, traces = jax.vmap(sample)(keys)
        trace = jax.tree.map(lambda a: a[0], traces)
    else:
        samples, trace = _some(sample, keys, needed)
    samples, mean = jnp.clip(samples, -1.0, 1.0), jnp.broadcast_to(mean, samples.shape[-3:])
    if samples.ndim == 4:
        image, _ = posterior_mean(samples, mean, needed)
    else:  # a chain has the images of a group in an order of its own: they are combined in the first chain's
        samples = jax.vmap(lambda images: images[match_images(images, samples[0])])(samples)
        image, _ = jax.vmap(posterior_mean, (1, None, None))(samples, mean, needed)
    return image, trace


def _some(
    sample: Callable[[jax.Array], tuple[jax.Array, Report]], keys: jax.Array, needed: jax.Array
) -> tuple[jax.Array, Report]:
    """The first `needed` samples, the others 0, and the trace of the first, nan where there is none."""

    def step(state: tuple[jax.Array, jax.Array, Report]) -> tuple[jax.Array, jax.Array, Report]:
        k, samples, trace = state
        image, own = sample(jax.random.clone(keys)[k])  # each once, which a check for reuse does not see
        return k + 1, samples.at[k].set(image), jax.tree.map(lambda a, b: jnp.where(k == 0, b, a), trace, own)

    image, trace = jax.eval_shape(sample, keys[0])
    blank = jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else 0, a.dtype), trace)
    begin = jnp.asarray(0), jnp.zeros((len(keys), *image.shape), image.dtype), blank
    return jax.lax.while_loop(lambda state: state[0] < needed, step, begin)[1:]
