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
from flax import nnx

from gdiff_jax.conv import conv_prior
from gdiff_jax.modules import Conv, GroupNorm, Linear

_ATTENTION = {"DownBlock2D": False, "UpBlock2D": False, "AttnDownBlock2D": True, "AttnUpBlock2D": True}

# Fields that diffusers' config may hold and that only one value of is implemented.
_ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu",),
    "attn_norm_num_groups": (None,),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
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
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    downsample_padding: Literal[0, 1] = 1
    dropout: float = 0.0
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
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
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"downsample_padding {self.downsample_padding} is not implemented; use 0 or 1")
        for name, divisor in (
            ("norm_num_groups", self.norm_num_groups),
            ("attention_head_dim", self.attention_head_dim or 1),
        ):
            if divisor < 1 or any(width % divisor for width in self.block_out_channels):
                raise ValueError(f"{name} {divisor} does not divide all of block_out_channels {self.block_out_channels}")
        factor = 2 ** (blocks - 1)
        if self.sample_size % factor:
            raise ValueError(f"sample_size {self.sample_size} cannot be halved {blocks - 1} times; use a multiple of {factor}")

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
            elif name not in _ONLY:
                bad.append(f"{name}={value!r} (unknown field)")
            elif value not in _ONLY[name]:
                bad.append(f"{name}={value!r} (implemented: {_ONLY[name][0]!r})")
        if not isinstance(config.get("sample_size"), int):
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


def space_to_depth(x: jax.Array, p: int) -> jax.Array:
    """(N, H, W, C) -> (N, H/p, W/p, C p p), channels ordered as torch's pixel_unshuffle: c slowest, then row, column."""
    n, h, w, c = x.shape
    return x.reshape(n, h // p, p, w // p, p, c).transpose(0, 1, 3, 5, 2, 4).reshape(n, h // p, w // p, c * p * p)


def depth_to_space(x: jax.Array, p: int) -> jax.Array:
    """Inverse of `space_to_depth`."""
    n, h, w, c = x.shape
    return x.reshape(n, h, w, c // p**2, p, p).transpose(0, 1, 4, 2, 5, 3).reshape(n, h * p, w * p, c // p**2)


def timestep_embedding(t: jax.Array, dim: int, freq_shift: int, flip_sin_to_cos: bool) -> jax.Array:
    """Sinusoidal embedding (N,) -> (N, dim), float32: sines then cosines, unless flipped."""
    half = dim // 2
    freqs = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * freqs[None, :]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


_conv = functools.partial(Conv, conv=conv_prior)
# Zero at the start: a fresh residual branch is the identity and a fresh network predicts 0.
_zeros = nnx.initializers.zeros


def _norm(channels: int, config: UNet2DConfig) -> GroupNorm:
    return GroupNorm(channels, config.norm_num_groups, config.norm_eps)


class ResnetBlock(nnx.Module):
    """norm, silu, conv, + time, norm, silu, conv, + skip (diffusers `ResnetBlock2D`, time_scale_shift `default`)."""

    def __init__(self, c_in: int, c_out: int, config: UNet2DConfig, rngs: nnx.Rngs):
        self.norm1 = _norm(c_in, config)
        self.conv1 = _conv(c_in, c_out, 3, rngs=rngs)
        self.time_emb_proj = Linear(4 * config.block_out_channels[0], c_out, rngs=rngs)
        self.norm2 = _norm(c_out, config)
        self.conv2 = _conv(c_out, c_out, 3, rngs=rngs, init=_zeros)
        if c_in != c_out:
            self.conv_shortcut = _conv(c_in, c_out, 1, rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = h + self.time_emb_proj(jax.nn.silu(temb))[:, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nnx.Module):
    """Self-attention over the pixels, residual; the softmax is float32 whatever the dtype of the rest."""

    def __init__(self, channels: int, config: UNet2DConfig, rngs: nnx.Rngs):
        self.group_norm = _norm(channels, config)
        self.to_q = Linear(channels, channels, rngs=rngs)
        self.to_k = Linear(channels, channels, rngs=rngs)
        self.to_v = Linear(channels, channels, rngs=rngs)
        self.to_out = nnx.List([Linear(channels, channels, rngs=rngs, init=_zeros)])
        self.heads = channels // (config.attention_head_dim or channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        n, height, width, c = x.shape
        h = self.group_norm(x).reshape(n, height * width, c)
        q, k, v = (f(h).reshape(n, height * width, self.heads, -1) for f in (self.to_q, self.to_k, self.to_v))
        logits = jnp.einsum("nqhd,nkhd->nhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        h = jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, height * width, c)
        return x + self.to_out[0](h).reshape(x.shape)


class Downsample(nnx.Module):
    def __init__(self, channels: int, config: UNet2DConfig, rngs: nnx.Rngs):
        # diffusers: padding 0 means one row below and one column to the right.
        pad = (config.downsample_padding, 1)
        self.conv = _conv(channels, channels, 3, stride=2, padding=(pad, pad), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.conv = _conv(channels, channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        n, h, w, c = x.shape
        # Nearest neighbour by broadcast: a gather's gradient would be a scatter.
        x = jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)
        return self.conv(x)


class Block(nnx.Module):
    """The resnets, attentions and the resampler of one level, down or up."""

    def __init__(self, channels: list[tuple[int, int]], attention: bool, config: UNet2DConfig, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(a, b, config, rngs) for a, b in channels])
        if attention:
            self.attentions = nnx.List([Attention(b, config, rngs) for _, b in channels])

    def layer(self, j: int, h: jax.Array, temb: jax.Array) -> jax.Array:
        h = self.resnets[j](h, temb)
        return self.attentions[j](h) if hasattr(self, "attentions") else h


class TimeEmbedding(nnx.Module):
    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.linear_1 = Linear(channels, 4 * channels, rngs=rngs)
        self.linear_2 = Linear(4 * channels, 4 * channels, rngs=rngs)

    def __call__(self, emb: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(emb)))


class MidBlock(nnx.Module):
    def __init__(self, channels: int, config: UNet2DConfig, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(channels, channels, config, rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, config, rngs)])

    def __call__(self, h: jax.Array, temb: jax.Array) -> jax.Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](h, temb)), temb)


class UNet2D(nnx.Module):
    """eps(x_t, t): (N, H, W, C) and (N,) -> (N, H, W, out_channels / patch_size^2), in the dtype of x."""

    def __init__(self, config: UNet2DConfig, rngs: nnx.Rngs):
        widths, layers = config.block_out_channels, config.layers_per_block
        self.config = config
        self.time_embedding = TimeEmbedding(widths[0], rngs)
        self.conv_in = _conv(config.in_channels, widths[0], 3, rngs=rngs)
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
        self.conv_out = _conv(c, config.out_channels, 3, rngs=rngs, init=_zeros)

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        cfg = self.config
        emb = timestep_embedding(t, cfg.block_out_channels[0], cfg.freq_shift, cfg.flip_sin_to_cos)
        temb = self.time_embedding(emb.astype(x.dtype))
        h = self.conv_in(space_to_depth(x, cfg.patch_size))
        skips = [h]
        for block in self.down_blocks:
            for j in range(cfg.layers_per_block):
                h = block.layer(j, h, temb)
                skips.append(h)
            if hasattr(block, "downsamplers"):
                h = block.downsamplers[0](h)
                skips.append(h)
        h = self.mid_block(h, temb)
        for block in self.up_blocks:
            for j in range(cfg.layers_per_block + 1):
                h = block.layer(j, jnp.concatenate([h, skips.pop()], axis=-1), temb)
            if hasattr(block, "upsamplers"):
                h = block.upsamplers[0](h)
        h = self.conv_out(jax.nn.silu(self.conv_norm_out(h)))
        return depth_to_space(h, cfg.patch_size)
