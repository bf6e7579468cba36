"""Training of a victim, whose weights are kept at chosen numbers of steps: the training state is a variable of every study."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from gdiff_jax import images as image_files
from gdiff_jax.errors import ConfigError, need
from gdiff_jax.files import say
from gdiff_jax.images import ImageSet
from gdiff_jax.modules import Params
from gdiff_jax.training.data import load_split
from gdiff_jax.training.settings import VictimTraining
from gdiff_jax.victims import Victim, checkpoints, zoo


def accuracy(victim: Victim, params: Params, test: ImageSet) -> float:
    """Share of the images whose label is the greatest logit."""
    predict = jax.jit(lambda p, x: victim.logits(p, x).argmax(-1))
    parts = [predict(params, image_files.to_model(test.images[i : i + 500])) for i in range(0, len(test), 500)]
    return float((np.concatenate(parts) == test.labels).mean())


def _make(settings: VictimTraining, image_shape: tuple[int, int, int]) -> Victim:
    try:
        return zoo.make_victim(settings.victim, image_shape, settings.num_classes)
    except ValueError as error:
        raise ConfigError(f"--victim: {error}") from None


def _load(settings: VictimTraining) -> tuple[ImageSet, ImageSet]:
    """(training, held-out) images with their labels."""
    try:
        train, test = load_split(settings.data, settings.image_size)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--data: {error}") from None
    if train.labels is None:
        raise ConfigError(f"--data {settings.data} has no labels; a folder needs one sub-folder a class")
    least, most = train.labels.min(), train.labels.max()
    need(
        least >= 0 and most < settings.num_classes,
        f"--data {settings.data}: labels {least}..{most} are outside 0..{settings.num_classes - 1}; change --num_classes",
    )
    for line in train.told(settings.data):
        say(line)
    return train, test


def make_step(
    victim: Victim, optimiser: optax.GradientTransformation
) -> Callable[[Params, Any, Any, Any], tuple[Params, Any, jax.Array]]:
    """step(params, opt, x, y) -> (params, opt, loss); x is (N, H, W, C) in [-1, 1], y is (N,), opt the optimiser's state."""

    def step(params: Params, opt: Any, x: jax.Array, y: jax.Array) -> tuple[Params, Any, jax.Array]:
        loss, grads = jax.value_and_grad(victim.loss)(params, x, y)
        updates, opt = optimiser.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    return jax.jit(step)


def train_victim(settings: VictimTraining) -> None:
    """Trains a victim and writes its weights after each number of `settings.steps` to `settings.out`.

    Raises:
      ConfigError: where the settings cannot be used; nothing is written.
    """
    settings.check()
    _make(settings, (32, 32, 3))  # a wrong name fails before data is read
    train, test = _load(settings)
    victim = _make(settings, train.images.shape[1:])
    params = zoo.init_params(settings.victim, victim, settings.seed)
    optimiser = optax.adam(settings.learning_rate)
    opt = optimiser.init(params)
    step = make_step(victim, optimiser)

    manager = checkpoints.manager(settings.out, settings.victim)
    rng = np.random.default_rng(settings.seed)
    with tqdm(total=max(settings.steps), unit="step") as bar:
        for count in range(1, max(settings.steps) + 1):
            batch = train.take(rng.integers(len(train), size=settings.batch))
            params, opt, loss = step(params, opt, image_files.to_model(batch.images), jnp.asarray(batch.labels))
            bar.update()
            if count in settings.steps:
                right = accuracy(victim, params, test)
                shapes = {name: list(value.shape) for name, value in params.items()}
                about = dict(dataclasses.asdict(settings), steps=count, accuracy=right, loss=float(loss), shapes=shapes)
                about |= dict(classes=list(train.classes))
                checkpoints.save(manager, count, params, about)
                bar.write(f"{settings.victim} after {count} steps: loss {float(loss):.3f}, held-out accuracy {right:.3f}")
    manager.wait_until_finished()
