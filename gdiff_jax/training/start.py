"""What a training begins with: the network of a file, of a size, or of a prior that is tuned, with its weights; the images."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from gdiff_jax.errors import ConfigError, need
from gdiff_jax.files import say
from gdiff_jax.images import folders
from gdiff_jax.modules import param_shapes
from gdiff_jax.priors import Prior, UNet2DConfig, load_prior
from gdiff_jax.priors.schedulers import Diffusion, read_scheduler
from gdiff_jax.sweeping.memory import GIB
from gdiff_jax.training.data import load_split
from gdiff_jax.training.settings import PriorTraining

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": True,
}
SIZE = 32  # px, where nothing says another
LEAST_IMAGES = 20  # two of them are held out; that these are too few for a good prior is for the card to show


@dataclasses.dataclass(frozen=True)
class Start:
    """A network, its noise levels and what its weights are before the first step."""

    network: UNet2DConfig
    scheduler: dict[str, Any]  # as diffusers' `scheduler_config.json` has it
    tuned: Prior | None = None  # the prior whose weights it begins with; None where they are random

    @functools.cached_property
    def diffusion(self) -> Diffusion:
        return read_scheduler(self.scheduler)

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, param_shapes(self.network).values()))

    @property
    def sha256(self) -> str:
        """Of the weights that are tuned; "" where there are none."""
        return "" if self.tuned is None else self.tuned.sha256


def network_for(size: int, channels: int) -> UNet2DConfig:
    """The network for images of a size: at 32 px that of `cifar10-32`, at 64 px that of `faces-64`.

    From 64 px on an image is folded by 4, below by 2; it is halved down to 7 to 13 px, or to an odd number, where the attention
    is.

    Args:
      size: of an edge in pixels, a multiple of 8.
      channels: of an image, 1 or 3.
    """
    patch, width, head = (4, 96, 48) if size >= 64 else (2, 64, 64)
    sides = [size // patch]
    while sides[-1] % 2 == 0 and sides[-1] > 13:
        sides.append(sides[-1] // 2)
    plain = len(sides) - 1
    return UNet2DConfig(
        sample_size=sides[0],
        in_channels=channels * patch**2,
        out_channels=channels * patch**2,
        down_block_types=(*["DownBlock2D"] * plain, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * plain),
        block_out_channels=(width, *[2 * width] * plain),
        layers_per_block=1,
        attention_head_dim=head,
        norm_num_groups=16,
        patch_size=patch,
    )


def _need_trainable(network: UNet2DConfig, what: str) -> None:
    plain = network.label_ndim is None and network.time_embedding_type == "positional" and not network.learns_variance
    need(plain, f"{what}: trained is epsilon, without classes or a learned variance, time_embedding_type positional")


def read_network(settings: PriorTraining) -> UNet2DConfig:
    """The network of `settings.config`.

    Raises:
      ConfigError: where the file cannot be read, or the network cannot be trained here.
    """
    try:
        network = UNet2DConfig.from_diffusers(json.loads(Path(settings.config).read_text(encoding="utf-8-sig")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {settings.config}: {error}") from None
    need(not network.dropout, f"--config {settings.config}: dropout {network.dropout} is not implemented; use 0")
    _need_trainable(network, f"--config {settings.config}")
    return network


def read_tuned(settings: PriorTraining) -> Prior:
    """The prior of `settings.prior`, whose weights are to be tuned.

    Raises:
      ConfigError: where it cannot be loaded, is of another size than asked for, or cannot be trained here.
    """
    try:
        prior = load_prior(settings.prior)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prior: {error}") from None
    network, said = prior.denoise.config, f"--prior {settings.prior}"
    if not isinstance(network, UNet2DConfig):
        raise ConfigError(f"{said}: an {type(network).__name__} cannot be trained here, a UNet2DModel can")
    predicts = type(prior.parametrisation).__name__
    need(predicts == "Epsilon", f"{said}: it predicts {predicts}, and epsilon is trained here; take a prior that predicts it")
    _need_trainable(network, said)
    size = prior.image_shape[0]
    need(settings.size in (None, size), f"--size {settings.size}: {said} is of {size} px; leave --size away or take another")
    return prior


def start_of(prior: Prior) -> Start:
    """That of a prior's network and weights, at the noise levels that it was trained with."""
    network = prior.denoise.config
    assert isinstance(network, UNet2DConfig)
    linear = read_scheduler(SCHEDULER).betas
    same = prior.betas.shape == linear.shape and np.allclose(prior.betas, linear, rtol=1e-12)
    levels = {} if same else {"num_train_timesteps": len(prior.betas), "trained_betas": prior.betas.tolist()}
    scheduler = {**SCHEDULER, **levels, "variance_type": prior.variance, "clip_sample": prior.clip}
    # What is dropped in training alone changes no weight's meaning, and is not implemented here.
    return Start(dataclasses.replace(network, dropout=0.0), scheduler, prior)


def need_memory(count: int, shape: tuple[int, ...], parameters: int, limit: int) -> None:
    """That what lies on each device for the whole of a training fits into `limit` bytes: all images, uint8, and of each
    parameter, float32, itself, its average, its gradient and Adam's two moments. A step's own memory comes on top.

    Raises:
      ConfigError: with what is needed, what there is, and what to change.
    """
    needed = count * math.prod(shape) + 5 * 4 * parameters
    need(
        needed <= limit,
        f"--data: {count} images {shape} and {parameters:,} parameters take at least {needed / GIB:.2f} GiB of each device, "
        f"there are {limit / GIB:.2f}; give fewer images or a smaller --size",
    )


def count_pictures(source: str) -> int:
    """Of a folder or .zip of pictures how many are to be trained on, none read; 0 of another source, or of a broken one."""
    path = Path(source)
    listed = folders.in_folder if path.is_dir() else folders.in_zip if path.suffix.lower() == ".zip" else None
    try:
        files = listed and listed(path, "train")
    except (OSError, ValueError):  # which `load_data` tells
        return 0
    if files is None:
        return 0
    count = len(files.names)
    return count if files.has_splits else count - count // 10


def load_data(settings: PriorTraining, shape: tuple[int, int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """(training images, held-out images), both (N, H, W, C) uint8, see `load_split`.

    Args:
      settings: which images, and how many are held out at most.
      shape: of an image, where a network demands one. Else it is square, of `settings.size`, and has one channel where all
        images are grey.

    Raises:
      ConfigError: where they cannot be read, are too few, or are not of that shape.
    """
    size, channels = (settings.size or SIZE, None) if shape is None else (shape[0], shape[-1])
    try:
        train, heldout = load_split(settings.data, size, settings.heldout, channels)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--data: {error}") from None
    images, held = train.images, heldout.images
    if shape is None:
        if all((image == image[..., :1]).all() for part in (held, images) for image in part):
            images, held = images[..., :1], held[..., :1]
        shape = (size, size, images.shape[-1])
    asked = next((f"--{n}={getattr(settings, n)}" for n in ("config", "prior") if getattr(settings, n)), f"--size={size}")
    said, found, total = f"--data {settings.data}", images.shape[1:], len(images) + len(held)
    need(found == shape, f"{said}: images are {found}, {asked} takes {shape}; pictures are resized, arrays are not")
    need(total >= LEAST_IMAGES, f"{said}: {total} images are too few; give at least {LEAST_IMAGES}, better thousands")
    for note in train.notes:
        say(f"{settings.data}: {note}")
    return np.ascontiguousarray(images), np.ascontiguousarray(held)


def read_start(settings: PriorTraining, limit: int) -> tuple[Start, np.ndarray, np.ndarray]:
    """What it begins with, the training images and the held-out ones.

    Args:
      settings: of the training.
      limit: bytes of a device, see `need_memory`.

    Raises:
      ConfigError: where one of them cannot be had, or they do not fit each other or a device.
    """
    given = None
    if settings.prior:
        given = start_of(read_tuned(settings))
    elif settings.config:
        given = Start(read_network(settings), SCHEDULER)
    say(f"reading {settings.data}")
    shape = None if given is None else given.network.image_shape
    least = shape or (settings.size or SIZE, settings.size or SIZE, 1)
    need_memory(count_pictures(settings.data), least, 0, limit)  # before they are read, which may take an hour
    images, heldout = load_data(settings, shape)
    start = given or Start(network_for(images.shape[1], images.shape[-1]), SCHEDULER)
    need_memory(len(images), images.shape[1:], start.parameters, limit)
    return start, images, heldout
