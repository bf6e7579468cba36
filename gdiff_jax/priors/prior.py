"""A pretrained prior as a callable pytree, loaded from where such priors are published, and written as a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from gdiff_jax.modules import Params
from gdiff_jax.parametrisation import Epsilon, Parametrisation
from gdiff_jax.priors import cache, shards, sources, weights
from gdiff_jax.priors.denoiser import Denoiser, Network
from gdiff_jax.priors.edm import EDMConfig
from gdiff_jax.priors.schedulers import read_scheduler
from gdiff_jax.priors.unet2d_config import UNet2DConfig
from gdiff_jax.schedule import Schedule, Spacing, VarianceType


@dataclasses.dataclass(frozen=True)
class Prior:
    """A denoiser with what is needed to sample from it and to cite it."""

    denoise: Denoiser
    betas: np.ndarray  # (T,), float64; where the network is continuous in time those of a table of T levels
    variance: VarianceType
    name: str
    sha256: str  # of the weight file, or over its shards; "" for a prior that was never written
    mean_image: np.ndarray | None = None  # (H, W, C) in [-1, 1]: mean of the training data, the guess that knows nothing else
    clip: bool = True  # whether its scheduler clips x0hat to [-1, 1] in every step
    revision: str = ""  # commit of the hub repository that it came from
    parametrisation: Parametrisation = Epsilon()  # what the network predicts

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.denoise.config.image_shape

    @property
    def expected_image(self) -> np.ndarray:
        """(H, W, C): `mean_image`, or mid-grey where it is not known."""
        return np.zeros(self.image_shape, np.float32) if self.mean_image is None else np.asarray(self.mean_image, np.float32)

    @property
    def settings_sha256(self) -> str:
        """Of all that decides its samples beside the weights: network, betas, variance, clip, prediction and mean image."""
        mean = b"" if self.mean_image is None else self.mean_image.tobytes()
        classes = (self.denoise.null_label, self.denoise.class_guidance)
        text = repr((self.denoise.config, self.parametrisation, self.variance, self.clip, *classes)).encode()
        return hashlib.sha256(text + np.asarray(self.betas, np.float64).tobytes() + mean).hexdigest()

    def schedule(self, num_steps: int | None = None, spacing: Spacing = "quadratic") -> Schedule:
        """The prior's own schedule, respaced to num_steps.

        Quadratic spacing is the default because guided sampling gains by it: at 100 steps of the bundled prior the
        gradient is matched more closely than with uniform spacing.
        """
        return Schedule.create(self.betas, num_steps, self.variance, spacing, self.parametrisation)


def _read_mean(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        mean = np.asarray(np.load(path, allow_pickle=False))
    except Exception as error:  # NumPy raises many types for a file that is no array
        raise ValueError(f"{path.name} cannot be read ({error})") from None
    if mean.shape != shape or mean.dtype.kind != "f":
        raise ValueError(f"{path.name} is {mean.dtype} {mean.shape}, floats of the network's {shape} are needed")
    if not np.all(np.abs(mean) <= 1):
        raise ValueError(f"{path.name} holds values outside [-1, 1]")
    return mean.astype(np.float32)


def save_prior(folder: str | os.PathLike[str], prior: Prior, scheduler: dict[str, Any]) -> None:
    """Writes the prior as a folder that `load_prior` reads; the weights come last and appear whole or not at all.

    Args:
      folder: created if absent.
      prior: a UNet2D's; its params are stored in float16.
      scheduler: dict of `scheduler_config.json` (beta_schedule, beta_start, beta_end, num_train_timesteps, variance_type,
        prediction_type).

    Raises:
      ValueError: where the scheduler does not say what the prior's betas, variance, clip and prediction are, or the folder
        holds weights of another name, which would be read instead; of a null_label or class_guidance, which have no place in
        that layout.
    """
    folder, denoise = Path(folder), prior.denoise
    if (denoise.null_label, denoise.class_guidance) != (denoise.config.null_label, 1):
        raise ValueError(
            f"null_label {denoise.null_label} and class_guidance {denoise.class_guidance:g} cannot be written in diffusers' "
            "layout; save the prior without, null_label=None and class_guidance=1, and give them to load_prior"
        )
    said = read_scheduler(scheduler)
    same = said.betas.shape == prior.betas.shape and np.allclose(said.betas, prior.betas, rtol=1e-12)
    if not same or (said.variance, said.clip, said.parametrisation) != (prior.variance, prior.clip, prior.parametrisation):
        raise ValueError("the scheduler's betas, variance_type, clip_sample or prediction_type are not those of the prior")
    name = "diffusion_pytorch_model.fp16.safetensors"
    if others := [file.name for file in folder.glob("diffusion_pytorch_model*") if file.name != name]:
        raise ValueError(f"{folder} holds other weights ({', '.join(others)}); remove them or take another folder")
    save_configs(folder, prior.denoise.config, scheduler)
    (folder / "mean_image.npy").unlink(missing_ok=True)
    if prior.mean_image is not None:
        np.save(folder / "mean_image.npy", prior.mean_image.astype(np.float16))
    partial = folder / "weights.partial"
    partial.write_bytes(safetensors.numpy.save(weights.to_torch(prior.denoise.params)))  # save_file hides it from others
    os.replace(partial, folder / name)


def save_configs(folder: Path, config: Network, scheduler: dict[str, Any]) -> None:
    """`config.json` and `scheduler_config.json` as diffusers has them."""
    if not isinstance(config, UNet2DConfig):
        raise ValueError("only a UNet2D can be written in diffusers' layout")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config.to_diffusers()), ("scheduler_config.json", scheduler)):
        partial = folder / f"{name}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / name)


def _check_null(config: Network, null_label: int | None) -> None:
    """Raises a ValueError where a network has no such label."""
    classes = config.num_classes
    if null_label is not None and null_label != config.null_label and not 0 <= null_label < (classes or 0):
        raise ValueError(f"null_label {null_label} is none of the {classes or 0} classes of its network")


def load_prior(
    source: str | os.PathLike[str],
    dtype: str = "float32",
    *,
    remat: bool = False,
    config: Mapping[str, Any] | None = None,
    null_label: int | None = None,
    class_guidance: float = 1.0,
) -> Prior:
    """The prior of a source, without torch.

    Args:
      source: one of

        - a bundled name (`gdiff_jax.priors.BUNDLED`);
        - a folder in diffusers' layout, root (`config.json`, `scheduler_config.json` and the weights) or pipeline
          (`unet/`, `scheduler/`), with `.safetensors` or zip-format `.bin` weights of a `UNet2DModel`, in one file or in
          shards with their index;
        - OWNER/NAME or OWNER/NAME@REVISION of such a folder on diffusers' hub, which is downloaded once;
        - an ADM (guided-diffusion) file, `.pt` or `.safetensors`, with its flags in NAME.json beside it or in `config`;
        - the state dict of an EDM network, `.pt` or `.safetensors`, with its arguments likewise (how to export both from
          EDM's own `.pkl` is said where one is given);
        - the output folder of `gdiff-train-prior`, finished or not: its latest moving average.
      dtype: of the network's arithmetic, `float32` or `bfloat16`.
      remat: see `Denoiser`.
      config: guided-diffusion's flags of an ADM file, EDM's arguments of an EDM file.
      null_label: of a conditional network the label that stands for none, where it has one and its file does not say so.
      class_guidance: see `Denoiser`.

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
        if isinstance(found.config, UNet2DConfig):
            found.config.check_time(found.diffusion.parametrisation, len(found.diffusion.betas))
        if found.weights.is_dir() and isinstance(found.config, UNet2DConfig):
            params, digest = cache.latest_ema(found.weights, found.config)
        else:
            digest = shards.sha256(found.weights)

            def convert() -> Params:
                tensors = shards.read(found.weights)
                if isinstance(found.config, EDMConfig):
                    tensors = found.config.weights_of(tensors)
                converted = weights.to_params(found.config, tensors, name)
                if shards.sha256(found.weights) != digest:
                    raise ValueError(f"{found.weights} changed while it was read; try again")
                return converted

            about = {"source": name, "revision": found.revision, "sha256": digest}
            params = convert() if name in sources.BUNDLED else cache.cached(found.config, convert, about)
        null_label = found.config.null_label if null_label is None else null_label
        _check_null(found.config, null_label)
        denoise = Denoiser(params, found.config, dtype, remat, None, null_label, class_guidance)
        mean = None if found.mean_image is None else _read_mean(found.mean_image, found.config.image_shape)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if repr(name) in text else f"prior {name!r}: {text}") from None
    return Prior(
        denoise=denoise,
        betas=found.diffusion.betas,
        variance=found.diffusion.variance,
        name=name,
        sha256=digest,
        mean_image=mean,
        clip=found.diffusion.clip,
        revision=found.revision,
        parametrisation=found.diffusion.parametrisation,
    )
