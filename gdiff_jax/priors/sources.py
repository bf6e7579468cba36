"""Where a prior's files are: a bundled name, a hub id, a diffusers folder of either layout, an ADM file with its flags."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import numpy as np
from diffusers.configuration_utils import ConfigMixin

from gdiff_jax.priors.adm import ADMConfig
from gdiff_jax.priors.unet2d_config import UNet2DConfig
from gdiff_jax.schedule import VarianceType, make_betas

BUNDLED = ("cifar10-32", "faces-64")

_STEM = "diffusion_pytorch_model"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIGS = ["*config.json", "unet/config.json", "scheduler/scheduler_config.json"]
# Schedulers whose betas are those of a discrete, variance-preserving process; the others scale x_t in ways of their own.
_SCHEDULERS = ("DDPM", "DDIM", "PNDM", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep")
_VARIANCES: dict[str, VarianceType] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",  # the same variance, by way of its logarithm
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}


class _NetworkConfig(ConfigMixin):
    config_name = "config.json"


class _SchedulerConfig(ConfigMixin):
    config_name = "scheduler_config.json"


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """What a scheduler's config says that a sampler needs."""

    betas: np.ndarray  # (T,) float64
    variance: VarianceType
    clip: bool  # x0hat to [-1, 1] in every step


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of a prior, found and their configs read; no weights yet."""

    config: UNet2DConfig | ADMConfig
    diffusion: Diffusion
    weights: Path  # a weight file, or the `checkpoints` folder of a training run
    revision: str = ""  # commit on the hub
    mean_image: Path | None = None


def read_scheduler(config: Mapping[str, Any]) -> Diffusion:
    """A diffusers `scheduler_config.json` as betas, variance and clip; absent fields have the class defaults of diffusers.

    Raises:
      ValueError: naming the fields whose values are not implemented.
    """
    kind = str(config.get("_class_name", "DDPMScheduler")).removesuffix("Scheduler")
    bad = []
    for field, known in (
        ("prediction_type", ("epsilon",)),
        ("predict_epsilon", (True,)),  # what old files say instead
        ("rescale_betas_zero_snr", (False,)),
        ("thresholding", (False,)),
        ("clip_sample_range", (1, 1.0)),
    ):
        if config.get(field, known[0]) not in known:
            bad.append(f"{field}={config[field]!r} (implemented: {known[0]!r})")
    if kind not in _SCHEDULERS:
        bad.append(f"_class_name={config['_class_name']!r} (implemented: {', '.join(_SCHEDULERS)})")
    variance = config.get("variance_type") or "fixed_small"
    if variance not in _VARIANCES:
        bad.append(f"variance_type={variance!r} (implemented: {', '.join(_VARIANCES)})")
    if bad:
        raise ValueError("this scheduler config cannot be used: " + "; ".join(bad))
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    else:
        schedule, total = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
        start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        if type(total) is not int or total < 1 or not all(isinstance(v, (int, float)) for v in (start, end)):
            raise ValueError(f"num_train_timesteps {total!r}, beta_start {start!r} and beta_end {end!r} must be numbers")
        betas = make_betas(schedule, total, start, end)
    if betas.ndim != 1 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError("the betas of its scheduler config must lie in (0, 1)")
    return Diffusion(betas, _VARIANCES[variance], bool(config.get("clip_sample", kind in ("DDPM", "DDIM"))))


def find(name: str, config: Mapping[str, Any] | None = None) -> Source:
    """Finds the files of a prior and reads its configs; see `load_prior`.

    Raises:
      FileNotFoundError: where there is nothing of that name, or a file is missing.
      ValueError: where a config cannot be read or holds what is not implemented.
    """
    path = Path(name)
    if name in BUNDLED:
        path = Path(str(resources.files("gdiff_jax") / "priors" / "bundled" / re.sub(r"\W", "_", name)))
    if path.is_file():
        return _adm(path, config)
    if config is not None:
        raise ValueError(f"prior {name!r} brings its own config; flags are for ADM files only")
    if path.is_dir():
        return _folder(path)
    repo, _, revision = name.partition("@")
    if not _HUB_ID.fullmatch(repo):
        raise FileNotFoundError(f"prior {name!r} is no file or folder, no OWNER/NAME[@REVISION] of the hub, and not bundled")
    return _hub(repo, revision or None)


def _hub(repo: str, revision: str | None) -> Source:
    try:
        fetch = lambda weights: Path(hub.snapshot_download(repo, revision=revision, allow_patterns=[*_CONFIGS, *weights]))
        folder = fetch([f"{_STEM}*.safetensors", f"unet/{_STEM}*.safetensors"])
        if not any(folder.rglob(f"{_STEM}*.safetensors")):  # older repositories
            folder = fetch([f"{_STEM}.bin", f"unet/{_STEM}.bin"])
    except Exception as error:  # not on the hub, not allowed, offline: huggingface_hub has a type for each
        raise FileNotFoundError(
            f"prior {repo!r} is no file or folder, not bundled ({', '.join(BUNDLED)}), and cannot be had from the hub: {error}"
        ) from None
    return dataclasses.replace(_folder(folder), revision=folder.name)


def _load(kind: type[ConfigMixin], folder: Path) -> dict[str, Any]:
    if not (folder / kind.config_name).is_file():
        raise FileNotFoundError(f"prior {str(folder)!r}: {kind.config_name} is missing in the folder")
    try:
        config = kind.load_config(folder)
    except (OSError, ValueError) as error:  # what diffusers raises for broken JSON
        raise ValueError(f"prior {str(folder)!r}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"prior {str(folder)!r}: {kind.config_name} holds no JSON object")
    return dict(config)


def _folder(folder: Path) -> Source:
    """Root layout (all in one folder), pipeline layout (`unet/`, `scheduler/`), or the output of a training run of ours."""
    network = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    config = _load(_NetworkConfig, network)
    if (kind := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise ValueError(f"prior {str(folder)!r}: a {kind} is not implemented; implemented: UNet2DModel")
    diffusion = read_scheduler(_load(_SchedulerConfig, scheduler))
    mean = network / "mean_image.npy"
    return Source(
        config=UNet2DConfig.from_diffusers(config),
        diffusion=diffusion,
        weights=network / "checkpoints" if (network / "checkpoints").is_dir() else _weight_file(network),
        mean_image=mean if mean.is_file() else None,
    )


def _weight_file(folder: Path) -> Path:
    for suffix in ("safetensors", "bin"):
        if (folder / f"{_STEM}.{suffix}").is_file():
            return folder / f"{_STEM}.{suffix}"
        variants = sorted(folder.glob(f"{_STEM}*.{suffix}"))
        if len(variants) == 1 and "-of-" not in variants[0].name:
            return variants[0]
        if variants:
            names = ", ".join(file.name for file in variants)
            raise FileNotFoundError(f"prior {str(folder)!r}: expected one weight file, found {names}; keep one of them")
    raise FileNotFoundError(f"prior {str(folder)!r}: expected one {_STEM}*.safetensors or .bin in the folder, found 0")


def _adm(path: Path, flags: Mapping[str, Any] | None) -> Source:
    beside = path.with_suffix(".json")
    if flags is None:
        if not beside.is_file():
            raise FileNotFoundError(
                f"prior {str(path)!r}: an ADM file needs guided-diffusion's flags, as JSON in {beside.name} beside it; "
                "those of the published models are in third_party/adm"
            )
        try:
            flags = json.loads(beside.read_text())
        except ValueError as error:
            raise ValueError(f"{beside} is not JSON ({error})") from None
        if not isinstance(flags, dict):
            raise ValueError(f"{beside} holds no JSON object of flags")
    config = ADMConfig.from_flags(flags)
    return Source(config, Diffusion(config.betas, config.variance, clip=True), path)
