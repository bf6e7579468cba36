"""The U-Net of ADM (Dhariwal & Nichol 2021, *Diffusion models beat GANs*), as guided-diffusion and DPS's FFHQ-256 have it.

Attributes carry guided-diffusion's names (`input_blocks.4.0.in_layers.2`), whose indices run flat over all levels, so
converting a checkpoint is a change of layout. The config fields are that code's command-line flags, with its defaults.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gdiff_jax.modules import GroupNorm, Linear
from gdiff_jax.priors.adm_flags import ADMFlags
from gdiff_jax.priors.layers import (
    Embedding,
    attend,
    average_pool,
    block_runner,
    conv,
    norm_with_time,
    timestep_embedding,
    upsample,
    upsampling_conv,
    zeros,
)


@dataclasses.dataclass(frozen=True)
class ADMConfig(ADMFlags):
    """The flags of guided-diffusion that decide the network and its diffusion; defaults are those of that code."""

    def build(self, rngs: nnx.Rngs) -> ADM:
        """The network, freshly initialised."""
        return ADM(self, rngs)


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(channels, 32, 1e-5)


class ResBlock(nnx.Module):
    """norm, silu, [resample], conv, time, norm, silu, conv, + skip; `resample` halves or doubles both branches."""

    def __init__(self, c_in: int, c_out: int, config: ADMFlags, rngs: nnx.Rngs, resample: Any = None):
        self.modulates = config.use_scale_shift_norm
        self.resample = resample
        width = (1 + self.modulates) * c_out
        # The functions between the layers keep guided-diffusion's indices.
        self.in_layers = nnx.List([_norm(c_in), jax.nn.silu, conv(c_in, c_out, 3, rngs=rngs)])
        self.emb_layers = nnx.List([jax.nn.silu, Linear(4 * config.num_channels, width, rngs=rngs)])
        dropout = None
        self.out_layers = nnx.List([_norm(c_out), jax.nn.silu, dropout, conv(c_out, c_out, 3, rngs=rngs, init=zeros)])
        if c_in != c_out:
            self.skip_connection = conv(c_in, c_out, 1, rngs=rngs)

    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        h = jax.nn.silu(self.in_layers[0](x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        time = self.emb_layers[1](jax.nn.silu(emb))
        h = norm_with_time(self.out_layers[0], self.in_layers[2](h), time, self.modulates)
        h = self.out_layers[3](jax.nn.silu(h))
        return h + (self.skip_connection(x) if hasattr(self, "skip_connection") else x)


class AttentionBlock(nnx.Module):
    """Self-attention over the pixels, residual.

    The legacy order of qkv's channels is [head, qkv, d], the new one [qkv, head, d].
    """

    def __init__(self, channels: int, config: ADMFlags, rngs: nnx.Rngs):
        self.norm = _norm(channels)
        self.qkv = Linear(channels, 3 * channels, rngs=rngs)
        self.proj_out = Linear(channels, channels, rngs=rngs, init=zeros)
        self.heads = config.heads(channels)
        self.legacy = not config.use_new_attention_order

    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        n, h, w, c = x.shape
        shape = (self.heads, 3, c // self.heads) if self.legacy else (3, self.heads, c // self.heads)
        qkv = self.qkv(self.norm(x).reshape(n, h * w, c)).reshape(n, h * w, *shape)
        q, k, v = jnp.unstack(qkv, axis=3 if self.legacy else 2)
        return x + self.proj_out(attend(q, k, v).reshape(n, h * w, c)).reshape(x.shape)


class Downsample(nnx.Module):
    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.op = conv(channels, channels, 3, stride=2, rngs=rngs)

    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        return self.op(x)


class Upsample(nnx.Module):
    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.conv = upsampling_conv(channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        return self.conv(x)


class ADM(nnx.Module):
    """(N, H, W, 3), t (N,), label (N,) if conditional -> (N, H, W, 3 or 6), float32: eps, and v where it is learned.

    The blocks compute in the dtype of x.
    """

    def __init__(self, config: ADMFlags, rngs: nnx.Rngs):
        self.config = config
        widths, size, c = config.widths, config.image_size, config.widths[0]
        emb = 4 * config.num_channels
        first = Linear(config.num_channels, emb, rngs=rngs)
        self.time_embed = nnx.List([first, jax.nn.silu, Linear(emb, emb, rngs=rngs)])
        if config.num_classes is not None:
            self.label_emb = Embedding(config.num_classes, emb, rngs)

        def attention(channels: int) -> list[nnx.Module]:
            return [AttentionBlock(channels, config, rngs)] if size in config.attention_sizes else []

        blocks: list[list[nnx.Module]] = [[conv(3, c, 3, rngs=rngs)]]
        skips = [c]  # channels of what is pushed on the way down, popped on the way up
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                blocks.append([ResBlock(c, width, config, rngs), *attention(width)])
                c = width
                skips.append(c)
            if level + 1 < len(widths):
                down = ResBlock(c, c, config, rngs, average_pool) if config.resblock_updown else Downsample(c, rngs)
                blocks.append([down])
                skips.append(c)
                size //= 2
        self.input_blocks = nnx.List([nnx.List(layers) for layers in blocks])
        self.middle_block = nnx.List(
            [ResBlock(c, c, config, rngs), AttentionBlock(c, config, rngs), ResBlock(c, c, config, rngs)]
        )
        blocks = []
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                layers = [ResBlock(c + skips.pop(), width, config, rngs), *attention(width)]
                c = width
                if level and i == config.num_res_blocks:
                    layers.append(ResBlock(c, c, config, rngs, upsample) if config.resblock_updown else Upsample(c, rngs))
                    size *= 2
                blocks.append(layers)
        self.output_blocks = nnx.List([nnx.List(layers) for layers in blocks])
        last = conv(c, 6 if config.learn_sigma else 3, 3, rngs=rngs, init=zeros)
        self.out = nnx.List([_norm(c), jax.nn.silu, last])

    def __call__(self, x: jax.Array, t: jax.Array, remat: bool = False, label: jax.Array | None = None) -> jax.Array:
        run = block_runner(remat)
        emb = timestep_embedding(t, self.config.num_channels, freq_shift=0, flip_sin_to_cos=True)
        emb = self.time_embed[2](jax.nn.silu(self.time_embed[0](emb)))
        emb = (emb if label is None else emb + self.label_emb(label)).astype(x.dtype)
        h = self.input_blocks[0][0](x)
        skips = [h]
        for block in self.input_blocks[1:]:
            for layer in block:
                h = run(layer, h, emb)
            skips.append(h)
        for layer in self.middle_block:
            h = run(layer, h, emb)
        for block in self.output_blocks:
            h = jnp.concatenate([h, skips.pop()], axis=-1)
            for layer in block:
                h = run(layer, h, emb)
        # In float32: eps is divided by sqrt(abar), 0.006 at the noisiest step, and bfloat16 keeps three digits of it.
        return self.out[2](jax.nn.silu(self.out[0](h.astype(np.promote_types(h.dtype, np.float32)))))
