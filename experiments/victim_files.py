"""Victims by name, and their trained weights on disk: FOLDER/NAME/STEPS, orbax, with a JSON of what they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.cli import ConfigError
from gdiff_jax import modules, victims
from gdiff_jax.modules import Params
from gdiff_jax.victims import Victim

_sigmoid, _tanh, _gelu = jax.nn.sigmoid, jax.nn.tanh, jax.nn.gelu

# Names of the flags, each a function of (image_shape, num_classes). New ones go to the end: a victim's weights are drawn
# from its place. The variants differ from their family's first in one thing.
VICTIMS = {
    "mlp": victims.mlp,
    "lenet": victims.lenet,
    "lenet-sigmoid": victims.lenet_sigmoid,
    "cnn": victims.cnn,
    "resnet": victims.resnet,
    "vit": victims.vit_tiny,
    "mlp-narrow": partial(victims.mlp, widths=(128, 32)),
    "mlp-wide": partial(victims.mlp, widths=(1024, 256)),
    "mlp-shallow": partial(victims.mlp, widths=(512,)),
    "mlp-deep": partial(victims.mlp, widths=(512, 128, 128, 128)),
    "mlp-tanh": partial(victims.mlp, activation=_tanh),
    "mlp-sigmoid": partial(victims.mlp, activation=_sigmoid),
    "mlp-gelu": partial(victims.mlp, activation=_gelu),
    "mlp-norm": partial(victims.mlp, norm=True),
    "lenet-narrow": partial(victims.lenet, width=6),
    "lenet-wide": partial(victims.lenet, width=24),
    "lenet-tanh": partial(victims.lenet, activation=_tanh),
    "cnn-narrow": partial(victims.cnn, channels=(16, 32, 32)),
    "cnn-wide": partial(victims.cnn, channels=(64, 128, 128)),
    "cnn-shallow": partial(victims.cnn, channels=(32, 64)),
    "cnn-deep": partial(victims.cnn, channels=(32, 64, 64, 64)),
    "cnn-tanh": partial(victims.cnn, activation=_tanh),
    "cnn-sigmoid": partial(victims.cnn, activation=_sigmoid),
    "cnn-norm": partial(victims.cnn, norm=True),
    "cnn-mean-pool": partial(victims.cnn, pooling="mean"),
    "cnn-max-pool": partial(victims.cnn, pooling="max"),
    "resnet-narrow": partial(victims.resnet, channels=(8, 16, 32)),
    "resnet-wide": partial(victims.resnet, channels=(32, 64, 128)),
    "resnet-deep": partial(victims.resnet, channels=(16, 32, 64, 64)),
    "resnet-plain": partial(victims.resnet, residual=False),
    "vit-narrow": partial(victims.vit_tiny, dim=32),
    "vit-wide": partial(victims.vit_tiny, dim=128),
    "vit-shallow": partial(victims.vit_tiny, depth=1),
    "vit-deep": partial(victims.vit_tiny, depth=4),
    "cnn-batchnorm": partial(victims.cnn, norm="batch"),
    "resnet-batchnorm": partial(victims.resnet, norm="batch"),
}


def has_batch_norm(name: str) -> bool:
    """Whether the victim of this name has BatchNorms, known without building it."""
    return name.endswith("-batchnorm")


def make_victim(name: str, image_shape: tuple[int, int, int], num_classes: int) -> Victim:
    if name not in VICTIMS:
        raise ConfigError(f"victim {name!r} is not known; known: {', '.join(VICTIMS)}")
    try:
        victim = VICTIMS[name](image_shape, num_classes)
        modules.param_shapes(victim)
    except ValueError as error:
        raise ConfigError(f"victim {name}: {error}") from None
    return victim


def init_params(name: str, victim: Victim, seed: int) -> Params:
    """Untrained weights: the same for the sweep's 0 steps and for the start of training."""
    index = list(VICTIMS).index(name)
    return victim.init(jax.random.fold_in(jax.random.key(seed), 2**16 + index))


def manager(folder: str | Path, name: str) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(Path(folder).absolute() / name)


def save(checkpoints: ocp.CheckpointManager, steps: int, params: Params, about: dict[str, Any]) -> None:
    args = ocp.args.Composite(params=ocp.args.StandardSave(params), about=ocp.args.JsonSave(about))
    checkpoints.save(steps, args=args, force=True)


def load(folder: str, name: str, steps: int, victim: Victim) -> tuple[Params, dict[str, Any]]:
    """Weights of `name` after `steps` training steps, and what was noted about them.

    Raises:
      ConfigError: where there are none, or they are of another network, naming the remedy.
    """
    remedy = f"python experiments/train_victim.py --victim={name} --steps={steps} --out={folder or 'FOLDER'} --data=CIFAR10"
    where = Path(folder).absolute() / name
    if not folder or not (where / str(steps)).is_dir():
        raise ConfigError(f"no weights of {name} after {steps} steps in --checkpoints {folder!r}; make them with: {remedy}")
    expected = modules.param_shapes(victim)
    checkpoints = manager(folder, name)
    try:
        about = checkpoints.restore(steps, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        found = {k: tuple(v) for k, v in about["shapes"].items()}
    except Exception as error:  # orbax raises many types for a folder that is not what it says
        raise ConfigError(f"--checkpoints {where / str(steps)} cannot be read ({error}); make it again: {remedy}") from None
    if found != expected:
        wrong = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
        raise ConfigError(
            f"--checkpoints {where / str(steps)} is of another shape: {wrong[0]} is {found.get(wrong[0])}, "
            f"{name} for images {victim.image_shape} and {victim.num_classes} classes has {expected.get(wrong[0])}; {remedy}"
        )
    target = ocp.args.StandardRestore(modules.restore_target(victim))
    try:
        restored = checkpoints.restore(steps, args=ocp.args.Composite(params=target))
    except Exception as error:
        raise ConfigError(f"--checkpoints {where / str(steps)} cannot be read ({error}); make it again: {remedy}") from None
    return restored["params"], about
