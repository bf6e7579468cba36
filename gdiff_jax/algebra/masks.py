"""A ReLU network's gradient under noise, as equations of the image: which units were active is not known, but how likely.

With the deltas d_l = dL/dz_l fixed, the gradient of a layer's kernel is linear in the layer's input. A delta passes a ReLU by
the mask of its units; a mask that is a probability q leaves the delta uncertain, and so the equations of the layers below: each
is weighed by the inverse of its deviation. So an expectation over the masks takes the place of a choice [our choice].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm as normal

from gdiff_jax.algebra.layers import Layer, Leaves
from gdiff_jax.algebra.links import Kind
from gdiff_jax.algebra.structure import Loss, Structure, structure_in_float32

NARROWEST, WIDEST = 5e-4, 0.5  # share of a layer's deviation by which its outputs are taken to err, at least and at most
CHANCE = 5.0  # deviations of a sum of squares, from which on it is no chance
UNLIKE = 0.3  # how far, relatively, the features of an estimate mistake the length of a delta [our choice]
ROUNDING = 1e-6  # of a measured feature and of the gradient, relative to its size, where no noise is larger


@dataclasses.dataclass(frozen=True, eq=False)
class ReluChain:
    """Layers from the image to the loss, of which those with parameters are affine.

    Attributes:
      below: from the image to the logits, the last of them affine.
      relu: which of these are ReLUs.
      top: from the logits to the loss.
      own: parameters that one layer alone uses.
      head: the kernel of the last layer, where that is dense on the features of the last ReLU as they are: its gradient
        measures them. None where it is not.
      bias: of the last layer, whose gradient is the delta of the logits. None without one.
    """

    below: tuple[Layer, ...]
    relu: tuple[bool, ...]
    top: tuple[Layer, ...]
    own: frozenset[int]
    head: int | None
    bias: int | None

    def forward(self, leaves: Leaves, x: jax.Array) -> list[jax.Array]:
        """What enters each of the layers below, and the logits."""
        values = [x]
        for layer in self.below:
            values.append(layer(leaves, values[-1]))
        return values

    def top_delta(self, leaves: Leaves, logits: jax.Array) -> jax.Array:
        """dL/d logits."""

        def loss(z: jax.Array) -> jax.Array:
            for layer in self.top:
                z = layer(leaves, z)
            return z.reshape(())

        return jax.grad(loss)(logits)


def relu_chain(loss: Loss, params: Any, image_shape: tuple[int, ...], y: Any) -> ReluChain | None:
    """The chain of `loss(params, x, y)` in float32; None where it is none, or has no ReLU. Arrays may be traced."""
    shapes = tuple((jnp.shape(a), jnp.result_type(a)) for a in jax.tree.leaves((params, y)))
    with jax.ensure_compile_time_eval():
        return _chain_of(structure_in_float32(loss, params, image_shape, y), shapes)


@functools.lru_cache(maxsize=16)
def _chain_of(structure: Structure, shapes: tuple[Any, ...]) -> ReluChain | None:
    layers = structure.layers
    ours = [i for i, layer in enumerate(layers) if any(k < len(structure.names) for k in layer.leaves)]
    if not ours or any(layers[i].kind is not Kind.AFFINE for i in ours):
        return None
    below, top = layers[: ours[-1] + 1], layers[ours[-1] + 1 :]
    relu = tuple(_is_relu(layer) for layer in below)
    if not any(relu):
        return None
    zeros = [jnp.zeros(*shape) for shape in shapes]
    head = _head(below[-1], zeros, structure.own) if relu[-2] else None
    return ReluChain(below, relu, top, structure.own, head, _bias(below[-1], zeros, structure.own))


def _is_relu(layer: Layer) -> bool:
    if layer.kind is not Kind.POINTWISE or layer.leaves:
        return False
    return all(bool((layer.apply((), jnp.full(layer.shape, t)) == max(t, 0.0)).all()) for t in (-9.0, -0.3, 0.0, 0.7, 11.0))


def _head(layer: Layer, leaves: Leaves, own: frozenset[int]) -> int | None:
    """The kernel of a layer whose gradient is its input times its delta, before which nothing lies but a change of shape."""
    rng = np.random.default_rng(0)
    d, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (layer.out_shape, layer.shape))
    u, back = jax.vjp(layer.prepared, v)
    if u.size != v.size or not np.allclose(back(u)[0], v, atol=1e-5):
        return None
    for leaf in own.intersection(layer.leaves):
        gradient, back = jax.vjp(lambda u, leaf=leaf: layer.gradient(leaves, d, u, leaf), u)
        if np.allclose(back(gradient)[0], jnp.vdot(d, d) * u, rtol=1e-4, atol=1e-4):
            return leaf
    return None


def _bias(layer: Layer, leaves: Leaves, own: frozenset[int]) -> int | None:
    """The parameter whose gradient is the delta of the layer's output, whatever enters the layer."""
    rng = np.random.default_rng(0)
    d, u = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (layer.out_shape, layer.input_shape))
    for leaf in own.intersection(layer.leaves):
        if leaves[leaf].size == d.size and np.allclose(layer.gradient(leaves, d, u, leaf).ravel(), d.ravel(), atol=1e-5):
            return leaf
    return None


class Equation(NamedTuple):
    """The gradient of one parameter, linear in what enters its layer as long as d is fixed.

    Attributes:
      at: which of the layers below.
      leaf: which of the parameters.
      d: delta of the layer's output.
      std: of the parameter's shape, deviation of the gradient from what the equation says at the true image.
    """

    at: int
    leaf: int
    d: jax.Array
    std: jax.Array


def equations_at(
    chain: ReluChain, leaves: Leaves, gradient: Leaves, sigma: jax.Array, x: jax.Array, level: jax.Array
) -> list[Equation]:
    """The equations of the image, their deltas those of x.

    Args:
      chain: of the loss.
      leaves: all arrays of the parameters and the label.
      gradient: what leaked, by parameter.
      sigma: deviation of its noise, positive.
      x: (H, W, C), an estimate.
      level: deviation of the estimate's error, in each pixel; it says how likely a unit is on the other side.
    """
    values = chain.forward(leaves, x)
    squares = [jnp.square(a) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in leaves]
    d = above = _top_delta(chain, leaves, gradient, sigma, values)
    v, equations = jnp.zeros_like(d), list[Equation]()
    for at in range(len(chain.below) - 1, -1, -1):
        layer, value = chain.below[at], values[at]
        if chain.relu[at]:
            measured = _features(chain, leaves, gradient, above, sigma) if at == len(chain.below) - 2 else None
            q = _active(value, level, measured)
            d, v = q * d, q * q * v + q * (1 - q) * (jnp.square(d) + v)  # of a product with a mask that is 1 as often as q
            continue
        u, above = layer.prepared(value), d
        for leaf in sorted(chain.own.intersection(layer.leaves)):
            spread = jnp.maximum(layer.gradient(squares, v, jnp.square(u), leaf), 0.0)
            equations.append(Equation(at, leaf, d, jnp.sqrt(jnp.square(sigma) + spread)))
        v = _pulled_variance(layer, squares, value, v)
        d = layer.pulled_back(leaves, value, d)
    return equations


def _top_delta(chain: ReluChain, leaves: Leaves, gradient: Leaves, sigma: jax.Array, values: Sequence[jax.Array]) -> jax.Array:
    """Of the logits: what leaked of it, shrunk towards that of the estimate by as much of their difference as may be error.

    A network that fits its images well has deltas that an estimate far off has not: with those, the equations below lead to
    another image. The gradient of the last bias is the delta with all of the noise; that of the last kernel is features times
    delta, which the features of the estimate sum up to its direction with far less, and to its length as far as they are those
    of the image. What may be chance is left out, and the rest shrunk by the positive part of James and Stein's rule [our
    choice].
    """
    expected = chain.top_delta(leaves, values[-1])
    if chain.bias is None:
        return expected
    b = along = gradient[chain.bias].reshape(expected.shape)
    rows = jnp.ones_like(sigma)
    if (leaf := chain.head) is not None:
        layer = chain.below[-1]
        u = layer.prepared(values[-2])
        rows = rows + jnp.vdot(u, u)
        along = b + jax.vjp(lambda d: layer.gradient(leaves, d, u, leaf), expected)[1](gradient[leaf])[0]
    square, noise, n = jnp.vdot(along, along), rows * jnp.square(sigma), b.size
    line, by_features = along / jnp.sqrt(jnp.maximum(square, 1e-30)), jnp.sqrt(square) / rows
    # The length by the bias and by the features, each by the inverse of its variance.
    one, other = 1 / jnp.square(sigma), 1 / (jnp.square(UNLIKE * by_features) + noise / rows**2)
    length = (one * jnp.vdot(line, b) + other * by_features) / (one + other)
    away, variance = line * jnp.maximum(length, 0.0) - expected, 1 / (one + other) + n * noise / rows**2
    left = lambda of, square: jnp.maximum(1 - of / jnp.where(square > 0, square, 1.0), 0.0)
    chance = n * noise * (1 + CHANCE * math.sqrt(2 / n))  # that noise alone may reach
    return expected + left(chance, square) * left(variance, jnp.vdot(away, away)) * away


def _pulled_variance(layer: Layer, squares: Leaves, value: jax.Array, v: jax.Array) -> jax.Array:
    """Variance of what `pulled_back` makes of independent errors: by the squares of a layer's entries.

    Those before the parameters are the same in each column, as of a reshape, a mean over windows or a scale [our choice].
    """
    u, before = jax.vjp(layer.prepared, value)
    if layer.leaves:
        v = jax.vjp(lambda u: layer.apply(squares, u), u)[1](v)[0]
        return before(jnp.ones_like(u))[0] * before(v)[0]
    out, back = jax.vjp(lambda value: layer(squares, value), value)
    return back(jnp.ones_like(out))[0] * back(v)[0]


def _features(
    chain: ReluChain, leaves: Leaves, gradient: Leaves, d: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, jax.Array] | None:
    """What the head's gradient, features times delta, says of the features, and its deviation."""
    if chain.head is None:
        return None
    layer, leaf = chain.below[-1], chain.head
    u, flatten = jnp.zeros(layer.input_shape), jax.vjp(layer.prepared, jnp.zeros(layer.shape))[1]
    (features,) = jax.vjp(lambda u: layer.gradient(leaves, d, u, leaf), u)[1](gradient[leaf])
    length = jnp.maximum(jnp.vdot(d, d), 1e-30)
    features = flatten(features / length)[0]
    return features, jnp.maximum(sigma / jnp.sqrt(length), ROUNDING * jnp.sqrt(jnp.mean(jnp.square(features))) + 1e-30)


def _active(z: jax.Array, level: jax.Array, measured: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """How likely each unit is active: by its input at the estimate, and by its output where that is measured."""
    w = jnp.std(z) * jnp.clip(level, NARROWEST, WIDEST)
    if measured is None:
        return normal.cdf(z / w)
    h, s = measured
    both = jnp.square(w) + jnp.square(s)
    given_h = (z * jnp.square(s) + h * jnp.square(w)) / (jnp.sqrt(both) * w * s)  # of the input, over its deviation
    on = normal.logpdf(h, z, jnp.sqrt(both)) + normal.logcdf(given_h)
    off = normal.logpdf(h, 0.0, s) + normal.logcdf(-z / w)
    return jax.nn.sigmoid(on - off)


Residual = Callable[[jax.Array], list[jax.Array]]


def residual_of(chain: ReluChain, leaves: Leaves, gradient: Leaves, equations: Sequence[Equation]) -> Residual:
    """What the equations leave at an image, each entry by its deviation: about 1 where the image is right."""

    def residual(x: jax.Array) -> list[jax.Array]:
        values = chain.forward(leaves, x)
        inputs = [layer.prepared(value) for layer, value in zip(chain.below, values, strict=False)]
        return [(chain.below[e.at].gradient(leaves, e.d, inputs[e.at], e.leaf) - gradient[e.leaf]) / e.std for e in equations]

    return residual
