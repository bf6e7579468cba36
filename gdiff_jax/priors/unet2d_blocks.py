"""The blocks of diffusers' `UNet2DModel`, NHWC: residual, attention, resampling, and what makes up one level of the network.

Attributes carry diffusers' names (`resnets.1.conv1`), so converting a checkpoint is a change of layout and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from flax import nnx

from gdiff_jax.modules import GroupNorm, Linear
from gdiff_jax.priors.layers import (
    attend,
    average_pool,
    conv,
    fir_downsample,
    fir_upsample,
    norm_with_time,
    upsample,
    upsampling_conv,
    zeros,
)
from gdiff_jax.priors.unet2d_fields import ACTIVATIONS, UNet2DFields

Resample = Callable[[jax.Array], jax.Array]


def time_dim(config: UNet2DFields) -> int:
    return config.time_embedding_dim or 4 * config.block_out_channels[0]


def quarter(channels: int) -> int:
    """The groups of a norm for which the config names none."""
    return max(min(channels // 4, 32), 1)


def group_norm(channels: int, config: UNet2DFields, groups: int | None = None) -> GroupNorm:
    groups = groups or config.norm_num_groups or quarter(channels)
    if channels % groups:
        raise ValueError(f"a norm of {channels} channels cannot have {groups} groups; see block_out_channels")
    return GroupNorm(channels, groups, config.norm_eps)


class ResnetBlock(nnx.Module):
    """norm, act, [resample], conv, time, norm, act, conv, + skip (diffusers `ResnetBlock2D`); divided by `scale` at the end.

    `resample`, if any, halves or doubles both branches. `groups` are those of the two norms, where it is not the config that
    says; `shortcut` asks for a convolution of the skip also where the channels are the same.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        config: UNet2DFields,
        rngs: nnx.Rngs,
        scale: float = 1,
        resample: Resample | None = None,
        groups: tuple[int | None, int | None] = (None, None),
        shortcut: bool = False,
    ):
        self.resample = resample
        self.modulates = config.resnet_time_scale_shift == "scale_shift"
        self.act = ACTIVATIONS[config.act_fn]
        self.scale = scale
        self.norm1 = group_norm(c_in, config, groups[0])
        self.conv1 = conv(c_in, c_out, 3, rngs=rngs)
        self.time_emb_proj = Linear(time_dim(config), (1 + self.modulates) * c_out, rngs=rngs)
        self.norm2 = group_norm(c_out, config, groups[1])
        self.conv2 = conv(c_out, c_out, 3, rngs=rngs, init=zeros)
        if c_in != c_out or shortcut:
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


Layer = tuple[int, int, int]  # channels of what comes in, of the skip beside it (0 on the way down), and of what goes out


class Block(nnx.Module):
    """The resnets, attentions and, unless it is the last, the resampler of one level, down or up."""

    def __init__(self, kind: str, layers: list[Layer], config: UNet2DFields, rngs: nnx.Rngs, *, down: bool, last: bool):
        self.resnets = nnx.List([ResnetBlock(h + skip, c, config, rngs) for h, skip, c in layers])
        if kind.startswith("Attn"):
            self.attentions = nnx.List([Attention(c, config, rngs, group_norm(c, config)) for *_, c in layers])
        if last:
            return
        c, by_resnet = layers[-1][2], _resamples_by_resnet(kind, config)
        if down:
            halve = ResnetBlock(c, c, config, rngs, resample=average_pool) if by_resnet else Downsample(c, config, rngs)
            self.downsamplers = nnx.List([halve])
        else:
            double = ResnetBlock(c, c, config, rngs, resample=upsample) if by_resnet else Upsample(c, rngs)
            self.upsamplers = nnx.List([double])

    def layer(self, j: int, h: jax.Array, temb: jax.Array) -> jax.Array:
        h = self.resnets[j](h, temb)
        return self.attentions[j](h) if hasattr(self, "attentions") else h


class SkipBlock(nnx.Module):
    """A level of NCSN++ (Song et al. 2021, arXiv 2011.13456), down or up.

    The image too is resampled, by a filter, and given to the network on the way down, taken from it on the way up. As diffusers
    has it norms have groups of their own, and on the way up there is one attention after the last of the resnets.
    """

    def __init__(self, kind: str, layers: list[Layer], config: UNet2DFields, rngs: nnx.Rngs, *, down: bool, last: bool):
        c, scale, attends = layers[-1][2], math.sqrt(2), kind.startswith("Attn")
        # In AttnSkipUpBlock2D all of the one part counts and a quarter of the other: diffusers' slip, and so its weights'.
        first = lambda h, skip: min(h + skip // 4, 32) if attends and not down else quarter(h + skip)
        self.resnets = nnx.List(
            [ResnetBlock(h + skip, c, config, rngs, scale, groups=(first(h, skip), quarter(c))) for h, skip, c in layers]
        )
        self.attention_after = range(len(layers))[0 if down else -1 :]
        if attends:
            self.attentions = nnx.List(
                [Attention(c, config, rngs, group_norm(c, config, 32), scale) for _ in self.attention_after]
            )
        if last:
            return
        groups = (quarter(c), quarter(c))
        if down:
            self.resnet_down = ResnetBlock(c, c, config, rngs, scale, fir_downsample, groups, shortcut=True)
            self.skip_conv = conv(3, c, 1, rngs=rngs)
        else:
            self.resnet_up = ResnetBlock(c, c, config, rngs, scale, fir_upsample, groups, shortcut=True)
            self.skip_norm = group_norm(c, config, quarter(c))
            self.skip_conv = conv(c, 3, 3, rngs=rngs)

    def layer(self, j: int, h: jax.Array, temb: jax.Array) -> jax.Array:
        h = self.resnets[j](h, temb)
        if hasattr(self, "attentions") and j in self.attention_after:
            h = self.attentions[self.attention_after.index(j)](h)
        return h

    def down(self, h: jax.Array, temb: jax.Array, image: jax.Array) -> jax.Array:
        """Half the size; `image` has it already."""
        return self.skip_conv(image) + self.resnet_down(h, temb)

    def shown(self, h: jax.Array) -> jax.Array:
        """What this level adds to the image."""
        return self.skip_conv(jax.nn.silu(self.skip_norm(h)))


class TimeEmbedding(nnx.Module):
    def __init__(self, c_in: int, config: UNet2DFields, rngs: nnx.Rngs):
        self.linear_1 = Linear(c_in, time_dim(config), rngs=rngs)
        self.linear_2 = Linear(time_dim(config), time_dim(config), rngs=rngs)

    def __call__(self, emb: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(emb)))


class MidBlock(nnx.Module):
    def __init__(self, channels: int, config: UNet2DFields, rngs: nnx.Rngs):
        scale = config.mid_block_scale_factor
        self.resnets = nnx.List([ResnetBlock(channels, channels, config, rngs, scale) for _ in range(2)])
        if config.add_attention:
            # As diffusers has it: with scale_shift only this attention loses its norm, unless the config asks for one.
            groups, plain = config.attn_norm_num_groups, config.resnet_time_scale_shift == "default"
            norm = None if groups is None and not plain else group_norm(channels, config, groups)
            self.attentions = nnx.List([Attention(channels, config, rngs, norm, scale)])

    def __call__(self, h: jax.Array, temb: jax.Array) -> jax.Array:
        h = self.resnets[0](h, temb)
        h = self.attentions[0](h) if hasattr(self, "attentions") else h
        return self.resnets[1](h, temb)
