"""The input of an affine layer from its gradient and its output: two sets of equations, both linear in the input.

With z = f(u; p) affine in u and d = dL/dz known, dL/dp = d<d, f(u; p)>/dp is linear in u (Zhu & Blaschko 2021, R-GAP), and
where z is known, so is f(u; p) = z. Each equation counts by the inverse of its variance. The gradient's equations fall into one
small matrix for all channels of u (`layers.split_of`), in whose singular basis the rest is solved by conjugate gradients.
Directions that hardly any equation sees are settled by what the layer below cannot make: negative outputs of a ReLU.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.algebra.conjugate import conjugate_gradients
from gdiff_jax.algebra.layers import Layer, Leaves, Split

ROUNDING = 2e-7  # of float32 arrays that are sums: relative to their root mean square
SIZE = 1.0  # of a pixel or an activation, about: how large it is where nothing tells of it
DENSE = 2048  # unknowns of the weakest directions that are solved together


class Level(NamedTuple):
    """What is known at the output z of an affine layer.

    Attributes:
      at: place of the layer.
      z: where it is known, else 0.
      known: which entries.
      below: which entries are at most `floor` and else unknown.
      d: dL/dz.
      error: standard deviation of the known entries.
    """

    at: int
    z: np.ndarray
    known: np.ndarray
    below: np.ndarray
    d: np.ndarray
    error: float
    floor: float = 0.0


class Solved(NamedTuple):
    """The input u of a layer.

    Attributes:
      u: its estimate; 0 in the directions that nothing tells of.
      error: standard deviation of an entry, estimated.
      unknowns, equations: how many there are.
    """

    u: np.ndarray
    error: float
    unknowns: int
    equations: int


def rms(a: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(a))))) if np.size(a) else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """Both sets of equations of one layer, of one leak; see the module.

    Attributes:
      matrix: (equations, rows) that makes a channel's part of the gradient of its part of u.
      right: (equations, channels) of the gradient, its constant part taken off.
      singular, basis: of the matrix: (rows,) descending and (rows, rows).
      std: of an entry of the gradient.
    """

    layer: Layer
    leaves: Leaves
    level: Level
    split: Split
    matrix: np.ndarray
    right: np.ndarray
    left: np.ndarray
    singular: np.ndarray
    basis: np.ndarray
    std: float

    @property
    def rows(self) -> int:
        return self.matrix.shape[1]

    @property
    def channels(self) -> int:
        return self.right.shape[1]

    @property
    def precision(self) -> np.ndarray:
        """(rows,) of each singular direction, by the gradient alone."""
        return np.square(self.singular / self.std)

    @property
    def unknowns(self) -> int:
        return self.rows * self.channels

    @functools.cached_property
    def output_precision(self) -> float:
        """Mean precision of an entry of u by the known outputs."""
        w = np.random.default_rng(2).normal(size=(self.rows, self.channels))
        seen = np.where(self.level.known, _linear(self.layer, self.split, self.leaves, w), 0.0)
        return float(np.square(seen).sum() / w.size / self.level.error**2)

    @functools.cached_property
    def equations(self) -> int:
        """How many there are, each direction of the gradient that says less than the outputs counted as none."""
        strong = int((self.precision >= max(1e-2 * self.output_precision, 1.0)).sum())
        return strong * self.channels + int(self.level.known.sum())

    def as_input(self, rows: np.ndarray) -> np.ndarray:
        return self.split.as_input(rows, self.layer.input_shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _linear(layer: Layer, split: Split, leaves: Leaves, rows: jax.Array) -> jax.Array:
    """Change of z by (rows, channels)."""
    u = split.as_input(rows, layer.input_shape)
    return layer.apply(leaves, u) - layer.apply(leaves, jnp.zeros_like(u))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _matrix(layer: Layer, split: Split, leaves: Leaves, d: jax.Array, offset: jax.Array) -> jax.Array:
    """(rows, equations): what each row of a channel adds to its part of the gradient.

    As channels do not meet, as many rows as there are channels are put in at once, each into another.
    """
    shape = layer.input_shape
    channels = shape[split.u_axis]
    rows = int(np.prod(shape)) // channels

    def of_some(first: jax.Array) -> jax.Array:
        u = split.as_input((jnp.arange(rows)[:, None] == first + jnp.arange(channels)).astype(jnp.float64), shape)
        return split.by_channel(layer.gradient(leaves, d, u, split.leaf) - offset).T

    return jax.lax.map(of_some, jnp.arange(0, rows, channels)).reshape(-1, offset.size // channels)[:rows]


@functools.partial(jax.jit, static_argnums=(0, 1))
def seen_by_output(layer: Layer, split: Split, leaves: Leaves, directions: jax.Array) -> jax.Array:
    """(k channels, outputs): change of all of z by each of k directions (rows, k) in each channel."""
    channels = layer.input_shape[split.u_axis]

    def column(i: jax.Array) -> jax.Array:
        unit = jnp.zeros((1, channels)).at[0, i % channels].set(1.0)
        return _linear(layer, split, leaves, jnp.take(directions, i // channels, axis=1)[:, None] * unit).ravel()

    return jax.lax.map(column, jnp.arange(directions.shape[1] * channels), batch_size=64)


def system_of(layer: Layer, leaves: Leaves, gradient: Leaves, level: Level, split: Split) -> System:
    """The equations of a layer whose output's level is known."""
    d = jnp.asarray(level.d)
    offset = layer.gradient(leaves, d, np.zeros(layer.input_shape), split.leaf)
    matrix = np.asarray(_matrix(layer, split, leaves, d, offset)).T
    rows = matrix.shape[1]
    right = split.by_channel(np.asarray(gradient[split.leaf]) - np.asarray(offset))
    left, values, basis = np.linalg.svd(matrix, full_matrices=matrix.shape[0] < rows)
    singular = np.zeros(rows)
    singular[: len(values)] = values
    std = max(ROUNDING * rms(gradient[split.leaf]), 1e-300)
    return System(layer, leaves, level, split, matrix, right, left, singular, basis.T, std)


def by_gradient(system: System) -> Solved:
    """u by the gradient's equations alone, each direction shrunk as its rounding demands."""
    s = system.singular[: system.left.shape[1]]
    weight = s / (np.square(s) + np.square(system.std / SIZE))
    x = system.basis[:, : len(s)] @ ((system.left[:, : len(s)].T @ system.right) * weight[:, None])
    solid = system.singular > 10 * system.std / SIZE
    error = float(np.sqrt(np.mean(np.square(system.std / np.maximum(system.singular, system.std / SIZE)))))
    return Solved(system.as_input(x), error, system.unknowns, int(solid.sum()) * system.channels)


class _Told(NamedTuple):
    """Arrays of a system, as its conjugate gradients take them."""

    leaves: Leaves
    basis: jax.Array
    precision: jax.Array  # (rows, 1)
    known: jax.Array
    output: jax.Array  # precision of a known output
    tau: jax.Array
    right: jax.Array
    weak: jax.Array  # (k,) of the directions that are preconditioned by their own matrix


@functools.partial(jax.jit, static_argnums=(0, 1))
def _improved(layer: Layer, split: Split, told: _Told, x: jax.Array, weights: jax.Array, factor: jax.Array) -> jax.Array:
    """x after conjugate gradients for (H + W) x = b, W the diagonal of the weights, `factor` Cholesky's of the weak part."""
    strong = jnp.ones((len(told.basis), 1)).at[told.weak].set(0.0)
    linear = lambda x: _linear(layer, split, told.leaves, x)
    transposed = jax.linear_transpose(linear, x)

    def curvature(x: jax.Array) -> jax.Array:
        seen = jnp.where(told.known, linear(x), 0.0) * told.output
        return told.basis @ (told.precision * (told.basis.T @ x)) + transposed(seen)[0] + weights * x

    def precondition(r: jax.Array) -> jax.Array:
        inner = told.basis.T @ r
        low = jax.scipy.linalg.cho_solve((factor, True), inner[told.weak].ravel()).reshape(len(told.weak), -1)
        return told.basis @ (strong * inner / (told.precision + told.tau)).at[told.weak].add(low)

    # For the correction: against the whole of b the part of a weak direction is lost in its rounding.
    return x + conjugate_gradients(curvature, told.right - curvature(x), 1e-10, 100, precondition)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _right(layer: Layer, split: Split, leaves: Leaves, known: jax.Array, z: jax.Array, output: jax.Array) -> jax.Array:
    """(rows, channels): what the known outputs ask for."""
    shape = layer.input_shape
    zero = jnp.zeros((int(np.prod(shape)) // shape[split.u_axis], shape[split.u_axis]))
    z0 = layer.apply(leaves, split.as_input(zero, shape))
    transposed = jax.linear_transpose(lambda rows: _linear(layer, split, leaves, rows), zero)
    return transposed(jnp.where(known, z - z0, 0.0) * output)[0]


class _Solver:
    """A system's conjugate gradients, with the matrix of its weakest directions."""

    def __init__(self, system: System):
        s = self.system = system
        weak = np.sort(np.argsort(s.singular)[: max(1, min(s.rows, DENSE // s.channels))])
        self.directions = s.basis[:, weak]
        seen = np.asarray(seen_by_output(s.layer, s.split, s.leaves, jnp.asarray(self.directions)))
        seen = seen[:, np.flatnonzero(s.level.known)] / s.level.error
        self.gram = seen @ seen.T
        self.gram[np.diag_indices(len(self.gram))] += np.repeat(s.precision[weak], s.channels)
        known, output = jnp.asarray(s.level.known), jnp.asarray(1 / s.level.error**2)
        right = s.matrix.T @ s.right / s.std**2
        right += np.asarray(_right(s.layer, s.split, s.leaves, known, jnp.asarray(s.level.z), output))
        self.told = _Told(
            list(s.leaves), jnp.asarray(s.basis), jnp.asarray(s.precision[:, None]), known, output,
            jnp.asarray(max(s.output_precision, 1.0)), jnp.asarray(right), jnp.asarray(weak),
        )  # fmt: skip

    def _factor(self, weights: np.ndarray) -> jax.Array:
        """Cholesky's, of the weakest directions with the weights."""
        k, c = self.directions.shape[1], self.system.channels
        block = self.gram.copy().reshape(k, c, k, c)
        for channel in range(c):
            block[:, channel, :, channel] += (self.directions.T * weights[:, channel]) @ self.directions
        matrix = block.reshape(k * c, k * c)
        matrix[np.diag_indices(k * c)] *= 1 + 1e-13
        return jnp.asarray(np.linalg.cholesky(matrix))

    def __call__(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        s = self.system
        factor = self._factor(weights)
        return np.asarray(_improved(s.layer, s.split, self.told, jnp.asarray(x), jnp.asarray(weights), factor))


def by_both(system: System, non_negative: bool) -> Solved:
    """u by the gradient and the known outputs, and by u >= 0 where the layer below can make no less.

    The entries below the bound say by how much the estimate errs; all that lie within that of it are pulled to it with that
    standard deviation, and so on until nothing is left below [our choice: an expectation over which entries are at the bound].
    """
    solver = _Solver(system)
    weights = np.full((system.rows, system.channels), 1 / SIZE**2)
    x = solver(np.zeros_like(weights), weights)
    largest, error = np.abs(x).max(), 0.0
    if non_negative:
        for _ in range(15):
            negative = x[x < 0]
            error = max(rms(negative), 1e-7 * largest)
            weights = np.where(x < 1.5 * error, 1 / error**2, 1e-2 / SIZE**2)
            before, x = x, solver(x, weights)
            if error <= 1.01e-7 * largest:
                break
        error = float(np.abs(x - before).max())
    return Solved(system.as_input(x), max(error, 5e-7 * largest), system.unknowns, system.equations)
