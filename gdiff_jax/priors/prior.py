"""A pretrained prior as a callable pytree, loaded from where such priors are published, and written as a folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from gdiff_jax import modules
from gdiff_jax.modules import Params
from gdiff_jax.priors import cache, sources, weights
from gdiff_jax.priors.adm import ADMConfig
from gdiff_jax.priors.unet2d_config import UNet2DConfig
from gdiff_jax.schedule import Schedule, Spacing, VarianceType


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Denoiser:
    """`eps, v = denoise(x_t, t)` for one image; a pytree whose leaves are the weights, so jit takes them as arguments.

    Attributes:
      params: flat dict of float32 arrays.
      config: the network.
      dtype: of the network's arithmetic. The time embedding, statistics, softmax, the last convolution and what is
        returned are float32 always.
      remat: keep only the inputs of each block for the backward pass and compute the rest again. Of use on a GPU or TPU;
        on a CPU XLA computes it again early and keeps it all the same (measured: more time, no less memory).
    """

    params: Params
    config: UNet2DConfig | ADMConfig = dataclasses.field(metadata=dict(static=True))
    dtype: str = dataclasses.field(default="float32", metadata=dict(static=True))
    remat: bool = dataclasses.field(default=False, metadata=dict(static=True))

    def __call__(self, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """eps of one image x_t (H, W, C) at integer timestep t (scalar), and v of its shape, or None if v is not learned."""
        eps, v = self.batch(x_t[None], jnp.asarray(t)[None])
        return eps[0], None if v is None else v[0]

    def batch(self, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """eps and v of a batch (N, H, W, C) at timesteps (N,)."""
        out = modules.apply(self.config, self.params, x_t.astype(self.dtype), t, self.remat).astype(jnp.float32)
        if not self.config.learns_variance:
            return out, None
        eps, v = jnp.split(out, 2, axis=-1)
        return eps, v


@dataclasses.dataclass(frozen=True)
class Prior:
    """A denoiser with what is needed to sample from it and to cite it."""

    denoise: Denoiser
    betas: np.ndarray  # (T,), float64
    variance: VarianceType
    name: str
    sha256: str  # of the weight file; "" for a prior that was never written
    mean_image: np.ndarray | None = None  # (H, W, C) in [-1, 1]: mean of the training data, the guess that knows nothing else
    clip: bool = True  # whether its scheduler clips x0hat to [-1, 1] in every step
    revision: str = ""  # commit of the hub repository that it came from

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.denoise.config.image_shape

    def schedule(self, num_steps: int | None = None, spacing: Spacing = "quadratic") -> Schedule:
        """The prior's own schedule, respaced to num_steps.

        Quadratic spacing is the default because guided sampling gains by it: at 100 steps of the bundled prior the
        gradient is matched more closely than with uniform spacing.
        """
        return Schedule.create(self.betas, num_steps, self.variance, spacing)


def save_prior(folder: str | os.PathLike[str], prior: Prior, scheduler: dict[str, Any]) -> None:
    """Writes the prior as a folder that `load_prior` reads; the weights come last and appear whole or not at all.

    Args:
      folder: created if absent.
      prior: a UNet2D's; its params are stored in float16.
      scheduler: dict of `scheduler_config.json` (beta_schedule, beta_start, beta_end, num_train_timesteps, variance_type).
    """
    folder = Path(folder)
    save_configs(folder, prior.denoise.config, scheduler)
    if prior.mean_image is not None:
        np.save(folder / "mean_image.npy", prior.mean_image.astype(np.float16))
    partial = folder / "weights.partial"
    safetensors.numpy.save_file(weights.to_torch(prior.denoise.params), partial)
    os.replace(partial, folder / "diffusion_pytorch_model.fp16.safetensors")


def save_configs(folder: Path, config: UNet2DConfig | ADMConfig, scheduler: dict[str, Any]) -> None:
    """`config.json` and `scheduler_config.json` as diffusers has them."""
    if not isinstance(config, UNet2DConfig):
        raise ValueError("only a UNet2D can be written in diffusers' layout")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_diffusers(), indent=2) + "\n")
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")


def load_prior(
    source: str | os.PathLike[str], dtype: str = "float32", *, remat: bool = False, config: Mapping[str, Any] | None = None
) -> Prior:
    """The prior of a source, without torch.

    Args:
      source: one of
        - a bundled name (`gdiff_jax.priors.BUNDLED`);
        - a folder in diffusers' layout, root (`config.json`, `scheduler_config.json` and the weights) or pipeline
          (`unet/`, `scheduler/`), with `.safetensors` or zip-format `.bin` weights of a `UNet2DModel`;
        - OWNER/NAME or OWNER/NAME@REVISION of such a folder on diffusers' hub, which is downloaded once;
        - an ADM (guided-diffusion) file, `.pt` or `.safetensors`, with its flags in NAME.json beside it or in `config`;
        - the output folder of `experiments/train_prior.py`, finished or not: its latest moving average.
      dtype: of the network's arithmetic, `float32` or `bfloat16`.
      remat: see `Denoiser`.
      config: guided-diffusion's flags of an ADM file.

    Returns:
      The prior. Converted weights are kept in the user's cache (GDIFF_JAX_CACHE overrides where), by the digest of the file.

    Raises:
      FileNotFoundError: where there is nothing of that name, or a file is missing.
      ValueError: where config and weights are broken, not implemented, or do not fit each other, naming what does not.
    """
    name = os.fspath(source)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is not known; use float32 or bfloat16")
    try:
        found = sources.find(name, config)
        if found.diffusion.variance == "learned_range" and not found.config.learns_variance:
            raise ValueError("its scheduler wants a learned variance, its network has no output for it")
        if found.weights.is_dir():
            params, digest = cache.latest_ema(found.weights, found.config)
        else:
            digest = weights.sha256(found.weights)
            convert = lambda: weights.to_params(found.config, weights.read_tensors(found.weights), name)
            about = {"source": name, "revision": found.revision, "sha256": digest}
            params = convert() if name in sources.BUNDLED else cache.cached(found.config, convert, about)
        mean = None if found.mean_image is None else np.load(found.mean_image, allow_pickle=False).astype(np.float32)
        if mean is not None and mean.shape != found.config.image_shape:
            raise ValueError(f"mean_image.npy is {mean.shape}, the network takes {found.config.image_shape}")
    except ValueError as error:
        text = str(error)
        raise ValueError(text if repr(name) in text else f"prior {name!r}: {text}") from None
    return Prior(
        denoise=Denoiser(params, found.config, dtype, remat),
        betas=found.diffusion.betas,
        variance=found.diffusion.variance,
        name=name,
        sha256=digest,
        mean_image=mean,
        clip=found.diffusion.clip,
        revision=found.revision,
    )
