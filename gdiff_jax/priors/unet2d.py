"""The U-Net of DDPM as diffusers' `UNet2DModel` defines it, NHWC, driven by the same config fields.

Attributes carry diffusers' names (`down_blocks.0.resnets.1.conv1`), so converting a checkpoint is a change of layout and
nothing else. Config values that are not implemented are refused by name and value: a network that silently differs gives
plausible, wrong reconstructions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gdiff_jax.modules import GroupNorm, Linear
from gdiff_jax.priors.layers import (
    attend,
    block_runner,
    conv,
    depth_to_space,
    space_to_depth,
    timestep_embedding,
    upsample,
    zeros,
)

_ATTENTION = {"DownBlock2D": False, "UpBlock2D": False, "AttnDownBlock2D": True, "AttnUpBlock2D": True}

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}

# Fields that diffusers' config may hold and that only one value of is implemented.
_ONLY: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "num_train_timesteps": (None,),
}


@dataclasses.dataclass(frozen=True)
class UNet2DConfig:
    """The config fields of `UNet2DModel` that change the network; defaults are the class defaults of diffusers 0.42.

    `sample_size` counts the network's own pixels. `patch_size` p is ours: the image is folded by space-to-depth before
    the network (H, W, C) -> (H/p, W/p, C p p) and unfolded after, so that a small network sees a large image at the cost of a
    small one; `in_channels` is then C p p.
    """

    sample_size: int
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: Literal[0, 1] = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    patch_size: int = 1

    def __post_init__(self) -> None:
        blocks = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == blocks:
            raise ValueError(
                f"down_block_types {self.down_block_types}, up_block_types {self.up_block_types} and block_out_channels "
                f"{self.block_out_channels} must have the same length"
            )
        for name in self.down_block_types + self.up_block_types:
            if name not in _ATTENTION:
                raise ValueError(f"block type {name!r} is not implemented; implemented: {', '.join(_ATTENTION)}")
        for field, known in (
            ("downsample_padding", (0, 1)),
            ("act_fn", tuple(_ACTIVATIONS)),
            ("resnet_time_scale_shift", ("default", "scale_shift")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field} {getattr(self, field)!r} is not implemented; implemented: {', '.join(map(str, known))}"
                )
        for name, divisor in (
            ("norm_num_groups", self.norm_num_groups),
            ("attn_norm_num_groups", 1 if self.attn_norm_num_groups is None else self.attn_norm_num_groups),
            ("attention_head_dim", 1 if self.attention_head_dim is None else self.attention_head_dim),
        ):
            if not isinstance(divisor, int) or divisor < 1 or any(width % divisor for width in self.block_out_channels):
                raise ValueError(f"{name} {divisor} does not divide all of block_out_channels {self.block_out_channels}")
        factor = 2 ** (blocks - 1)
        if self.sample_size % factor:
            raise ValueError(f"sample_size {self.sample_size} cannot be halved {blocks - 1} times; use a multiple of {factor}")
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"out_channels {self.out_channels} must be in_channels {self.in_channels} (eps) or twice as many (eps and v)"
            )

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> UNet2DConfig:
        """Config from the dict of a diffusers `config.json`.

        Raises:
          ValueError: naming each field whose value is not implemented, and each unknown field.
        """
        own = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        bad = []
        for name, value in config.items():
            if name.startswith("_"):
                continue
            if name in own:
                values[name] = tuple(value) if isinstance(value, list) else value
                if name == "sample_size" and isinstance(value, (list, tuple)) and len(set(value)) == 1:
                    values[name] = value[0]
            elif name not in _ONLY:
                bad.append(f"{name}={value!r} (unknown field)")
            elif value not in _ONLY[name]:
                bad.append(f"{name}={value!r} (implemented: {_ONLY[name][0]!r})")
        if not isinstance(values.get("sample_size"), int):
            bad.append(f"sample_size={config.get('sample_size')!r} (implemented: one integer)")
        if bad:
            raise ValueError("this UNet2DModel config cannot be loaded: " + "; ".join(bad))
        # Files older than the field mean one head; today's default of 8 would apply silently.
        if "attention_head_dim" not in config and str(config.get("_diffusers_version", "")).startswith("0.0."):
            values["attention_head_dim"] = None
        return cls(**values)

    def to_diffusers(self) -> dict[str, Any]:
        """The dict that `from_diffusers` reads back."""
        return {"_class_name": "UNet2DModel", **dataclasses.asdict(self)}

    def build(self, rngs: nnx.Rngs) -> UNet2D:
        """The network, freshly initialised."""
        return UNet2D(self, rngs)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that the network denoises."""
        size = self.sample_size * self.patch_size
        return size, size, self.in_channels // self.patch_size**2

    @property
    def learns_variance(self) -> bool:
        """Whether half of the output is v."""
        return self.out_channels == 2 * self.in_channels


def _time_dim(config: UNet2DConfig) -> int:
    return config.time_embedding_dim or 4 * config.block_out_channels[0]


def _norm(channels: int, config: UNet2DConfig) -> GroupNorm:
    return GroupNorm(channels, config.norm_num_groups, config.norm_eps)


class ResnetBlock(nnx.Module):
    """norm, act, conv, time, norm, act, conv, + skip (diffusers `ResnetBlock2D`); divided by `scale` at the end."""

    def __init__(self, c_in: int, c_out: int, config: UNet2DConfig, rngs: nnx.Rngs, scale: float = 1):
        self.modulates = config.resnet_time_scale_shift == "scale_shift"
        self.act = _ACTIVATIONS[config.act_fn]
        self.scale = scale
        self.norm1 = _norm(c_in, config)
        self.conv1 = conv(c_in, c_out, 3, rngs=rngs)
        self.time_emb_proj = Linear(_time_dim(config), (1 + self.modulates) * c_out, rngs=rngs)
        self.norm2 = _norm(c_out, config)
        self.conv2 = conv(c_out, c_out, 3, rngs=rngs, init=zeros)
        if c_in != c_out:
            self.conv_shortcut = conv(c_in, c_out, 1, rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        h = self.conv1(self.act(self.norm1(x)))
        time = self.time_emb_proj(self.act(temb))[:, None, None]
        if self.modulates:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.act(h)) + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)
        return h / self.scale if self.scale != 1 else h


class Attention(nnx.Module):
    """Self-attention over the pixels, residual; divided by `scale` at the end."""

    def __init__(self, channels: int, config: UNet2DConfig, rngs: nnx.Rngs, norm: GroupNorm | None, scale: float = 1):
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
    def __init__(self, channels: int, config: UNet2DConfig, rngs: nnx.Rngs):
        # diffusers: padding 0 means one row below and one column to the right.
        pad = (config.downsample_padding, 1)
        self.conv = conv(channels, channels, 3, stride=2, padding=(pad, pad), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(upsample(x))


class Block(nnx.Module):
    """The resnets, attentions and the resampler of one level, down or up."""

    def __init__(self, channels: list[tuple[int, int]], attention: bool, config: UNet2DConfig, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(a, b, config, rngs) for a, b in channels])
        if attention:
            self.attentions = nnx.List([Attention(b, config, rngs, _norm(b, config)) for _, b in channels])

    def layer(self, j: int, h: jax.Array, temb: jax.Array) -> jax.Array:
        h = self.resnets[j](h, temb)
        return self.attentions[j](h) if hasattr(self, "attentions") else h


class TimeEmbedding(nnx.Module):
    def __init__(self, config: UNet2DConfig, rngs: nnx.Rngs):
        self.linear_1 = Linear(config.block_out_channels[0], _time_dim(config), rngs=rngs)
        self.linear_2 = Linear(_time_dim(config), _time_dim(config), rngs=rngs)

    def __call__(self, emb: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(emb)))


class MidBlock(nnx.Module):
    def __init__(self, channels: int, config: UNet2DConfig, rngs: nnx.Rngs):
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

    def __init__(self, config: UNet2DConfig, rngs: nnx.Rngs):
        widths, layers = config.block_out_channels, config.layers_per_block
        self.config = config
        self.time_embedding = TimeEmbedding(config, rngs)
        self.conv_in = conv(config.in_channels, widths[0], 3, rngs=rngs)
        skips = [widths[0]]  # channels of what is pushed on the way down, popped on the way up
        down = []
        c = widths[0]
        for i, width in enumerate(widths):
            pairs = [(c if j == 0 else width, width) for j in range(layers)]
            block = Block(pairs, _ATTENTION[config.down_block_types[i]], config, rngs)
            skips += [width] * layers
            if i + 1 < len(widths):
                block.downsamplers = nnx.List([Downsample(width, config, rngs)])
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
            block = Block(pairs, _ATTENTION[config.up_block_types[i]], config, rngs)
            if i + 1 < len(widths):
                block.upsamplers = nnx.List([Upsample(width, rngs)])
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
                h = block.downsamplers[0](h)
                skips.append(h)
        h = run(self.mid_block, h, temb)
        for block in self.up_blocks:
            for j in range(cfg.layers_per_block + 1):
                h = run(functools.partial(block.layer, j), jnp.concatenate([h, skips.pop()], axis=-1), temb)
            if hasattr(block, "upsamplers"):
                h = block.upsamplers[0](h)
        # In float32: eps is divided by sqrt(abar), 0.006 at the noisiest step, and bfloat16 keeps three digits of it.
        h = self.conv_out(jax.nn.silu(self.conv_norm_out(h.astype(np.promote_types(h.dtype, np.float32)))))
        return depth_to_space(h, cfg.patch_size)
