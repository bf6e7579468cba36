"""The U-Net of ADM (Dhariwal & Nichol 2021, *Diffusion models beat GANs*), as guided-diffusion and DPS's FFHQ-256 have it.

Attributes carry guided-diffusion's names (`input_blocks.4.0.in_layers.2`), whose indices run flat over all levels, so
converting a checkpoint is a change of layout. The config fields are that code's command-line flags, with its defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
    norm_with_time,
    timestep_embedding,
    upsample,
    upsampling_conv,
    zeros,
)
from gdiff_jax.schedule import VarianceType, make_betas

# What an empty `channel_mult` means, by image size.
_MULTIPLIERS = {512: "0.5,1,1,2,2,4,4", 256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4"}

# Flags of training and sampling that change neither the weights' names nor what they compute.
_IGNORED = {
    "dropout",
    "use_checkpoint",
    "use_fp16",
    "use_kl",
    "rescale_learned_sigmas",
    "timestep_respacing",
    "model_path",
}
_ONLY = {"class_cond": False, "predict_xstart": False, "rescale_timesteps": False, "num_heads_upsample": -1}


@dataclasses.dataclass(frozen=True)
class ADMConfig:
    """The flags of guided-diffusion that decide the network and its diffusion; defaults are those of that code."""

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    channel_mult: str = ""  # comma-separated multiples of num_channels, a level each; empty means by image_size
    attention_resolutions: str = "16,8"  # comma-separated sizes in pixels
    num_heads: int = 4
    num_head_channels: int = -1  # wins over num_heads unless -1
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    learn_sigma: bool = False
    sigma_small: bool = False
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"

    def __post_init__(self) -> None:
        for name, most in (("image_size", 4096), ("num_channels", 4096), ("num_res_blocks", 64), ("diffusion_steps", 10**5)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} {value!r} must be an integer in 1..{most}")
        if self.num_heads < 1 or (self.num_head_channels < 1 and self.num_head_channels != -1):
            raise ValueError(
                f"num_heads {self.num_heads} must be at least 1, num_head_channels {self.num_head_channels} at least 1 or -1"
            )
        if not self.channel_mult and self.image_size not in _MULTIPLIERS:
            raise ValueError(f"channel_mult is needed for image_size {self.image_size}, such as '1,2,2'")
        if self.image_size % 2 ** (len(self.widths) - 1):
            raise ValueError(f"image_size {self.image_size} cannot be halved {len(self.widths) - 1} times; see channel_mult")
        for width in self.widths:
            if width % 32 or width < 1:
                raise ValueError(f"channels {width} of a level must be a multiple of 32, the groups of its norms")
        sizes = [self.image_size // 2**level for level in range(len(self.widths))]
        attended = [width for width, size in zip(self.widths, sizes, strict=True) if size in self.attention_sizes]
        for width in [*attended, self.widths[-1]]:
            divisor = self.num_heads if self.num_head_channels == -1 else self.num_head_channels
            if width % divisor:
                raise ValueError(f"attention: {width} channels are no multiple of num_head_channels or num_heads {divisor}")
        if self.noise_schedule not in ("linear", "cosine"):
            raise ValueError(f"noise_schedule {self.noise_schedule!r} is not implemented; implemented: linear, cosine")
        if not np.all((self.betas > 0) & (self.betas < 1)):
            raise ValueError(f"diffusion_steps {self.diffusion_steps} are too few: betas reach {self.betas.max()}")

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> ADMConfig:
        """Config from guided-diffusion's flags, as a dict of values or of their text.

        Raises:
          ValueError: naming each flag that is unknown, and each value that is not implemented.
        """
        types = {f.name: type(f.default) for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        bad = []
        for name, value in flags.items():
            if name in types:
                try:
                    values[name] = _parse(value, types[name])
                except (ValueError, TypeError, OverflowError):
                    bad.append(f"{name}={value!r} (a {types[name].__name__} is needed)")
            elif name in _ONLY:
                if value not in (_ONLY[name], str(_ONLY[name])):
                    bad.append(f"{name}={value!r} (implemented: {_ONLY[name]!r})")
            elif name not in _IGNORED:
                bad.append(f"{name}={value!r} (unknown flag)")
        if bad:
            raise ValueError("these ADM flags cannot be used: " + "; ".join(bad))
        return cls(**values)

    def build(self, rngs: nnx.Rngs) -> ADM:
        """The network, freshly initialised."""
        return ADM(self, rngs)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that the network denoises."""
        return self.image_size, self.image_size, 3

    @property
    def learns_variance(self) -> bool:
        """Whether half of the output is v."""
        return self.learn_sigma

    @property
    def betas(self) -> np.ndarray:
        """(T,) float64. The linear ones keep their integral when T is not 1000."""
        if self.noise_schedule == "cosine":
            return make_betas("squaredcos_cap_v2", self.diffusion_steps)
        scale = 1000 / self.diffusion_steps
        return make_betas("linear", self.diffusion_steps, scale * 1e-4, scale * 0.02)

    @property
    def variance(self) -> VarianceType:
        if self.learn_sigma:
            return "learned_range"
        return "fixed_small" if self.sigma_small else "fixed_large"

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        text = self.channel_mult or _MULTIPLIERS[self.image_size]
        try:
            return [int(float(m) * self.num_channels) for m in text.split(",")]
        except (ValueError, OverflowError):
            raise ValueError(f"channel_mult {text!r} must be numbers with commas between, such as '1,2,2'") from None

    @property
    def attention_sizes(self) -> set[int]:
        try:
            return {int(size) for size in self.attention_resolutions.split(",") if size}
        except ValueError:
            raise ValueError(
                f"attention_resolutions {self.attention_resolutions!r} must be sizes in pixels with commas between"
            ) from None

    def heads(self, channels: int) -> int:
        return self.num_heads if self.num_head_channels == -1 else channels // self.num_head_channels


def _parse(value: Any, kind: type) -> Any:
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise ValueError
        return str(value).lower() == "true"
    if kind is str:
        if isinstance(value, (list, tuple)):
            return ",".join(map(str, value))
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError
        return str(value)
    if isinstance(value, (bool, float)):
        raise ValueError
    return int(value)


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(channels, 32, 1e-5)


class ResBlock(nnx.Module):
    """norm, silu, [resample], conv, time, norm, silu, conv, + skip; `resample` halves or doubles both branches."""

    def __init__(self, c_in: int, c_out: int, config: ADMConfig, rngs: nnx.Rngs, resample: Any = None):
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

    def __init__(self, channels: int, config: ADMConfig, rngs: nnx.Rngs):
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
    """(N, H, W, 3) and (N,) -> (N, H, W, 3 or 6), float32: eps, and v where it is learned; blocks in the dtype of x."""

    def __init__(self, config: ADMConfig, rngs: nnx.Rngs):
        self.config = config
        widths, size, c = config.widths, config.image_size, config.widths[0]
        emb = 4 * config.num_channels
        first = Linear(config.num_channels, emb, rngs=rngs)
        self.time_embed = nnx.List([first, jax.nn.silu, Linear(emb, emb, rngs=rngs)])

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

    def __call__(self, x: jax.Array, t: jax.Array, remat: bool = False) -> jax.Array:
        run = block_runner(remat)
        emb = timestep_embedding(t, self.config.num_channels, freq_shift=0, flip_sin_to_cos=True)
        emb = self.time_embed[2](jax.nn.silu(self.time_embed[0](emb))).astype(x.dtype)
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
