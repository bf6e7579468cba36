"""Victims by name: `cnn`, `lenet-sigmoid`, ..., and the untrained weights of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax

from gdiff_jax import modules, numerics
from gdiff_jax.modules import Params
from gdiff_jax.victims import victim as families
from gdiff_jax.victims.victim import Victim

_sigmoid, _tanh, _gelu = jax.nn.sigmoid, jax.nn.tanh, jax.nn.gelu

# Each a function of (image_shape, num_classes). New ones go to the end: a victim's weights are drawn from its place. The
# variants differ from their family's first in one thing.
VICTIMS: dict[str, Callable[..., Victim]] = {
    "mlp": families.mlp,
    "lenet": families.lenet,
    "lenet-sigmoid": families.lenet_sigmoid,
    "cnn": families.cnn,
    "resnet": families.resnet,
    "vit": families.vit_tiny,
    "mlp-narrow": partial(families.mlp, widths=(128, 32)),
    "mlp-wide": partial(families.mlp, widths=(1024, 256)),
    "mlp-shallow": partial(families.mlp, widths=(512,)),
    "mlp-deep": partial(families.mlp, widths=(512, 128, 128, 128)),
    "mlp-tanh": partial(families.mlp, activation=_tanh),
    "mlp-sigmoid": partial(families.mlp, activation=_sigmoid),
    "mlp-gelu": partial(families.mlp, activation=_gelu),
    "mlp-norm": partial(families.mlp, norm=True),
    "lenet-narrow": partial(families.lenet, width=6),
    "lenet-wide": partial(families.lenet, width=24),
    "lenet-tanh": partial(families.lenet, activation=_tanh),
    "cnn-narrow": partial(families.cnn, channels=(16, 32, 32)),
    "cnn-wide": partial(families.cnn, channels=(64, 128, 128)),
    "cnn-shallow": partial(families.cnn, channels=(32, 64)),
    "cnn-deep": partial(families.cnn, channels=(32, 64, 64, 64)),
    "cnn-tanh": partial(families.cnn, activation=_tanh),
    "cnn-sigmoid": partial(families.cnn, activation=_sigmoid),
    "cnn-norm": partial(families.cnn, norm=True),
    "cnn-mean-pool": partial(families.cnn, pooling="mean"),
    "cnn-max-pool": partial(families.cnn, pooling="max"),
    "resnet-narrow": partial(families.resnet, channels=(8, 16, 32)),
    "resnet-wide": partial(families.resnet, channels=(32, 64, 128)),
    "resnet-deep": partial(families.resnet, channels=(16, 32, 64, 64)),
    "resnet-plain": partial(families.resnet, residual=False),
    "vit-narrow": partial(families.vit_tiny, dim=32),
    "vit-wide": partial(families.vit_tiny, dim=128),
    "vit-shallow": partial(families.vit_tiny, depth=1),
    "vit-deep": partial(families.vit_tiny, depth=4),
    "cnn-batchnorm": partial(families.cnn, norm="batch"),
    "resnet-batchnorm": partial(families.resnet, norm="batch"),
}


def has_batch_norm(name: str) -> bool:
    """Whether the victim of this name has BatchNorms, known without building it."""
    return name.endswith("-batchnorm")


def make_victim(name: str, image_shape: tuple[int, int, int], num_classes: int) -> Victim:
    """The victim of this name for images (H, W, C).

    Raises:
      ValueError: where there is none, or it cannot be made for images of this shape.
    """
    if name not in VICTIMS and (name.endswith(".py") or "/" in name):
        raise ValueError(f"victim {name!r}: of a file a function is meant, {name.removesuffix('.py')}.py:make, say")
    if name not in VICTIMS:
        raise ValueError(f"victim {name!r} is not known; known: {', '.join(VICTIMS)}")
    try:
        victim = VICTIMS[name](image_shape, num_classes)
        modules.param_shapes(victim)
    except ValueError as error:
        raise ValueError(f"victim {name!r}: {error}") from None
    return victim


def init_params(name: str, victim: Victim, seed: int) -> Params:
    """Untrained weights: the same for the sweep's 0 steps and for the start of training."""
    index = list(VICTIMS).index(name)
    return victim.init(jax.random.fold_in(numerics.key(seed), 2**16 + index))
