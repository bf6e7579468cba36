"""Victims by name, and their trained weights on disk: FOLDER/NAME/STEPS, orbax, with a JSON of what they are."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.cli import ConfigError
from gdiff_jax import modules, victims
from gdiff_jax.auditing.checks import check_loss
from gdiff_jax.matching import victim_gradient
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


@dataclasses.dataclass(frozen=True)
class OwnVictim:
    """A network of the user's own, of which its loss alone is known: what a sweep asks a `gdiff_jax.Victim`, and no more."""

    loss: Callable[[Params, Any, Any], Any]  # of params as a flat dict
    num_classes: int
    first_dense: tuple[Any, ...] | None = None  # kernel, bias, and by channel scale and shift between image and input
    has_batch_norm: bool = False


def is_own(name: str) -> bool:
    """Whether a victim's name is MODULE:FUNCTION or FILE.py:FUNCTION."""
    return ":" in name


def load_own(name: str, num_classes: int) -> tuple[OwnVictim, Params]:
    """The loss and the params that the user's function returns, params as a flat dict by dotted path.

    Raises:
      ConfigError: where there is no such function, it fails, or what it returns is something else.
    """
    where, _, attribute = name.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(spec.name, module)  # where dataclasses and pickles of the file look for it
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            module = importlib.import_module(where)
    except Exception as error:  # whatever the user's file raises
        raise ConfigError(f"victim {name!r}: {where} cannot be imported ({type(error).__name__}: {error})") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        there = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ConfigError(f"victim {name!r}: {where} has no function {attribute!r}; it has {', '.join(there) or 'none'}")
    try:
        returned = function()
    except Exception as error:
        raise ConfigError(f"victim {name!r}: {attribute}() failed ({type(error).__name__}: {error})") from error
    if not (isinstance(returned, tuple) and len(returned) == 2 and callable(returned[0])):
        raise ConfigError(f"victim {name!r}: {attribute}() must return (loss, params), a function and a pytree of arrays")
    loss, tree = returned
    leaves, structure = jax.tree.flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or "params" for path, _ in leaves]
    for path, (_, leaf) in zip(names, leaves, strict=True):
        if not hasattr(leaf, "dtype"):
            raise ConfigError(f"victim {name!r}: params.{path} is a {type(leaf).__name__}, not an array; leave it to loss")
    if len(set(names)) < len(names):
        raise ConfigError(f"victim {name!r}: two arrays of params have the same path; rename one of {', '.join(names[:9])}")

    def flat_loss(params: Params, x: Any, y: Any) -> Any:
        return loss(jax.tree.unflatten(structure, [params[n] for n in names]), x, y)

    return OwnVictim(flat_loss, num_classes), {n: jnp.asarray(leaf) for n, (_, leaf) in zip(names, leaves, strict=True)}


def find_first_dense(victim: OwnVictim, params: Params, shape: tuple[int, ...], label: Any) -> OwnVictim:
    """With `first_dense`, where a layer's gradient gives the whole image away: its input is scale * image + shift, by channel.

    The gradient of a dense layer of one image is its input times its bias's gradient, so the input can be read off it; it is
    held against an image of random pixels.
    """
    image = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    gradient = jax.jit(partial(victim_gradient, victim.loss))(params, jnp.asarray(image), jnp.asarray(label))
    layer = lambda name: name.rpartition(".")[0]
    for kernel, value in params.items():
        biases = [name for name, v in params.items() if v.shape == value.shape[-1:] and layer(name) == layer(kernel)]
        if value.ndim != 2 or len(value) != image.size or not biases:
            continue
        bias = biases[0]
        delta = np.asarray(gradient[bias], np.float64)
        if not delta.any():
            continue
        found = (np.asarray(gradient[kernel], np.float64) @ delta / (delta @ delta)).reshape(image.shape)
        fits = [np.polyfit(image[..., c].ravel(), found[..., c].ravel(), 1) for c in range(image.shape[-1])]
        scale, shift = (tuple(float(f[k]) for f in fits) for k in range(2))
        off = np.abs(image * np.array(scale) + np.array(shift) - found).max()
        if min(map(abs, scale)) > 1e-6 and off < 1e-3 * np.abs(found).max():
            return dataclasses.replace(victim, first_dense=(kernel, bias, scale, shift))
    return victim


def check_own(name: str, victim: OwnVictim, params: Params, image: Any, label: Any) -> None:
    """ConfigError where the loss cannot be attacked at an image in [-1, 1]."""
    try:
        check_loss(victim.loss, params, image, label)
    except ValueError as error:
        raise ConfigError(f"victim {name!r}: {error}") from error


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
