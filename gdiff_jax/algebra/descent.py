"""The way down from the head of a network: the input of one layer after another, as far as the equations reach."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.algebra.layers import Activation, Layer, activation_of, input_before, inverted, split_of
from gdiff_jax.algebra.links import Kind
from gdiff_jax.algebra.structure import Structure
from gdiff_jax.algebra.system import Level, Solved, System, by_both, by_gradient, rms, seen_by_output, system_of

PIXELS = 4096  # numbers of an image up to which directions that are not determined are told apart


class Open(NamedTuple):
    """What a linear system leaves open of an image: x = image + null @ a, flat.

    Attributes:
      null: (n, k) orthonormal, directions that it does not fix; the image is 0 in them.
      matrix, bound: (m, k) and (m,), inequalities `matrix @ a <= bound` that hold besides, of units that are not active.
    """

    null: np.ndarray
    matrix: np.ndarray
    bound: np.ndarray


@dataclasses.dataclass
class Descent:
    """One leak on its way down: levels that are known, from the top, and the image if the way ends there."""

    structure: Structure
    tree: Any
    leaves: list[jax.Array]
    gradient: list[jax.Array]
    levels: list[Level]
    steps: list[str]
    image: np.ndarray | None = None
    open: Open | None = None
    hidden: tuple[Activation, Layer, np.ndarray, np.ndarray, float] | None = None  # the last activation inverted
    activations: dict[int, Activation | None] = dataclasses.field(default_factory=dict)  # by layer, as far as looked at

    def run(self) -> None:
        while self._down():
            pass

    def smooth(self) -> bool:
        """Whether no activation below the head has a kink."""
        below = self.structure.layers[: self.levels[0].at]
        found = [self._activation(i) for i, layer in enumerate(below) if layer.kind is not Kind.AFFINE]
        return all(a is not None and not a.kinked for a in found)

    def _activation(self, index: int) -> Activation | None:
        """What a layer is, if it is an activation that can be inverted."""
        layer = self.structure.layers[index]
        if index not in self.activations:
            self.activations[index] = activation_of(layer, self.leaves) if layer.kind is Kind.POINTWISE else None
        return self.activations[index]

    def _name(self, layer: Layer) -> str:
        return ", ".join(self.structure.names[k] for k in layer.leaves if k < len(self.structure.names))

    def _down(self) -> bool:
        """Solves the input of the level's layer; False where the way ends."""
        level = self.levels[-1]
        layer = self.structure.layers[level.at]
        if not np.isfinite(level.d).all() or not np.abs(level.d).max() > 0:
            self.steps.append(f"the delta of {self._name(layer)} is zero: no unit of it was active, or the loss is flat")
            return False
        split = split_of(layer, self.leaves, jnp.asarray(level.d), set(self.structure.own))
        if split is None:
            self.steps.append(f"{self._name(layer)}: its gradient is no convolution's or dense layer's")
            return False
        system = system_of(layer, self.leaves, self.gradient, level, split)
        solved = self._solve(system)
        if solved is None:
            return False
        v = input_before(layer, solved.u)
        self.steps.append(f"the input of {self._name(layer)} ({solved.unknowns} numbers) from {solved.equations} equations")
        if level.at == 0:
            self.image = v
            return False
        if v is None:
            self.steps.append("what lies before it cannot be inverted")
            return False
        return self._through_activation(layer, v, solved.error)

    def _solve(self, system: System) -> Solved | None:
        level = system.level
        if not level.known.any():
            return by_gradient(system)
        if system.equations >= system.unknowns:
            before = self._activation(level.at - 1) if level.at else None
            return by_both(system, non_negative=before is not None and before.lower == 0)
        return self._partly(system) if level.at == 0 and system.unknowns <= PIXELS else None

    def _partly(self, system: System) -> Solved:
        """The image as far as the equations determine it, the rest 0."""
        known = np.flatnonzero(system.level.known)
        change = np.asarray(seen_by_output(system.layer, system.split, self.leaves, jnp.eye(system.rows)))
        seen = change[:, known] / system.level.error
        per_channel = (system.basis * system.precision) @ system.basis.T
        gram = np.kron(per_channel, np.eye(system.channels)) + seen @ seen.T
        z0 = np.asarray(system.layer.apply(self.leaves, jnp.zeros(system.layer.input_shape)))
        told = (system.level.z - z0).ravel()[known] / system.level.error
        right = (system.matrix.T @ system.right / system.std**2).ravel() + seen @ told
        values, basis = np.linalg.eigh(gram)
        solid = values > 1e4  # errors below 1 % of the range of a pixel
        x = basis[:, solid] @ ((basis[:, solid].T @ right) / values[solid])
        below, null = np.flatnonzero(system.level.below), basis[:, ~solid]
        at = change[:, below].T
        self.open = Open(null, at @ null, system.level.floor - z0.ravel()[below] - at @ x)
        return Solved(system.as_input(x.reshape(system.rows, system.channels)), 1e-2, system.unknowns, int(solid.sum()))

    def _through_activation(self, layer: Layer, v: np.ndarray, error: float) -> bool:
        level = self.levels[-1]
        below, activation = self.structure.layers[level.at - 1], self._activation(level.at - 1)
        if activation is None:
            self.steps.append(f"layer {level.at - 1} ({below.kind.value}; counted from 0) cannot be inverted")
            return False
        if level.at < 2 or self.structure.layers[level.at - 2].kind is not Kind.AFFINE:
            return False
        d = np.asarray(layer.pulled_back(self.leaves, jnp.asarray(v), jnp.asarray(level.d)))
        self.hidden = (activation, below, v, d, error)
        self.levels.append(self.level_below(4 * error))
        return True

    def level_below(self, tolerance: float) -> Level:
        """Of the last activation that was inverted, an output within `tolerance` of its constants taken for them."""
        assert self.hidden is not None
        activation, layer, v, d, error = self.hidden
        before = inverted(layer, activation, self.leaves, v, tolerance)
        index = self.structure.layers.index(layer) - 1
        scale = max(rms(before.z[before.known]), 1e-300)
        relative = max(error / max(rms(v), 1e-300), 5e-7)
        return Level(index, before.z, before.known, before.below, before.slope * d, 2 * relative * scale, before.floor)
