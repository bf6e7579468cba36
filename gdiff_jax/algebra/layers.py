"""The layers of a chain: an affine run with what its gradient says of its input, or an activation and its inverse."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.algebra.conjugate import conjugate_gradients
from gdiff_jax.algebra.links import Kind, Link

Leaves = Sequence[jax.Array]
FLAT = 1e2  # where an activation is taken to have reached its constant, if it has one


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """Neighbouring links of one kind: v -> u by `pre`, which has no parameters, u -> z by `core`.

    u is the smallest thing between v and the parameters, such as the mean over a window; the patches of a convolution, which
    repeat each pixel, belong to the core. Of an activation or of what is neither, all is core.
    """

    kind: Kind
    pre: tuple[Link, ...]
    core: tuple[Link, ...]

    @property
    def leaves(self) -> tuple[int, ...]:
        return tuple(sorted({k for link in self.core for k in link.leaves}))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.pre, *self.core)[0].shape

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of u."""
        return self.core[0].shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.core[-1].out_shape

    def prepared(self, v: jax.Array) -> jax.Array:
        """u of v."""
        for link in self.pre:
            v = link((), v)
        return v

    def apply(self, leaves: Leaves, u: jax.Array) -> jax.Array:
        """z of u."""
        for link in self.core:
            u = link(leaves, u)
        return u

    def __call__(self, leaves: Leaves, v: jax.Array) -> jax.Array:
        return self.apply(leaves, self.prepared(v))

    @functools.partial(jax.jit, static_argnums=(0, 4))
    def gradient(self, leaves: Leaves, d: jax.Array, u: jax.Array, leaf: int) -> jax.Array:
        """Of <d, z(u)> in one of the parameters: affine in u for an affine layer, whose d is that of the loss in z."""
        return jax.grad(lambda p: jnp.vdot(d, self.apply(replaced(leaves, {leaf: p}), u)))(leaves[leaf])

    @functools.partial(jax.jit, static_argnums=0)
    def pulled_back(self, leaves: Leaves, v: jax.Array, d: jax.Array) -> jax.Array:
        """dL/dv of d = dL/dz."""
        return jax.vjp(lambda v: self(leaves, v), v)[1](d)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def before(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """v of u where `pre` is a bijection, by conjugate gradients; and how far `prepared(v)` is from u."""
        zero = jnp.zeros(self.shape)
        offset = self.prepared(zero)
        linear = lambda v: self.prepared(v) - offset
        transposed = jax.linear_transpose(linear, zero)
        v = conjugate_gradients(lambda v: transposed(linear(v))[0], transposed(u - offset)[0], 1e-14, 100)
        return v, jnp.abs(self.prepared(v) - u).max()

    @functools.partial(jax.jit, static_argnums=0)
    def curve(self, leaves: Leaves, grid: jax.Array) -> jax.Array:
        """The first entry of an activation's output where all of its input are a number of the grid."""
        return jax.lax.map(lambda t: self.apply(leaves, jnp.full(self.shape, t)).ravel()[0], grid)

    @functools.partial(jax.jit, static_argnums=0)
    def bisected(self, leaves: Leaves, h: jax.Array) -> jax.Array:
        """z of h, of a non-decreasing activation; anything where h is a constant of it."""

        def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = (low + high) / 2
            short = self.apply(leaves, middle) < h
            return jnp.where(short, middle, low), jnp.where(short, high, middle)

        low, high = jax.lax.fori_loop(0, 80, halve, (jnp.full(h.shape, -1e4), jnp.full(h.shape, 1e4)))
        return (low + high) / 2

    @functools.partial(jax.jit, static_argnums=0)
    def slopes(self, leaves: Leaves, z: jax.Array) -> jax.Array:
        """Derivatives of an activation, each at its own z."""
        return jax.vjp(lambda z: self.apply(leaves, z), z)[1](jnp.ones(self.out_shape))[0]


def replaced(leaves: Leaves, some: dict[int, jax.Array]) -> list[jax.Array]:
    """The parameters with some others in their places."""
    return [some.get(k, leaf) for k, leaf in enumerate(leaves)]


def layers_of(links: Sequence[Link]) -> list[Layer]:
    """Runs of one kind, as layers in order."""
    layers: list[Layer] = []
    start = 0
    while start < len(links):
        end = start
        while end < len(links) and links[end].kind is links[start].kind:
            end += 1
        run = tuple(links[start:end])
        cut = 0
        if run[0].kind is Kind.AFFINE and any(link.leaves for link in run):
            first = next(k for k, link in enumerate(run) if link.leaves)
            sizes = [np.prod(link.shape) for link in run[: first + 1]]
            cut = first - int(np.argmin(sizes[::-1]))
        layers.append(Layer(run[0].kind, run[:cut], run[cut:]))
        start = end
    return layers


def direct_leaf(layer: Layer, leaves: Leaves, own: set[int]) -> int | None:
    """The parameter, among its own, whose gradient is dL/dz itself: one that is added without being repeated.

    The bias of a dense layer that sees the whole image, or the positions that a transformer adds to its tokens.
    """
    d = np.random.default_rng(0).normal(size=layer.out_shape)
    for leaf in own.intersection(layer.leaves):
        if leaves[leaf].size == d.size:
            gradient = layer.gradient(leaves, d, np.zeros(layer.input_shape), leaf)
            if np.array_equal(np.ravel(gradient), np.ravel(d)):
                return leaf
    return None


def _moved(a: Any, source: int, target: int) -> Any:
    """The array, of NumPy or JAX, with one axis at another's place."""
    order = [axis for axis in range(a.ndim) if axis != source]
    order.insert(target, source)
    return a.transpose(order)


class Split(NamedTuple):
    """How a parameter's gradient falls into parts, each of one channel of u and of the same linear map.

    Attributes:
      leaf: the parameter.
      u_axis: of the channels in u.
      leaf_shape, leaf_axis: the parameter's shape, several axes of it perhaps taken as one, and the axis of the channels in it.
    """

    leaf: int
    u_axis: int
    leaf_shape: tuple[int, ...]
    leaf_axis: int

    def by_channel(self, gradient: Any) -> Any:
        """(equations, channels) of the parameter's gradient."""
        moved = _moved(gradient.reshape(self.leaf_shape), self.leaf_axis, len(self.leaf_shape) - 1)
        return moved.reshape(-1, self.leaf_shape[self.leaf_axis])

    def as_input(self, rows: Any, shape: tuple[int, ...]) -> Any:
        """u of (rows, channels)."""
        rest = [n for axis, n in enumerate(shape) if axis != self.u_axis]
        return _moved(rows.reshape(*rest, shape[self.u_axis]), len(shape) - 1, self.u_axis)


def _shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A parameter's shape, and with all axes but the last, or the first, taken as one: a patch of pixels."""
    return list(dict.fromkeys([shape, (int(np.prod(shape[:-1])), *shape[-1:]), (*shape[:1], int(np.prod(shape[1:])))]))


def split_of(layer: Layer, leaves: Leaves, d: jax.Array, own: set[int]) -> Split | None:
    """A split that holds for this layer, found by trying: of the kernel of a convolution or of a dense layer on tokens."""
    rng, shape = np.random.default_rng(1), layer.input_shape
    axes = dict.fromkeys((len(shape) - 1, min(1, len(shape) - 1)))
    for leaf in sorted(k for k in own.intersection(layer.leaves) if leaves[k].ndim > 1):
        gradient = lambda u, leaf=leaf: np.asarray(layer.gradient(leaves, d, u, leaf))
        offset = gradient(np.zeros(shape))
        shapes = _shapes(offset.shape)
        for split in [Split(leaf, a, s, b) for a in axes for s in shapes for b, n in enumerate(s) if n == shape[a]]:
            rows, scales = (
                rng.normal(size=(int(np.prod(shape)) // shape[split.u_axis], 1)),
                rng.normal(size=shape[split.u_axis]),
            )
            answer = lambda s, rows=rows, split=split, offset=offset, gradient=gradient: split.by_channel(
                gradient(split.as_input(rows * s, shape)) - offset
            )
            of_first = answer(np.eye(1, len(scales))[0])[:, :1]
            expected = of_first * scales
            if np.abs(of_first).max() > 0 and np.allclose(answer(scales), expected, 1e-9, 1e-9 * np.abs(expected).max()):
                return split
    return None


def input_before(layer: Layer, u: np.ndarray) -> np.ndarray | None:
    """v of u where `pre` is a bijection, such as a reshape or the normalisation of pixels; else None."""
    if not layer.pre:
        return u
    if np.prod(layer.shape) != np.prod(layer.input_shape):
        return None
    v, off = layer.before(jnp.asarray(u))
    return np.asarray(v) if float(off) <= 1e-9 * max(np.abs(u).max(), 1e-300) else None


class Before(NamedTuple):
    """What an activation's output says of its input.

    Attributes:
      z: where it is known, else 0.
      known: where the activation is not constant.
      below: where it is at its lower constant, so z is at most `floor`.
      slope: derivative, 0 where the activation is constant.
      floor: greatest z of the lower constant.
    """

    z: np.ndarray
    known: np.ndarray
    below: np.ndarray
    slope: np.ndarray
    floor: float


@dataclasses.dataclass(frozen=True)
class Activation:
    """A non-decreasing activation: its constants, if it has any below and above.

    Attributes:
      lower, upper: values, -inf and inf where there are none.
      floor: greatest input of the lower constant.
      kinked: whether its slope jumps there or at the upper one.
    """

    lower: float
    upper: float
    floor: float
    kinked: bool


def activation_of(layer: Layer, leaves: Leaves) -> Activation | None:
    """What this pointwise layer is; None where it decreases somewhere, so that an output has two inputs (GELU, SiLU)."""
    small = np.geomspace(1e-6, FLAT, 200)
    grid = np.concatenate([-small[::-1], [0.0], small])
    curve = np.asarray(layer.curve(leaves, jnp.asarray(grid)))
    if (np.diff(curve) < -1e-12).any():
        return None
    flat = lambda part: np.ptp(part) == 0
    lower = float(curve[0]) if flat(curve[:10]) else -np.inf
    upper = float(curve[-1]) if flat(curve[-10:]) else np.inf
    floor = float(grid[np.flatnonzero(curve == lower)[-1]]) if np.isfinite(lower) else -np.inf
    slope = np.diff(curve) / np.diff(grid)
    return Activation(lower, upper, floor, bool((np.abs(np.diff(slope)) > 0.4 * np.abs(slope).max()).any()))


def inverted(layer: Layer, activation: Activation, leaves: Leaves, h: np.ndarray, tolerance: float) -> Before:
    """The inputs of an activation by bisection; within `tolerance` of a constant the output is taken for it."""
    below, above = h <= activation.lower + tolerance, h >= activation.upper - tolerance
    known = ~(below | above)
    z = np.where(known, np.asarray(layer.bisected(leaves, jnp.asarray(h))), 0.0)
    slope = np.where(known, np.asarray(layer.slopes(leaves, jnp.asarray(z))), 0.0)
    return Before(z, known, below, slope, activation.floor)
