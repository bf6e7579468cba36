"""A victim: a classifier's network, its loss and its initial weights, as pure functions. Nothing here knows of diffusion.

The attack needs `loss(params, x, y)` and nothing else, so a network of the user's own takes part with any such function.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx

from gdiff_jax import modules
from gdiff_jax.modules import Params
from gdiff_jax.victims import networks, vit


@dataclasses.dataclass(frozen=True)
class Victim:
    """Softmax cross-entropy of a classifier.

    Attributes:
      network: an NNX class made as `network(image_shape, num_classes, rngs, **options)`.
      image_shape: (H, W, C) of its input.
      num_classes: labels are 0 .. num_classes - 1.
      options: keyword arguments of the network, hashable, in order: victims compare by value.
    """

    network: type[networks.Classifier]
    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10
    options: tuple[tuple[str, Any], ...] = ()

    def build(self, rngs: nnx.Rngs) -> networks.Classifier:
        return self.network(self.image_shape, self.num_classes, rngs, **dict(self.options))

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

    def features(self, params: Params, x: jax.Array) -> jax.Array:
        """(features,) of one image (H, W, C): the input of the last dense layer."""
        return modules.call(self, lambda network: network.features(x[None]), params)[0]

    @property
    def last_kernel(self) -> str:
        """Name of the last dense layer's kernel (features, classes) among the parameters."""
        return [name for name in modules.param_shapes(self) if name.startswith("fc") and name.endswith("kernel")][-1]


def mlp(image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, **options: Any) -> Victim:
    """`networks.MLP`; options: widths, activation, norm."""
    return Victim(networks.MLP, image_shape, num_classes, tuple(options.items()))


def lenet(image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, **options: Any) -> Victim:
    """`networks.LeNet`; options: width, activation."""
    return Victim(networks.LeNet, image_shape, num_classes, tuple(options.items()))


def lenet_sigmoid(image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10) -> Victim:
    """DLG's own: `lenet` with sigmoids."""
    return lenet(image_shape, num_classes, activation=jax.nn.sigmoid)


def cnn(image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, **options: Any) -> Victim:
    """`networks.CNN`; options: channels, activation, norm, pooling."""
    return Victim(networks.CNN, image_shape, num_classes, tuple(options.items()))


def resnet(image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, **options: Any) -> Victim:
    """`networks.ResNet`; options: channels, residual."""
    return Victim(networks.ResNet, image_shape, num_classes, tuple(options.items()))


def vit_tiny(image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, **options: Any) -> Victim:
    """`vit.ViT`; options: patch, dim, depth, heads."""
    return Victim(vit.ViT, image_shape, num_classes, tuple(options.items()))
