"""The attacked classifiers, (N, H, W, C) in [-1, 1] -> logits (N, classes).

No image looks at another, but for the BatchNorms that are asked for by `norm="batch"`: see `Victim` for their statistics.
Each is `features`, then one dense layer `fc`; what `features` returns is the representation that Soteria defends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gdiff_jax.conv import conv_victim
from gdiff_jax.modules import BatchNorm, Conv, GroupNorm, LayerNorm, Linear

_conv = functools.partial(Conv, conv=conv_victim)
Activation = Callable[[jax.Array], jax.Array]
Pooling = Literal["stride", "mean", "max"]
Norm = Literal["group", "batch"]


def _norm(kind: Norm, channels: int) -> GroupNorm | BatchNorm:
    if kind == "group":
        return GroupNorm(channels, 8, 1e-5)
    if kind == "batch":
        return BatchNorm(channels)
    raise ValueError(f"norm={kind!r} is not known; it is 'group' or 'batch'")


class Classifier(nnx.Module):
    """Features and one dense layer.

    `first_dense` names the first layer where it is dense and takes all pixels at once.
    """

    fc: Linear
    first_dense: ClassVar[str | None] = None

    def features(self, x: jax.Array) -> jax.Array:
        """(N, features), the input of the last layer."""
        raise NotImplementedError

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(self.features(x))


class MLP(Classifier):
    """Dense layers. By default pixels-512-128-classes, ReLU: the victim of the follow-up study (arXiv 2511.10423)."""

    first_dense = "fc1"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        rngs: nnx.Rngs,
        widths: tuple[int, ...] = (512, 128),
        activation: Activation = jax.nn.relu,
        norm: bool = False,
    ):
        h, w, c = image_shape
        sizes = (h * w * c, *widths)
        for i, width in enumerate(widths):
            setattr(self, f"fc{i + 1}", Linear(sizes[i], width, rngs=rngs))
            if norm:
                setattr(self, f"norm{i + 1}", LayerNorm(width))
        setattr(self, f"fc{len(widths) + 1}", Linear(sizes[-1], num_classes, rngs=rngs))
        self.depth, self.norm, self.activation = len(widths), norm, activation

    def features(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for i in range(1, self.depth + 1):
            x = getattr(self, f"fc{i}")(x)
            x = self.activation(getattr(self, f"norm{i}")(x) if self.norm else x)
        return x

    def __call__(self, x: jax.Array) -> jax.Array:
        return getattr(self, f"fc{self.depth + 1}")(self.features(x))


class LeNet(Classifier):
    """DLG's LeNet (Zhu et al. 2019): three 5 x 5 convolutions of 12 channels, strides 2, 2, 1, and one dense layer.

    With sigmoids it is initialised as in DLG, uniformly in [-1/2, 1/2], biases too: with a smaller scale its gradients vanish.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        rngs: nnx.Rngs,
        width: int = 12,
        activation: Activation = jax.nn.relu,
    ):
        h, w, c = image_shape
        init = _uniform_half if activation is jax.nn.sigmoid else None
        self.conv1 = _conv(c, width, 5, stride=2, rngs=rngs, init=init)
        self.conv2 = _conv(width, width, 5, stride=2, rngs=rngs, init=init)
        self.conv3 = _conv(width, width, 5, rngs=rngs, init=init)
        self.fc = Linear(-(-h // 4) * -(-w // 4) * width, num_classes, rngs=rngs, init=init)
        self.activation = activation
        if init is not None:
            for layer in (self.conv1, self.conv2, self.conv3, self.fc):
                layer.bias[...] = init(rngs.params(), layer.bias.shape, jnp.float32)

    def features(self, x: jax.Array) -> jax.Array:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = self.activation(conv(x))
        return x.reshape(x.shape[0], -1)


def _uniform_half(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -0.5, 0.5)


def _halve(x: jax.Array, by: Literal["mean", "max"]) -> jax.Array:
    """2 x 2 pooling; an odd last line or column is left out."""
    n, h, w, c = x.shape
    windows = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    return windows.mean((2, 4)) if by == "mean" else windows.max((2, 4))


class CNN(Classifier):
    """3 x 3 convolutions, each but the first halving the image, and one dense layer; by default 32, 64, 64 channels, ReLU.

    It is halved by a stride of 2, or by mean or max pooling after the activation. `norm` puts a GroupNorm ("group", or
    True) or a BatchNorm ("batch") after each convolution.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        rngs: nnx.Rngs,
        channels: tuple[int, ...] = (32, 64, 64),
        activation: Activation = jax.nn.relu,
        norm: bool | Norm = False,
        pooling: Pooling = "stride",
    ):
        h, w, c = image_shape
        sizes = (c, *channels)
        for i, width in enumerate(channels):
            stride = 2 if i and pooling == "stride" else 1
            setattr(self, f"conv{i + 1}", _conv(sizes[i], width, 3, stride=stride, rngs=rngs))
            if norm:
                setattr(self, f"norm{i + 1}", _norm("group" if norm is True else norm, width))
            if i:
                h, w = (-(-h // 2), -(-w // 2)) if pooling == "stride" else (h // 2, w // 2)
        self.fc = Linear(h * w * sizes[-1], num_classes, rngs=rngs)
        self.depth, self.activation, self.norm, self.pooling = len(channels), activation, bool(norm), pooling

    def features(self, x: jax.Array) -> jax.Array:
        for i in range(1, self.depth + 1):
            x = getattr(self, f"conv{i}")(x)
            x = self.activation(getattr(self, f"norm{i}")(x) if self.norm else x)
            if i > 1 and self.pooling != "stride":
                x = _halve(x, self.pooling)
        return x.reshape(x.shape[0], -1)


class ResidualBlock(nnx.Module):
    """conv, norm, relu, conv, norm, + shortcut, relu (He et al. 2016), with GroupNorm (Wu & He 2018) or BatchNorm."""

    def __init__(self, c_in: int, c_out: int, stride: int, rngs: nnx.Rngs, residual: bool = True, norm: Norm = "group"):
        self.conv1 = _conv(c_in, c_out, 3, stride=stride, rngs=rngs)
        self.norm1 = _norm(norm, c_out)
        self.conv2 = _conv(c_out, c_out, 3, rngs=rngs)
        self.norm2 = _norm(norm, c_out)
        self.residual = residual
        if residual and (stride > 1 or c_in != c_out):
            self.shortcut = _conv(c_in, c_out, 1, stride=stride, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.nn.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        if self.residual:
            h = h + (self.shortcut(x) if hasattr(self, "shortcut") else x)
        return jax.nn.relu(h)


class ResNet(Classifier):
    """A stem, blocks of growing width, of which each after the first halves the image, global mean, one dense layer.

    By default eight layers: a stem of 16 channels and blocks of 16, 32 and 64. `residual=False` leaves the shortcuts out;
    `norm` is "group" or "batch".
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        rngs: nnx.Rngs,
        channels: tuple[int, ...] = (16, 32, 64),
        residual: bool = True,
        norm: Norm = "group",
    ):
        self.stem = _conv(image_shape[2], channels[0], 3, rngs=rngs)
        self.norm = _norm(norm, channels[0])
        blocks, before = [], channels[0]
        for i, width in enumerate(channels):
            blocks.append(ResidualBlock(before, width, 2 if i else 1, rngs, residual, norm))
            before = width
        self.blocks = nnx.List(blocks)
        self.fc = Linear(before, num_classes, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return x.mean((1, 2))
