"""Victims by name, and their trained weights on disk: FOLDER/NAME/STEPS, orbax, with a JSON of what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.cli import ConfigError
from gdiff_jax import modules, victims
from gdiff_jax.modules import Params
from gdiff_jax.victims import Victim

VICTIMS = {
    "mlp": victims.mlp,
    "lenet": victims.lenet,
    "lenet-sigmoid": victims.lenet_sigmoid,
    "cnn": victims.cnn,
    "resnet": victims.resnet,
}


def make_victim(name: str, image_shape: tuple[int, int, int], num_classes: int) -> Victim:
    if name not in VICTIMS:
        raise ConfigError(f"victim {name!r} is not known; known: {', '.join(VICTIMS)}")
    return VICTIMS[name](image_shape, num_classes)


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
