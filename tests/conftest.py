"""Strict JAX for every test, and the toy priors whose mathematics is known."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `experiments` is a package of the repository, not installed

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Before the first array is made, in every xdist worker: the number of devices is fixed by then.
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)

from gdiff_jax import modules
from gdiff_jax.priors import Denoiser, UNet2DConfig
from gdiff_jax.schedule import make_betas


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianDenoiser:
    """The exact eps for images drawn from N(mean, cov): sqrt(1 - abar) (abar cov + (1 - abar) I)^-1 (x_t - sqrt(abar) mean)."""

    mean: jax.Array  # (n,)
    cov: jax.Array  # (n, n)
    abar: jax.Array  # (T,)
    basis: jax.Array  # (n, n) eigenvectors of cov, and
    values: jax.Array  # (n,) its eigenvalues
    v: jax.Array | None = None  # (H, W, C), a variance output that does not depend on x_t

    def __call__(self, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        abar = self.abar[t]
        whitened = (self.basis.T @ (x_t.ravel() - jnp.sqrt(abar) * self.mean)) / (abar * self.values + 1 - abar)
        return (jnp.sqrt(1 - abar) * (self.basis @ whitened)).reshape(x_t.shape), self.v


@pytest.fixture(scope="session")
def gaussian() -> GaussianDenoiser:
    """A correlated Gaussian prior of 6 pixels, shape (2, 3, 1), trained with DDPM's betas."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6)) / np.sqrt(6)
    cov = root @ root.T + 0.1 * np.eye(6)
    values, basis = np.linalg.eigh(cov)
    arrays = (rng.normal(size=6), cov, np.cumprod(1 - make_betas()), basis, values)
    return GaussianDenoiser(*(jnp.asarray(a, jnp.float32) for a in arrays))


@pytest.fixture(scope="session")
def tiny_unet() -> Denoiser:
    """An 8 x 8 x 1 U-Net with attention and random weights; none is zero, so every path carries signal."""
    config = UNet2DConfig(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    params = modules.init_params(jax.random.key(0), config)
    keys = jax.random.split(jax.random.key(1), len(params))
    params = {name: p + 0.05 * jax.random.normal(k, p.shape) for k, (name, p) in zip(keys, params.items(), strict=True)}
    return Denoiser(params, config)
