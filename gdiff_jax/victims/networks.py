"""The attacked classifiers, (N, H, W, C) in [-1, 1] -> logits (N, classes). No batch statistics: a gradient is of one image."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gdiff_jax.conv import conv_victim
from gdiff_jax.modules import Conv, GroupNorm, Linear

_conv = functools.partial(Conv, conv=conv_victim)
Activation = Callable[[jax.Array], jax.Array]


class MLP(nnx.Module):
    """pixels-512-128-classes, ReLU: the victim of the follow-up study (arXiv 2511.10423; there at 256 px with 2 classes)."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, rngs: nnx.Rngs):
        h, w, c = image_shape
        self.fc1 = Linear(h * w * c, 512, rngs=rngs)
        self.fc2 = Linear(512, 128, rngs=rngs)
        self.fc3 = Linear(128, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.nn.relu(self.fc1(x.reshape(x.shape[0], -1)))
        return self.fc3(jax.nn.relu(self.fc2(h)))


class LeNet(nnx.Module):
    """DLG's LeNet (Zhu et al. 2019): three 5 x 5 convolutions of 12 channels, strides 2, 2, 1, and one dense layer.

    With sigmoids it is initialised as in DLG, uniformly in [-1/2, 1/2], biases too: with a smaller scale its gradients vanish.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int, rngs: nnx.Rngs, activation: Activation = jax.nn.relu
    ):
        h, w, c = image_shape
        init = _uniform_half if activation is jax.nn.sigmoid else None
        self.conv1 = _conv(c, 12, 5, stride=2, rngs=rngs, init=init)
        self.conv2 = _conv(12, 12, 5, stride=2, rngs=rngs, init=init)
        self.conv3 = _conv(12, 12, 5, rngs=rngs, init=init)
        self.fc = Linear(-(-h // 4) * -(-w // 4) * 12, num_classes, rngs=rngs, init=init)
        self.activation = activation
        if init is not None:
            for layer in (self.conv1, self.conv2, self.conv3, self.fc):
                layer.bias[...] = init(rngs.params(), layer.bias.shape, jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = self.activation(conv(x))
        return self.fc(x.reshape(x.shape[0], -1))


def _uniform_half(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -0.5, 0.5)


class CNN(nnx.Module):
    """Three 3 x 3 convolutions (32, 64, 64 channels; strides 1, 2, 2), ReLU, and one dense layer."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, rngs: nnx.Rngs):
        h, w, c = image_shape
        self.conv1 = _conv(c, 32, 3, rngs=rngs)
        self.conv2 = _conv(32, 64, 3, stride=2, rngs=rngs)
        self.conv3 = _conv(64, 64, 3, stride=2, rngs=rngs)
        self.fc = Linear(-(-h // 4) * -(-w // 4) * 64, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = jax.nn.relu(conv(x))
        return self.fc(x.reshape(x.shape[0], -1))


class ResidualBlock(nnx.Module):
    """conv, norm, relu, conv, norm, + shortcut, relu (He et al. 2016), with GroupNorm (Wu & He 2018)."""

    def __init__(self, c_in: int, c_out: int, stride: int, rngs: nnx.Rngs):
        self.conv1 = _conv(c_in, c_out, 3, stride=stride, rngs=rngs)
        self.norm1 = GroupNorm(c_out, 8, 1e-5)
        self.conv2 = _conv(c_out, c_out, 3, rngs=rngs)
        self.norm2 = GroupNorm(c_out, 8, 1e-5)
        if stride > 1 or c_in != c_out:
            self.shortcut = _conv(c_in, c_out, 1, stride=stride, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.nn.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return jax.nn.relu(h + (self.shortcut(x) if hasattr(self, "shortcut") else x))


class ResNet(nnx.Module):
    """Eight layers: a stem of 16 channels, blocks of 16, 32 and 64 (the last two halve the image), global mean, one dense."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, rngs: nnx.Rngs):
        self.stem = _conv(image_shape[2], 16, 3, rngs=rngs)
        self.norm = GroupNorm(16, 8, 1e-5)
        self.blocks = nnx.List([ResidualBlock(16, 16, 1, rngs), ResidualBlock(16, 32, 2, rngs), ResidualBlock(32, 64, 2, rngs)])
        self.fc = Linear(64, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((1, 2)))
