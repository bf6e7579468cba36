"""The U-Net of DDPM as diffusers' `UNet2DModel` defines it, NHWC, driven by the same config fields.

Attributes carry diffusers' names (`down_blocks.0.resnets.1.conv1`), so converting a checkpoint is a change of layout and
nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gdiff_jax.modules import GroupNorm, Linear
from gdiff_jax.priors.layers import (
    attend,
    average_pool,
    block_runner,
    conv,
    depth_to_space,
    norm_with_time,
    space_to_depth,
    timestep_embedding,
    upsample,
    upsampling_conv,
    zeros,
)
from gdiff_jax.priors.unet2d_fields import ACTIVATIONS, UNet2DFields


def _time_dim(config: UNet2DFields) -> int:
    return config.time_embedding_dim or 4 * config.block_out_channels[0]


def _norm(channels: int, config: UNet2DFields) -> GroupNorm:
    return GroupNorm(channels, config.norm_num_groups, config.norm_eps)


class ResnetBlock(nnx.Module):
    """norm, act, [resample], conv, time, norm, act, conv, + skip (diffusers `ResnetBlock2D`); divided by `scale` at the end.

    `resample`, if any, halves or doubles both branches.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        config: UNet2DFields,
        rngs: nnx.Rngs,
        scale: float = 1,
        resample: Callable[[jax.Array], jax.Array] | None = None,
    ):
        self.resample = resample
        self.modulates = config.resnet_time_scale_shift == "scale_shift"
        self.act = ACTIVATIONS[config.act_fn]
        self.scale = scale
        self.norm1 = _norm(c_in, config)
        self.conv1 = conv(c_in, c_out, 3, rngs=rngs)
        self.time_emb_proj = Linear(_time_dim(config), (1 + self.modulates) * c_out, rngs=rngs)
        self.norm2 = _norm(c_out, config)
        self.conv2 = conv(c_out, c_out, 3, rngs=rngs, init=zeros)
        if c_in != c_out:
            self.conv_shortcut = conv(c_in, c_out, 1, rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        h = self.act(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = norm_with_time(self.norm2, self.conv1(h), self.time_emb_proj(self.act(temb)), self.modulates)
        h = self.conv2(self.act(h)) + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)
        return h / self.scale if self.scale != 1 else h


class Attention(nnx.Module):
    """Self-attention over the pixels, residual; divided by `scale` at the end."""

    def __init__(self, channels: int, config: UNet2DFields, rngs: nnx.Rngs, norm: GroupNorm | None, scale: float = 1):
        if norm is not None:
            self.group_norm = norm
        self.to_q = Linear(channels, channels, rngs=rngs)
        self.to_k = Linear(channels, channels, rngs=rngs)
        self.to_v = Linear(channels, channels, rngs=rngs)
        self.to_out = nnx.List([Linear(channels, channels, rngs=rngs, init=zeros)])
        self.heads = channels // (config.attention_head_dim or channels)
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        n, height, width, c = x.shape
        h = (self.group_norm(x) if hasattr(self, "group_norm") else x).reshape(n, height * width, c)
        q, k, v = (f(h).reshape(n, height * width, self.heads, -1) for f in (self.to_q, self.to_k, self.to_v))
        h = x + self.to_out[0](attend(q, k, v).reshape(n, height * width, c)).reshape(x.shape)
        return h / self.scale if self.scale != 1 else h


class Downsample(nnx.Module):
    def __init__(self, channels: int, config: UNet2DFields, rngs: nnx.Rngs):
        # diffusers: padding 0 means one row below and one column to the right.
        pad = (config.downsample_padding, 1)
        self.conv = conv(channels, channels, 3, stride=2, padding=(pad, pad), rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.conv = upsampling_conv(channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        return self.conv(x)


def _resamples_by_resnet(block_type: str, config: UNet2DFields) -> bool:
    """As diffusers has it: the type's own name decides, and only blocks with attention look at the config."""
    if block_type.startswith("Resnet"):
        return True
    return {"AttnDownBlock2D": config.downsample_type, "AttnUpBlock2D": config.upsample_type}.get(block_type) == "resnet"


class Block(nnx.Module):
    """The resnets, attentions and the resampler of one level, down or up."""

    def __init__(self, block_type: str, channels: list[tuple[int, int]], config: UNet2DFields, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(a, b, config, rngs) for a, b in channels])
        if block_type.startswith("Attn"):
            self.attentions = nnx.List([Attention(b, config, rngs, _norm(b, config)) for _, b in channels])

    def layer(self, j: int, h: jax.Array, temb: jax.Array) -> jax.Array:
        h = self.resnets[j](h, temb)
        return self.attentions[j](h) if hasattr(self, "attentions") else h


class TimeEmbedding(nnx.Module):
    def __init__(self, config: UNet2DFields, rngs: nnx.Rngs):
        self.linear_1 = Linear(config.block_out_channels[0], _time_dim(config), rngs=rngs)
        self.linear_2 = Linear(_time_dim(config), _time_dim(config), rngs=rngs)

    def __call__(self, emb: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(emb)))


class MidBlock(nnx.Module):
    def __init__(self, channels: int, config: UNet2DFields, rngs: nnx.Rngs):
        scale = config.mid_block_scale_factor
        self.resnets = nnx.List([ResnetBlock(channels, channels, config, rngs, scale) for _ in range(2)])
        if config.add_attention:
            # As diffusers has it: with scale_shift only this attention loses its norm, unless the config asks for one.
            groups = config.attn_norm_num_groups
            if groups is None and config.resnet_time_scale_shift == "default":
                groups = config.norm_num_groups
            norm = None if groups is None else GroupNorm(channels, groups, config.norm_eps)
            self.attentions = nnx.List([Attention(channels, config, rngs, norm, scale)])

    def __call__(self, h: jax.Array, temb: jax.Array) -> jax.Array:
        h = self.resnets[0](h, temb)
        h = self.attentions[0](h) if hasattr(self, "attentions") else h
        return self.resnets[1](h, temb)


class UNet2D(nnx.Module):
    """(N, H, W, C) and (N,) -> (N, H, W, C or 2 C), float32; the blocks compute in the dtype of x."""

    def __init__(self, config: UNet2DFields, rngs: nnx.Rngs):
        widths, layers = config.block_out_channels, config.layers_per_block
        self.config = config
        self.time_embedding = TimeEmbedding(config, rngs)
        self.conv_in = conv(config.in_channels, widths[0], 3, rngs=rngs)
        skips = [widths[0]]  # channels of what is pushed on the way down, popped on the way up
        down = []
        c = widths[0]
        for i, width in enumerate(widths):
            pairs = [(c if j == 0 else width, width) for j in range(layers)]
            kind = config.down_block_types[i]
            block = Block(kind, pairs, config, rngs)
            skips += [width] * layers
            if i + 1 < len(widths):
                if _resamples_by_resnet(kind, config):
                    down_by = ResnetBlock(width, width, config, rngs, resample=average_pool)
                else:
                    down_by = Downsample(width, config, rngs)
                block.downsamplers = nnx.List([down_by])
                skips.append(width)
            down.append(block)
            c = width
        self.down_blocks = nnx.List(down)
        self.mid_block = MidBlock(c, config, rngs)
        up = []
        for i, width in enumerate(reversed(widths)):
            pairs = []
            for _ in range(layers + 1):
                pairs.append((c + skips.pop(), width))
                c = width
            kind = config.up_block_types[i]
            block = Block(kind, pairs, config, rngs)
            if i + 1 < len(widths):
                if _resamples_by_resnet(kind, config):
                    up_by = ResnetBlock(width, width, config, rngs, resample=upsample)
                else:
                    up_by = Upsample(width, rngs)
                block.upsamplers = nnx.List([up_by])
            up.append(block)
        self.up_blocks = nnx.List(up)
        self.conv_norm_out = _norm(c, config)
        self.conv_out = conv(c, config.out_channels, 3, rngs=rngs, init=zeros)

    def __call__(self, x: jax.Array, t: jax.Array, remat: bool = False) -> jax.Array:
        cfg, run = self.config, block_runner(remat)
        emb = timestep_embedding(t, cfg.block_out_channels[0], cfg.freq_shift, cfg.flip_sin_to_cos)
        temb = self.time_embedding(emb).astype(x.dtype)
        x = 2 * x - 1 if cfg.center_input_sample else x
        h = self.conv_in(space_to_depth(x, cfg.patch_size))
        skips = [h]
        for block in self.down_blocks:
            for j in range(cfg.layers_per_block):
                h = run(functools.partial(block.layer, j), h, temb)
                skips.append(h)
            if hasattr(block, "downsamplers"):
                h = run(block.downsamplers[0], h, temb)
                skips.append(h)
        h = run(self.mid_block, h, temb)
        for block in self.up_blocks:
            for j in range(cfg.layers_per_block + 1):
                h = run(functools.partial(block.layer, j), jnp.concatenate([h, skips.pop()], axis=-1), temb)
            if hasattr(block, "upsamplers"):
                h = run(block.upsamplers[0], h, temb)
        # In float32: eps is divided by sqrt(abar), 0.006 at the noisiest step, and bfloat16 keeps three digits of it.
        h = self.conv_out(jax.nn.silu(self.conv_norm_out(h.astype(np.promote_types(h.dtype, np.float32)))))
        return depth_to_space(h, cfg.patch_size)
