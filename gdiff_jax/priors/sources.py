"""Where a prior's files are: a bundled name, a hub id, a diffusers folder of either layout, or an ADM or EDM file."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from gdiff_jax.parametrisation import EDM
from gdiff_jax.priors.adm import ADMConfig
from gdiff_jax.priors.edm import EDMConfig
from gdiff_jax.priors.edm_fields import EXPORT
from gdiff_jax.priors.schedulers import Diffusion, edm_betas, read_scheduler
from gdiff_jax.priors.unet2d_config import UNet2DConfig

BUNDLED = ("cifar10-32", "faces-64")

_STEM = "diffusion_pytorch_model"
# In the order of preference: diffusers too takes the plain name before a variant such as fp16 or non_ema.
_SHARD = r"-\d+-of-\d+\."
_WEIGHT_FILES = (
    *(f"{_STEM}.safetensors", f"{_STEM}-*-of-*.safetensors", f"{_STEM}.bin", f"{_STEM}-*-of-*.bin"),
    *(f"{_STEM}*.safetensors", f"{_STEM}*.bin"),
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_INDEX = f"{_STEM}.*.index*.json"  # of shards
_CONFIGS = ["*config.json", "unet/config.json", "scheduler/scheduler_config.json", _INDEX, f"unet/{_INDEX}"]


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of a prior, found and their configs read; no weights yet."""

    config: UNet2DConfig | ADMConfig | EDMConfig
    diffusion: Diffusion
    weights: Path  # a weight file, the index of its shards, or the `checkpoints` folder of a training run
    revision: str = ""  # commit on the hub
    mean_image: Path | None = None


def find(name: str, config: Mapping[str, Any] | None = None) -> Source:
    """Finds the files of a prior and reads its configs; see `load_prior`.

    Raises:
      FileNotFoundError: where there is nothing of that name, or a file is missing.
      ValueError: where a config cannot be read or holds what is not implemented.
    """
    path = Path(name)
    if name in BUNDLED:
        path = Path(str(resources.files("gdiff_jax") / "priors" / "bundled" / re.sub(r"\W", "_", name)))
    if os.path.isfile(path):  # unlike Path.is_file, False for names that no file system takes
        return _single(path, config)
    if config is not None:
        raise ValueError(f"prior {name!r} brings its own config; flags are for ADM and EDM files only")
    if os.path.isdir(path):
        return _folder(path)
    repo, _, revision = name.partition("@")
    if not _HUB_ID.fullmatch(repo):
        raise FileNotFoundError(f"prior {name!r} is no file or folder, no OWNER/NAME[@REVISION] of the hub, and not bundled")
    return _hub(repo, revision or None)


def _hub(repo: str, revision: str | None) -> Source:
    import huggingface_hub as hub  # not at the start, which need not wait for what few priors need

    try:
        for name in _WEIGHT_FILES:  # one format and variant, not all that there are
            patterns = [*_CONFIGS, name, f"unet/{name}"]
            folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
            if any(folder.rglob(name)):
                break
    except Exception as error:  # not on the hub, not allowed, offline: huggingface_hub has a type for each
        raise FileNotFoundError(
            f"prior {repo!r} is no file or folder, not bundled ({', '.join(BUNDLED)}), and cannot be had from the hub: {error}"
        ) from None
    return dataclasses.replace(_folder(folder), revision=folder.name)


def _load(file_name: str, folder: Path) -> dict[str, Any]:
    from diffusers.configuration_utils import ConfigMixin  # not at the start, which need not wait: it takes most of a second

    if not (folder / file_name).is_file():
        raise FileNotFoundError(f"prior {str(folder)!r}: {file_name} is missing in the folder")
    kind: Any = type("_Config", (ConfigMixin,), {"config_name": file_name})
    try:
        raw = (folder / file_name).read_bytes()
        # A byte order mark, which some editors put in front, is no JSON for diffusers.
        config = json.loads(raw[len(BOM_UTF8) :]) if raw.startswith(BOM_UTF8) else kind.load_config(folder)
    except (OSError, ValueError, RecursionError) as error:  # what diffusers raises for broken JSON, and JSON for deep one
        raise ValueError(f"prior {str(folder)!r}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"prior {str(folder)!r}: {file_name} holds no JSON object")
    return dict(config)


def _folder(folder: Path) -> Source:
    """Root layout (all in one folder), pipeline layout (`unet/`, `scheduler/`), or the output of a training run of ours."""
    network = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    config = _load("config.json", network)
    if (kind := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise ValueError(f"prior {str(folder)!r}: a {kind} is not implemented; implemented: UNet2DModel")
    diffusion = read_scheduler(_load("scheduler_config.json", scheduler))
    mean = network / "mean_image.npy"
    return Source(
        config=UNet2DConfig.from_diffusers(config),
        diffusion=diffusion,
        weights=network / "checkpoints" if (network / "checkpoints").is_dir() else _weight_file(network),
        mean_image=mean if mean.is_file() else None,
    )


def _weight_file(folder: Path) -> Path:
    """The one that is to be read, a weight file or the index of its shards: safetensors first, a variant last."""
    for kind in ("safetensors", "bin"):
        plain, indices = folder / f"{_STEM}.{kind}", [f for f in sorted(folder.glob(_INDEX)) if f".{kind}." in f.name]
        if plain.is_file() and indices:
            raise FileNotFoundError(
                f"prior {str(folder)!r}: {plain.name} and the shards of {indices[0].name} may be different weights; "
                "keep one of them"
            )
        if plain.is_file() or indices:
            return plain if plain.is_file() else min(indices, key=lambda file: len(file.name))
    for kind in ("safetensors", "bin"):
        found = [file for file in sorted(folder.glob(f"{_STEM}*.{kind}")) if not re.search(_SHARD, file.name)]
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise FileNotFoundError(f"prior {str(folder)!r}: expected one weight file, found {names}; keep one of them")
        if found:
            return found[0]
    if lost := [file.name for file in sorted(folder.glob(f"{_STEM}*")) if re.search(_SHARD, file.name)]:
        raise FileNotFoundError(
            f"prior {str(folder)!r}: {', '.join(lost[:3])} are shards, and their index, "
            f"{_STEM}.safetensors.index.json, is missing"
        )
    raise FileNotFoundError(f"prior {str(folder)!r}: expected one {_STEM}*.safetensors or .bin in the folder, found 0")


def _single(path: Path, flags: Mapping[str, Any] | None) -> Source:
    """A file of weights, of ADM or EDM, by what is said of its network."""
    beside = path.with_suffix(".json")
    if path.suffix.lower() == ".pkl":
        raise ValueError(
            f"{path} is a pickle, which runs what it holds when it is read; where EDM's code is installed export it by these "
            f"two lines of Python (import json, pickle, torch), then load {path.stem}.pt:\n{EXPORT.format(name=path.stem)}"
        )
    if flags is None:
        if not beside.is_file():
            raise FileNotFoundError(
                f"prior {str(path)!r}: an ADM or EDM file needs guided-diffusion's flags, or EDM's arguments, as JSON in "
                f"{beside.name} beside it; those of published ADMs are with their code, and in third_party/adm of gdiff_jax's"
            )
        try:
            flags = json.loads(beside.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{beside} is not JSON ({error})") from None
        if not isinstance(flags, dict):
            raise ValueError(f"{beside} holds no JSON object of flags")
    if {"class_name", "img_resolution"} & flags.keys():
        network = EDMConfig.from_kwargs(flags)
        return Source(network, Diffusion(edm_betas(), "fixed_small", False, EDM(network.sigma_data)), path)
    config = ADMConfig.from_flags(flags)
    return Source(config, Diffusion(config.betas, config.variance, clip=True), path)
