"""Trained weights of victims on disk: FOLDER/NAME/STEPS, orbax, with a JSON of what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from gdiff_jax import modules
from gdiff_jax.modules import Params
from gdiff_jax.victims.victim import Victim


def manager(folder: str | Path, name: str) -> ocp.CheckpointManager:
    """Of the checkpoints of the victim `name`; `wait_until_finished` and `close` are the caller's."""
    return ocp.CheckpointManager(Path(folder).absolute() / name)


def save(checkpoints: ocp.CheckpointManager, steps: int, params: Params, about: dict[str, Any]) -> None:
    """Weights after so many training steps. `about`, JSON, must hold `shapes`: the shape of each array by its name."""
    args = ocp.args.Composite(params=ocp.args.StandardSave(params), about=ocp.args.JsonSave(about))
    checkpoints.save(steps, args=args, force=True)


def load(folder: str, name: str, steps: int, victim: Victim) -> tuple[Params, dict[str, Any]]:
    """Weights of `name` after `steps` training steps, and what was noted about them.

    Raises:
      ValueError: where there are none, or they are of another network, naming the remedy.
    """
    remedy = f"gdiff-train-victim --victim={name} --steps={steps} --out={folder or 'FOLDER'} --data=CIFAR10"
    where = Path(folder).absolute() / name / str(steps)
    if not folder or not where.is_dir():
        raise ValueError(f"no weights of {name} after {steps} steps in {folder!r}; make them with: {remedy}")
    expected = modules.param_shapes(victim)
    checkpoints = manager(folder, name)
    try:
        about = checkpoints.restore(steps, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        shapes = {k: tuple(v) for k, v in about["shapes"].items()}
    except Exception as error:  # orbax raises many types for a folder that is not what it says
        raise ValueError(f"{where} cannot be read ({error}); make it again: {remedy}") from None
    if shapes != expected:
        wrong = min(k for k in shapes.keys() | expected.keys() if shapes.get(k) != expected.get(k))
        raise ValueError(
            f"{where} is of another shape: {wrong} is {shapes.get(wrong)}, "
            f"{name} for images {victim.image_shape} and {victim.num_classes} classes has {expected.get(wrong)}; {remedy}"
        )
    target = ocp.args.StandardRestore(modules.restore_target(victim))
    try:
        restored = checkpoints.restore(steps, args=ocp.args.Composite(params=target))
    except Exception as error:
        raise ValueError(f"{where} cannot be read ({error}); make it again: {remedy}") from None
    return restored["params"], about
