"""A pretrained prior as a callable pytree, and the folder it lives in (diffusers' layout).

A folder holds `config.json` (the network), `scheduler_config.json` (the betas) and one
`diffusion_pytorch_model*.safetensors` with diffusers' names and torch's layouts (OIHW kernels, transposed Linears). Ours are
stored in float16; they compute in float32.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from diffusers.configuration_utils import ConfigMixin

from gdiff_jax import modules
from gdiff_jax.modules import Params
from gdiff_jax.priors.unet2d import UNet2DConfig
from gdiff_jax.schedule import Schedule, Spacing, VarianceType, make_betas

BUNDLED = ("cifar10-32",)
_WEIGHTS = "diffusion_pytorch_model*.safetensors"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Denoiser:
    """`eps, v = denoise(x_t, t)` for one image; a pytree whose leaves are the weights, so jit takes them as arguments.

    Attributes:
      params: flat dict of float32 arrays.
      config: the network.
      dtype: of the network's arithmetic. Statistics, softmax and the returned eps are float32 always.
    """

    params: Params
    config: UNet2DConfig = dataclasses.field(metadata=dict(static=True))
    dtype: str = dataclasses.field(default="float32", metadata=dict(static=True))

    def __call__(self, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        """eps of one image x_t (H, W, C) at integer timestep t (scalar); v is None, the variance being fixed."""
        return self.batch(x_t[None], jnp.asarray(t)[None])[0], None

    def batch(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """eps of a batch (N, H, W, C) at timesteps (N,)."""
        return modules.apply(self.config, self.params, x_t.astype(self.dtype), t).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Prior:
    """A denoiser with what is needed to sample from it and to cite it."""

    denoise: Denoiser
    betas: np.ndarray  # (T,), float64
    variance: VarianceType
    name: str
    sha256: str  # of the weight file; "" for a prior that was never written
    mean_image: np.ndarray | None = None  # (H, W, C) in [-1, 1]: mean of the training data, the guess that knows nothing else

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.denoise.config.image_shape

    def schedule(self, num_steps: int | None = None, spacing: Spacing = "quadratic") -> Schedule:
        """The prior's own schedule, respaced to num_steps.

        Quadratic spacing is the default because guided sampling gains by it: at 100 steps of the bundled prior the
        gradient is matched more closely than with uniform spacing.
        """
        return Schedule.create(self.betas, num_steps, self.variance, spacing)


def _to_torch(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    stem, leaf = name.rsplit(".", 1)
    if leaf == "kernel":
        axes = (3, 2, 0, 1) if value.ndim == 4 else (1, 0)
        return f"{stem}.weight", value.transpose(axes)
    return f"{stem}.{'weight' if leaf == 'scale' else leaf}", value


def _from_torch(config: UNet2DConfig, tensors: dict[str, np.ndarray], source: str) -> Params:
    """Every tensor to exactly one parameter and back, or an error that lists what does not fit."""
    params, missing, wrong = {}, [], []
    left = set(tensors)
    for name, shape in modules.param_shapes(config).items():
        stem, leaf = name.rsplit(".", 1)
        key = f"{stem}.{'bias' if leaf == 'bias' else 'weight'}"
        if key not in tensors:
            missing.append(key)
            continue
        left.discard(key)
        value = tensors[key]
        if leaf == "kernel" and value.ndim in (2, 4):
            value = value.transpose((2, 3, 1, 0) if value.ndim == 4 else (1, 0))
        if value.shape != shape:
            wrong.append(f"{key} {tensors[key].shape}, expected {name} {shape}")
        else:
            params[name] = jnp.asarray(np.ascontiguousarray(value), jnp.float32)
    problems = [
        f"{title}: {', '.join(sorted(names)[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for title, names in (("missing", missing), ("unexpected", sorted(left)), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"the weights in {source} do not fit its config.json; " + "; ".join(problems))
    return params


def save_prior(folder: str | os.PathLike[str], prior: Prior, scheduler: dict[str, Any]) -> None:
    """Writes the prior as a folder that `load_prior` reads; the weights come last and appear whole or not at all.

    Args:
      folder: created if absent.
      prior: its params are stored in float16.
      scheduler: dict of `scheduler_config.json` (beta_schedule, beta_start, beta_end, num_train_timesteps, variance_type).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(prior.denoise.config.to_diffusers(), indent=2) + "\n")
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    if prior.mean_image is not None:
        np.save(folder / "mean_image.npy", prior.mean_image.astype(np.float16))
    tensors = dict(_to_torch(k, np.asarray(v)) for k, v in prior.denoise.params.items())
    tensors = {k: np.ascontiguousarray(v.astype(np.float16)) for k, v in tensors.items()}
    partial = folder / "weights.partial"
    safetensors.numpy.save_file(tensors, partial)
    os.replace(partial, folder / "diffusion_pytorch_model.fp16.safetensors")


def _betas(config: dict[str, Any], source: str) -> tuple[np.ndarray, VarianceType]:
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(f"prediction_type {config['prediction_type']!r} in {source} is not implemented; use an epsilon prior")
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    else:
        betas = make_betas(
            config.get("beta_schedule", "linear"),
            config.get("num_train_timesteps", 1000),
            config.get("beta_start", 1e-4),
            config.get("beta_end", 0.02),
        )
    return betas, config.get("variance_type", "fixed_small")


def load_prior(source: str | os.PathLike[str], dtype: str = "float32") -> Prior:
    """The prior of a bundled name or of a local folder.

    Args:
      source: one of `BUNDLED`, or a folder (see the module's docstring).
      dtype: of the network's arithmetic, `float32` or `bfloat16`.

    Raises:
      FileNotFoundError: where there is no such name or folder, or a file is missing in it.
      ValueError: where config and weights do not fit each other, naming what does not.
    """
    name = os.fspath(source)
    if name in BUNDLED:
        folder = Path(str(resources.files("gdiff_jax") / "priors" / "bundled" / re.sub(r"\W", "_", name)))
    else:
        folder = Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"prior {name!r} is neither a folder nor bundled; bundled: {', '.join(BUNDLED)}")
    weights = sorted(folder.glob(_WEIGHTS))
    if len(weights) != 1:
        raise FileNotFoundError(f"prior {name!r}: expected one {_WEIGHTS} in the folder, found {len(weights)}")
    for needed in ("config.json", "scheduler_config.json"):
        if not (folder / needed).is_file():
            raise FileNotFoundError(f"prior {name!r}: {needed} is missing in the folder")
    try:
        network, scheduler = _NetworkConfig.load_config(folder), _SchedulerConfig.load_config(folder)
    except OSError as error:  # what diffusers raises for broken JSON
        raise ValueError(f"prior {name!r}: {error}") from None
    config = UNet2DConfig.from_diffusers(network)
    betas, variance = _betas(scheduler, name)
    raw = weights[0].read_bytes()
    try:
        tensors = safetensors.numpy.load(raw)
    except Exception as error:  # safetensors raises its own type, and others for truncated headers
        raise ValueError(f"prior {name!r}: {weights[0].name} is not a whole safetensors file ({error})") from None
    params = _from_torch(config, tensors, name)
    mean = folder / "mean_image.npy"
    return Prior(
        denoise=Denoiser(params, config, dtype),
        betas=betas,
        variance=variance,
        name=name,
        sha256=hashlib.sha256(raw).hexdigest(),
        mean_image=np.load(mean).astype(np.float32) if mean.is_file() else None,
    )


class _NetworkConfig(ConfigMixin):
    config_name = "config.json"


class _SchedulerConfig(ConfigMixin):
    config_name = "scheduler_config.json"
