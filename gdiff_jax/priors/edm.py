"""The networks of EDM (Karras et al. 2022, arXiv 2206.00364): SongUNet, which is DDPM++ or NCSN++, and DhariwalUNet, its ADM.

Attributes carry that code's names (`enc.16x16_block0.conv0`), so converting a state dict is a change of layout. The two have
the block and the way through the levels in common; what they predict is `parametrisation.EDM`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gdiff_jax.modules import GroupNorm, Linear
from gdiff_jax.priors.edm_fields import EDMFields
from gdiff_jax.priors.layers import (
    attend,
    average_pool,
    block_runner,
    conv,
    fir_downsample,
    fir_upsample,
    norm_with_time,
    timestep_embedding,
    upsample,
    zeros,
)

Resample = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class EDMConfig(EDMFields):
    """The arguments of an EDM network."""

    def build(self, rngs: nnx.Rngs) -> EDMNetwork:
        """The network, freshly initialised."""
        return EDMNetwork(self, rngs)


def _halve(config: EDMFields) -> Resample:
    return average_pool if config.resample_filter == (1, 1) else fir_downsample


def _double(config: EDMFields) -> Resample:
    return upsample if config.resample_filter == (1, 1) else fir_upsample


def _is_song(config: EDMFields) -> bool:
    return config.model_type == "SongUNet"


def _norm(channels: int, config: EDMFields) -> GroupNorm:
    return GroupNorm(channels, min(32, channels // 4), 1e-6 if _is_song(config) else 1e-5)


class UNetBlock(nnx.Module):
    """norm, silu, [resample], conv, time, norm, silu, conv, + skip, and attention; a SongUNet's divides each sum by sqrt(2)."""

    def __init__(
        self, c_in: int, c_out: int, config: EDMFields, rngs: nnx.Rngs, attends: bool = False, resample: Resample | None = None
    ):
        song = _is_song(config)
        self.resample = resample
        self.modulates = not song
        self.scale = math.sqrt(0.5) if song else 1
        self.norm0 = _norm(c_in, config)
        self.conv0 = conv(c_in, c_out, 3, rngs=rngs)
        self.affine = Linear(config.model_channels * config.channel_mult_emb, (1 + self.modulates) * c_out, rngs=rngs)
        self.norm1 = _norm(c_out, config)
        self.conv1 = conv(c_out, c_out, 3, rngs=rngs, init=zeros)
        if c_in != c_out or (song and resample is not None):
            self.skip = conv(c_in, c_out, 1, rngs=rngs)
        self.heads = 1 if song else c_out // 64  # none, so no attention, of fewer channels: as EDM has it
        if attends and self.heads:
            self.norm2 = _norm(c_out, config)
            self.qkv = Linear(c_out, 3 * c_out, rngs=rngs)
            self.proj = Linear(c_out, c_out, rngs=rngs, init=zeros)

    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        h = jax.nn.silu(self.norm0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = norm_with_time(self.norm1, self.conv0(h), self.affine(emb), self.modulates)
        h = self.conv1(jax.nn.silu(h)) + (self.skip(x) if hasattr(self, "skip") else x)
        h = h * self.scale
        if not hasattr(self, "qkv"):
            return h
        n, height, width, c = h.shape
        qkv = self.qkv(self.norm2(h).reshape(n, height * width, c)).reshape(n, height * width, self.heads, -1, 3)
        q, k, v = jnp.unstack(qkv, axis=-1)
        return (h + self.proj(attend(q, k, v).reshape(n, height * width, c)).reshape(h.shape)) * self.scale


class Frequencies(nnx.Module):
    """Sines and cosines at frequencies that were drawn once, and are in the weights."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(16 * jax.random.normal(rngs.params(), (channels // 2,), jnp.float32))

    def __call__(self, t: jax.Array) -> jax.Array:
        angles = t[:, None] * (2 * np.pi * self.weight[...])[None, :]
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class EDMNetwork(nnx.Module):
    """(N, H, W, C), time (N,), label (N,) if conditional -> (N, H, W, C), float32; the blocks compute in the dtype of x."""

    def __init__(self, config: EDMFields, rngs: nnx.Rngs):
        self.config = config
        song, width = _is_song(config), config.model_channels
        wide = width * config.channel_mult_emb
        noise = width * config.channel_mult_noise
        if config.embedding_type == "fourier":
            self.map_noise = Frequencies(noise, rngs)
        self.map_layer0, self.map_layer1 = Linear(noise, wide, rngs=rngs), Linear(wide, wide, rngs=rngs)
        if config.label_dim:
            self.map_label = Linear(config.label_dim, noise if song else wide, rngs=rngs, bias=song)
        self.enc, skips = nnx.Dict(), []
        c = aux = config.img_channels
        for level, times in enumerate(config.channel_mult):
            size = config.img_resolution >> level
            at = f"{size}x{size}"
            if level == 0:
                out = width if song else width * times
                self.enc[f"{at}_conv"] = conv(c, out, 3, rngs=rngs)
                c = out
            else:
                self.enc[f"{at}_down"] = UNetBlock(c, c, config, rngs, resample=_halve(config))
                if config.encoder_type == "skip":
                    self.enc[f"{at}_aux_skip"] = conv(aux, c, 1, rngs=rngs)
                elif config.encoder_type == "residual":
                    beyond = len(config.resample_filter) // 2  # the image, by as much as the filter and it reach together
                    self.enc[f"{at}_aux_residual"] = conv(aux, c, 3, rngs=rngs, padding=((beyond, beyond), (beyond, beyond)))
                    aux = c
            skips.append(c)
            for i in range(config.num_blocks):
                self.enc[f"{at}_block{i}"] = UNetBlock(c, width * times, config, rngs, size in config.attn_resolutions)
                c = width * times
                skips.append(c)
        self.dec = nnx.Dict()
        lowest = len(config.channel_mult) - 1
        for level, times in reversed(list(enumerate(config.channel_mult))):
            size = config.img_resolution >> level
            at = f"{size}x{size}"
            if level == lowest:
                self.dec[f"{at}_in0"] = UNetBlock(c, c, config, rngs, True)
                self.dec[f"{at}_in1"] = UNetBlock(c, c, config, rngs)
            else:
                self.dec[f"{at}_up"] = UNetBlock(c, c, config, rngs, resample=_double(config))
            for i in range(config.num_blocks + 1):
                attends = size in config.attn_resolutions and (i == config.num_blocks or not song)
                self.dec[f"{at}_block{i}"] = UNetBlock(c + skips.pop(), width * times, config, rngs, attends)
                c = width * times
            if song and (level == 0 or config.decoder_type == "skip"):
                self.dec[f"{at}_aux_norm"] = _norm(c, config)
                self.dec[f"{at}_aux_conv"] = conv(c, config.img_channels, 3, rngs=rngs, init=zeros)
        if not song:
            self.out_norm = _norm(c, config)
            self.out_conv = conv(c, config.img_channels, 3, rngs=rngs, init=zeros)

    def _embedded(self, t: jax.Array, label: jax.Array | None) -> jax.Array:
        """(N, model_channels channel_mult_emb), of the time and of the label; the number after the last class is none."""
        cfg, song = self.config, _is_song(self.config)
        if cfg.embedding_type == "fourier":
            emb = self.map_noise(t)
        else:
            emb = timestep_embedding(
                t, cfg.model_channels * cfg.channel_mult_noise, freq_shift=int(song), flip_sin_to_cos=not song
            )
        of_label = None if label is None else jax.nn.one_hot(label, cfg.label_dim, dtype=jnp.float32)
        if of_label is not None and song:
            emb = emb + self.map_label(of_label * cfg.label_dim**0.5)
        emb = self.map_layer1(jax.nn.silu(self.map_layer0(emb)))
        if of_label is not None and not song:
            emb = emb + self.map_label(of_label)
        return jax.nn.silu(emb)

    def __call__(self, x: jax.Array, t: jax.Array, remat: bool = False, label: jax.Array | None = None) -> jax.Array:
        cfg, run = self.config, block_runner(remat)
        emb = self._embedded(t, label).astype(x.dtype)
        sizes = [f"{cfg.img_resolution >> level}x{cfg.img_resolution >> level}" for level in range(len(cfg.channel_mult))]
        image, h, skips = x, x, []
        for level, at in enumerate(sizes):
            h = run(self.enc[f"{at}_down"], h, emb) if level else self.enc[f"{at}_conv"](h)
            if level and cfg.encoder_type == "skip":
                image = _halve(cfg)(image)
                h = h + self.enc[f"{at}_aux_skip"](image)
            elif level and cfg.encoder_type == "residual":
                of_image = self.enc[f"{at}_aux_residual"](image)
                halved = average_pool(of_image) if cfg.resample_filter == (1, 1) else fir_downsample(of_image, padding=0)
                h = image = (h + halved) * math.sqrt(0.5)
            skips.append(h)
            for i in range(cfg.num_blocks):
                h = run(self.enc[f"{at}_block{i}"], h, emb)
                skips.append(h)
        shown = None  # of the image, by the levels whose own output is asked for
        for level, at in reversed(list(enumerate(sizes))):
            if level == len(sizes) - 1:
                h = run(self.dec[f"{at}_in1"], run(self.dec[f"{at}_in0"], h, emb), emb)
            else:
                h = run(self.dec[f"{at}_up"], h, emb)
            for i in range(cfg.num_blocks + 1):
                h = run(self.dec[f"{at}_block{i}"], jnp.concatenate([h, skips.pop()], axis=-1), emb)
            if f"{at}_aux_conv" in self.dec:
                own = self._image_of(self.dec[f"{at}_aux_norm"], self.dec[f"{at}_aux_conv"], h)
                shown = own if shown is None else own + _double(cfg)(shown)
        return self._image_of(self.out_norm, self.out_conv, h) if shown is None else shown

    @staticmethod
    def _image_of(norm: GroupNorm, last: nnx.Module, h: jax.Array) -> jax.Array:
        """In float32, as bfloat16 keeps three digits of what is added to the image."""
        return last(jax.nn.silu(norm(h.astype(np.promote_types(h.dtype, np.float32)))))
