"""A small vision transformer (Dosovitskiy et al., ICLR 2021): pre-norm blocks, learned positions, mean of the tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gdiff_jax.modules import LayerNorm, Linear
from gdiff_jax.victims.networks import Classifier


class TransformerBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), GELU."""

    def __init__(self, dim: int, heads: int, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(dim)
        self.qkv = Linear(dim, 3 * dim, rngs=rngs)
        self.out = Linear(dim, dim, rngs=rngs)
        self.norm2 = LayerNorm(dim)
        self.mlp1 = Linear(dim, 2 * dim, rngs=rngs)
        self.mlp2 = Linear(2 * dim, dim, rngs=rngs)
        self.heads = heads

    def __call__(self, x: jax.Array) -> jax.Array:
        n, tokens, dim = x.shape
        q, k, v = jnp.split(self.qkv(self.norm1(x)).reshape(n, tokens, self.heads, -1), 3, axis=-1)
        weights = jax.nn.softmax(jnp.einsum("nqhc,nkhc->nhqk", q, k) / q.shape[-1] ** 0.5)
        x = x + self.out(jnp.einsum("nhqk,nkhc->nqhc", weights, v).reshape(n, tokens, dim))
        return x + self.mlp2(jax.nn.gelu(self.mlp1(self.norm2(x))))


class ViT(Classifier):
    """Patches of 4 x 4 pixels, 64 channels, two blocks of four heads."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        rngs: nnx.Rngs,
        patch: int = 4,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
    ):
        h, w, c = image_shape
        if h % patch or w % patch:
            raise ValueError(f"a ViT with patches of {patch} px needs images of a multiple of it, not {h} x {w}")
        self.patch = patch
        self.embed = Linear(patch * patch * c, dim, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (h * w // patch**2, dim)))
        self.blocks = nnx.List([TransformerBlock(dim, heads, rngs) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        self.fc = Linear(dim, num_classes, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        n, h, w, c = x.shape
        p = self.patch
        x = x.reshape(n, h // p, p, w // p, p, c).swapaxes(2, 3).reshape(n, h * w // p**2, p * p * c)
        x = self.embed(x)
        x = x + self.position[...].astype(x.dtype)[None]
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)
