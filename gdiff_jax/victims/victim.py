"""A victim: a classifier's network, its loss and its initial weights, as pure functions. Nothing here knows of diffusion.

The attack needs `loss(params, x, y)` and nothing else, so a network of the user's own takes part with any such function.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import optax
from flax import nnx

from gdiff_jax import modules
from gdiff_jax.modules import Params
from gdiff_jax.victims import networks


@dataclasses.dataclass(frozen=True)
class Victim:
    """Softmax cross-entropy of a classifier.

    Attributes:
      network: an NNX class made as `network(image_shape, num_classes, rngs)`.
      image_shape: (H, W, C) of its input.
      num_classes: labels are 0 .. num_classes - 1.
    """

    network: Callable[..., nnx.Module]
    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return self.network(self.image_shape, self.num_classes, rngs)

    def init(self, key: jax.Array) -> Params:
        """Untrained weights: LeCun-normal kernels and zero biases, Flax's defaults, unless the network says otherwise."""
        return modules.init_params(key, self)

    def logits(self, params: Params, x: jax.Array) -> jax.Array:
        """(..., classes) for images (..., H, W, C) in [-1, 1]."""
        flat = modules.apply(self, params, x.reshape((-1, *self.image_shape)))
        return flat.reshape((*x.shape[:-3], self.num_classes))

    def loss(self, params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        """Mean cross-entropy: x (H, W, C) with a scalar label y, or (B, H, W, C) with y (B,), the gradient of a batch."""
        return optax.softmax_cross_entropy_with_integer_labels(self.logits(params, x), y).mean()


mlp = functools.partial(Victim, networks.MLP)
lenet = functools.partial(Victim, networks.LeNet)
# One partial, made once: victims compare by value, and two partials of the same function are not equal.
_sigmoid_lenet = functools.partial(networks.LeNet, activation=jax.nn.sigmoid)
lenet_sigmoid = functools.partial(Victim, _sigmoid_lenet)
cnn = functools.partial(Victim, networks.CNN)
resnet = functools.partial(Victim, networks.ResNet)
