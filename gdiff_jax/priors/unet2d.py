"""The U-Net of DDPM as diffusers' `UNet2DModel` defines it, NHWC, driven by the same config fields.

Attributes carry diffusers' names (`down_blocks.0.resnets.1.conv1`), so converting a checkpoint is a change of layout and
nothing else.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gdiff_jax.priors.layers import (
    Embedding,
    block_runner,
    conv,
    depth_to_space,
    fir_downsample,
    fir_upsample,
    space_to_depth,
    timestep_embedding,
    zeros,
)
from gdiff_jax.priors.unet2d_blocks import Block, Layer, MidBlock, SkipBlock, TimeEmbedding, group_norm, time_dim
from gdiff_jax.priors.unet2d_fields import UNet2DFields


class FourierProjection(nnx.Module):
    """Sines and cosines of log t at frequencies that were drawn once, and are in the weights."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(16 * jax.random.normal(rngs.params(), (channels,), jnp.float32))

    def __call__(self, t: jax.Array) -> jax.Array:
        angles = jnp.log(t.astype(jnp.float32))[:, None] * self.weight[...][None, :] * (2 * np.pi)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class UNet2D(nnx.Module):
    """(N, H, W, C), t (N,), label (N,) if conditional -> (N, H, W, C or 2 C), float32; the blocks compute in x's dtype."""

    def __init__(self, config: UNet2DFields, rngs: nnx.Rngs):
        widths, layers = config.block_out_channels, config.layers_per_block
        self.config = config
        c = widths[0]
        c_time = c
        if config.time_embedding_type == "fourier":
            self.time_proj: nnx.Module = FourierProjection(c, rngs)
            c_time = 2 * c
        elif config.time_embedding_type == "learned":
            assert config.num_train_timesteps is not None
            self.time_proj = Embedding(config.num_train_timesteps, c, rngs)
        self.time_embedding = TimeEmbedding(c_time, config, rngs)
        if config.class_embed_type == "timestep":
            self.class_embedding: nnx.Module = TimeEmbedding(c_time, config, rngs)
        elif config.class_embed_type is None and config.num_class_embeds is not None:
            self.class_embedding = Embedding(config.num_class_embeds, time_dim(config), rngs)
        self.conv_in = conv(config.in_channels, c, 3, rngs=rngs)

        def level(kind: str, channels: list[Layer], down: bool, last: bool) -> nnx.Module:
            return (SkipBlock if "Skip" in kind else Block)(kind, channels, config, rngs, down=down, last=last)

        skips = [c]  # channels of what is pushed on the way down, popped on the way up
        blocks = []
        for i, width in enumerate(widths):
            last = i + 1 == len(widths)
            channels = [(c if j == 0 else width, 0, width) for j in range(layers)]
            blocks.append(level(config.down_block_types[i], channels, True, last))
            skips += [width] * (layers + (not last))
            c = width
        self.down_blocks = nnx.List(blocks)
        if config.mid_block_type is not None:
            self.mid_block = MidBlock(c, config, rngs)
        blocks = []
        for i, width in enumerate(reversed(widths)):
            channels = []
            for _ in range(layers + 1):
                channels.append((c, skips.pop(), width))
                c = width
            blocks.append(level(config.up_block_types[i], channels, False, i + 1 == len(widths)))
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = group_norm(c, config)
        self.conv_out = conv(c, config.out_channels, 3, rngs=rngs, init=zeros)

    def _projected(self, t: jax.Array) -> jax.Array:
        """Of the time, or of a label that is embedded as one."""
        cfg = self.config
        if cfg.time_embedding_type != "positional":
            return self.time_proj(t)
        return timestep_embedding(t, cfg.block_out_channels[0], cfg.freq_shift, cfg.flip_sin_to_cos)

    def _embedded(self, t: jax.Array, label: jax.Array | None) -> jax.Array:
        """(N, time_dim), of the time, and of the label where the network is conditioned on one."""
        temb = self.time_embedding(self._projected(t))
        if label is None:
            return temb
        if self.config.class_embed_type == "identity":
            return temb + label
        return temb + self.class_embedding(self._projected(label) if self.config.class_embed_type == "timestep" else label)

    def __call__(self, x: jax.Array, t: jax.Array, remat: bool = False, label: jax.Array | None = None) -> jax.Array:
        cfg, run = self.config, block_runner(remat)
        temb = self._embedded(t, label).astype(x.dtype)
        x = 2 * x - 1 if cfg.center_input_sample else x
        image = space_to_depth(x, cfg.patch_size)
        h = self.conv_in(image)
        skips = [h]
        for block in self.down_blocks:
            for j in range(cfg.layers_per_block):
                h = run(functools.partial(block.layer, j), h, temb)
                skips.append(h)
            if hasattr(block, "downsamplers"):
                h = run(block.downsamplers[0], h, temb)
                skips.append(h)
            elif hasattr(block, "resnet_down"):
                image = fir_downsample(image)
                h = run(block.down, h, temb, image)
                skips.append(h)
        if cfg.mid_block_type is not None:
            h = run(self.mid_block, h, temb)
        shown = None  # what the levels of an NCSN++ have added to the image so far
        for block in self.up_blocks:
            for j in range(cfg.layers_per_block + 1):
                h = run(functools.partial(block.layer, j), jnp.concatenate([h, skips.pop()], axis=-1), temb)
            shown = None if shown is None else fir_upsample(shown)
            if hasattr(block, "upsamplers"):
                h = run(block.upsamplers[0], h, temb)
            elif hasattr(block, "resnet_up"):
                shown = block.shown(h) + (0 if shown is None else shown)
                h = run(block.resnet_up, h, temb)
        # In float32: eps is divided by sqrt(abar), 0.006 at the noisiest step, and bfloat16 keeps three digits of it.
        h = self.conv_out(jax.nn.silu(self.conv_norm_out(h.astype(np.promote_types(h.dtype, np.float32)))))
        h = h if shown is None else h + shown.astype(h.dtype)
        if cfg.time_embedding_type == "fourier":
            h = h / t.astype(h.dtype).reshape(-1, 1, 1, 1)
        return depth_to_space(h, cfg.patch_size)
