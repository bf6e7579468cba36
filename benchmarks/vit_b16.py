"""ViT-B/16 of 86 M parameters, random weights, class token, 224 px: one image solved from its gradient, and in how long.

    python benchmarks/vit_b16.py --images=FOLDER --num_images=4

The network is plain Flax (linen): a patch embedding by convolution, a class token, learned positions, twelve blocks. From
the second image on the seconds are those of `algebra.solve` alone, its programs being compiled; the gradient takes longer.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import linen

from gdiff_jax import algebra, images

FLAGS = flags.FLAGS
SIZE, CLASSES = 224, 1000


class Block(linen.Module):
    """Pre-norm attention and MLP."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(12)(h, h)
        h = linen.gelu(linen.Dense(3072)(linen.LayerNorm()(x)))
        return x + linen.Dense(768)(h)


class ViTB16(linen.Module):
    """Dosovitskiy et al., ICLR 2021."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(768, (16, 16), strides=16, padding="VALID")(x[None]).reshape(1, -1, 768)
        x = jnp.concatenate([self.param("cls", linen.initializers.zeros, (1, 1, 768)), x], 1)
        x = x + self.param("positions", linen.initializers.normal(0.02), (1, x.shape[1], 768))
        for _ in range(12):
            x = Block()(x)
        return linen.Dense(CLASSES)(linen.LayerNorm()(x)[:, 0])[0]


def main(_: list[str]) -> None:
    network = ViTB16()
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((SIZE, SIZE, 3)))

    def loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
        return -jax.nn.log_softmax(network.apply(params, x))[y]

    print(f"{sum(p.size for p in jax.tree.leaves(params)):,} parameters, {jax.devices()[0].device_kind}")
    data = images.to_model(images.load_images(FLAGS.images, size=SIZE).images[: FLAGS.num_images])
    gradient, found = jax.jit(jax.grad(loss)), []
    for i, x in enumerate(data):
        leak = jax.device_get(gradient(params, jnp.asarray(x), jnp.asarray(i)))
        started = time.perf_counter()
        label = algebra.infer_label(loss, params, leak, x.shape)
        solution = algebra.solve(loss, params, leak, x.shape, label, check=False)
        seconds = time.perf_counter() - started
        assert label == i
        found.append(10 * np.log10(4 / np.mean(np.square(solution.image - x))))
        print(f"image {i}: {found[-1]:.1f} dB in {seconds:.2f} s; {'; '.join(solution.steps)}", flush=True)
    print(f"median {np.median(found):.1f} dB")


if __name__ == "__main__":
    flags.DEFINE_string("images", None, "a folder or .zip of pictures, cropped to squares and resized to 224 px", required=True)
    flags.DEFINE_integer("num_images", 4, "the first so many of them")
    app.run(main)
