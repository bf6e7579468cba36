"""What the U-Nets share: activations over pixels, resampling, the embedding of time, rematerialisation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gdiff_jax.conv import conv_prior, conv_upsampled
from gdiff_jax.modules import Conv

conv = functools.partial(Conv, conv=conv_prior)
upsampling_conv = functools.partial(Conv, size=3, conv=lambda x, kernel, stride, padding: conv_upsampled(x, kernel))
# Zero at the start: a fresh residual branch is the identity and a fresh network predicts 0.
zeros = nnx.initializers.zeros


def timestep_embedding(t: jax.Array, dim: int, freq_shift: int, flip_sin_to_cos: bool) -> jax.Array:
    """Sinusoidal embedding (N,) -> (N, dim), float32: sines then cosines, unless flipped."""
    half = dim // 2
    freqs = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * freqs[None, :]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Scaled dot-product attention of (N, pixels, heads, d); the softmax is float32 whatever the dtype of the rest."""
    logits = jnp.einsum("nqhd,nkhd->nhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(logits, axis=-1).astype(q.dtype), v)


def norm_with_time(norm: Callable[[jax.Array], jax.Array], h: jax.Array, time: jax.Array, scale_shift: bool) -> jax.Array:
    """norm(h) (1 + scale) + shift, with (scale, shift) the halves of `time` (N, 2 C); or norm(h + time), `time` (N, C)."""
    time = time[:, None, None]
    if not scale_shift:
        return norm(h + time)
    scale, shift = jnp.split(time, 2, axis=-1)
    return norm(h) * (1 + scale) + shift


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour, twice the size; by broadcast, because a gather's gradient would be a scatter."""
    n, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


def average_pool(x: jax.Array) -> jax.Array:
    """Mean of 2 x 2 pixels, half the size."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


_FIR = (1, 3, 3, 1)


def fir_downsample(x: jax.Array, padding: int = 1) -> jax.Array:
    """Half the size (one less without padding), by the filter (1, 3, 3, 1) / 8 in each direction; zeros around the image."""
    for axis in (1, 2):
        n = x.shape[axis] // 2 - 1 + padding
        x = jnp.pad(x, [(padding, padding) if a == axis else (0, 0) for a in range(4)])
        part = lambda k, x=x, n=n, axis=axis: jax.lax.slice_in_dim(x, k, k + 2 * n - 1, stride=2, axis=axis)
        x = functools.reduce(jnp.add, [(w / 8) * part(k) for k, w in enumerate(_FIR)])
    return x


def fir_upsample(x: jax.Array) -> jax.Array:
    """Twice the size: zeros between the pixels, then the filter (1, 3, 3, 1) / 4 in each direction."""
    for axis in (1, 2):
        wide = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)])
        part = lambda k, wide=wide, n=x.shape[axis], axis=axis: jax.lax.slice_in_dim(wide, k, k + n, axis=axis)
        even, odd = 0.25 * part(0) + 0.75 * x, 0.75 * x + 0.25 * part(2)
        shape = [2 * n if a == axis else n for a, n in enumerate(x.shape)]
        x = jnp.stack([even, odd], axis + 1).reshape(shape)
    return x


class Embedding(nnx.Module):
    """A row of a table for each index (N,)."""

    def __init__(self, count: int, channels: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (count, channels), jnp.float32))

    def __call__(self, index: jax.Array) -> jax.Array:
        return self.weight[...][index]


def space_to_depth(x: jax.Array, p: int) -> jax.Array:
    """(N, H, W, C) -> (N, H/p, W/p, C p p), channels ordered as torch's pixel_unshuffle: c slowest, then row, column."""
    n, h, w, c = x.shape
    return x.reshape(n, h // p, p, w // p, p, c).transpose(0, 1, 3, 5, 2, 4).reshape(n, h // p, w // p, c * p * p)


def depth_to_space(x: jax.Array, p: int) -> jax.Array:
    """Inverse of `space_to_depth`."""
    n, h, w, c = x.shape
    return x.reshape(n, h, w, c // p**2, p, p).transpose(0, 1, 4, 2, 5, 3).reshape(n, h * p, w * p, c // p**2)


def block_runner(remat: bool) -> Callable[..., Any]:
    """run(f, *args) = f(*args); with `remat` its inner values are computed again in the backward pass, not kept."""
    return lambda f, *args: (jax.checkpoint(f) if remat else f)(*args)
