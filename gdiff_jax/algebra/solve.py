"""What of an image can be solved from its gradient: from the head of the network down, as far as the equations reach.

Float64 on the host's CPU, whatever the default precision and device: the systems' singular values span many orders.
Sources: a dense layer's input (Phong et al. 2017; Geiping et al. 2020), tokens by the gradient of their positions (APRIL, Lu et
al., CVPR 2022, arXiv 2112.14087), the recursion through convolutions (R-GAP, Zhu & Blaschko, ICLR 2021, arXiv 2010.07733). That
the deltas of positions and biases are found by trying, bounds settle weak directions, and the image is solved from the lowest
layer that is determined is ours [our choice].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.algebra import refine
from gdiff_jax.algebra.descent import Descent, Open
from gdiff_jax.algebra.structure import Loss, entry_of, on_host, structure_of, wide
from gdiff_jax.algebra.system import Level

EXACT = 2e-3  # relative residual of the gradient, up to which an image explains it: nothing is left to search for
CONVERGED = 1e-6  # sum of squares, each by its size, at which nothing was taken wrongly for an activation's constant
ODD_SCALE = 0.01  # from which on a leak that is a multiple of the gradient is said to be one
POLISHED = 3e-6  # of a smooth network, up to which more steps gain nothing


class Solution(NamedTuple):
    """What the algebra made of a leak.

    Attributes:
      image: (H, W, C) float64, or None where nothing could be solved.
      residual: || grad_W L(image) - leak || / || leak ||.
      exact: whether that is as small as rounding makes it, nearly.
      open: what a linear system that is solved leaves open; None where that is nothing, or none was reached.
      steps: what was solved, a line each, for people.
    """

    image: np.ndarray | None
    residual: float
    exact: bool
    open: Open | None
    steps: tuple[str, ...]


def solve(
    loss: Loss,
    params: Any,
    leak: Any,
    image_shape: tuple[int, ...],
    y: Any,
    seed: int = 0,
    check: bool = True,
) -> Solution:
    """The image of one leaked gradient, as far as it can be solved, with no prior and without a look at the truth.

    Args:
      loss: `loss(params, x, y)` of one image; its layers are found in its jaxpr.
      params: any pytree of float arrays.
      leak: its gradient, shaped as params, without noise: under noise the deltas err too, which the equations do not know.
      image_shape: (H, W, C).
      y: the label, such as `attacks.infer_label` reads off the leak.
      seed: of where the search for the image begins.
      check: compute the whole gradient of what is found, to judge it by and to improve it. Without, the first image that is
        reached is returned as it is, its residual nan: of a large network that gradient takes longer than the solution.

    Returns:
      a `Solution`. Nothing is raised for a leak that cannot be solved: its steps say where the way ended.
    """
    y = jax.tree.map(jnp.asarray, y)
    structure = structure_of(loss, params, image_shape, y)
    with on_host():
        leaves, gradient, tree = wide((params, y)), wide(leak), jax.tree.structure((params, y))
        norm = np.sqrt(_dot(gradient, gradient))
        if not np.isfinite(norm) or norm == 0:
            return Solution(None, np.inf, False, None, ("the gradient is zero" if norm == 0 else "the gradient is not finite",))
        entry = entry_of(structure, leaves)
        if entry is None:
            return Solution(None, np.inf, False, None, ("no layer was found whose delta the gradient holds",))
        index, leaf = entry
        d = np.asarray(gradient[leaf]).reshape(structure.layers[index].out_shape)
        nothing = np.zeros(d.shape, bool)
        top = Level(index, np.zeros(d.shape), nothing, nothing, d, 1.0)
        descent = Descent(
            structure, tree, leaves, gradient, [top], [f"the delta of layer {index} from {structure.names[leaf]}"]
        )
        descent.run()
        if not check and descent.image is not None:
            return Solution(descent.image, np.nan, False, descent.open, tuple(descent.steps))
        return _finish(descent, seed)


def _residual(descent: Descent, x: np.ndarray) -> tuple[float, float]:
    """Relative, of the whole gradient but for its length, which clipping changes; and that factor.

    Where that is large, with the head's delta taken from the leak: of a confident network p - 1 has few digits left in float32,
    and the gradient as many.
    """
    structure, gradient, top, image = descent.structure, descent.gradient, descent.levels[0], jnp.asarray(x)
    params, y = jax.tree.unflatten(descent.tree, descent.leaves)
    whole = _misfit(jax.tree.leaves(structure.gradient(params, image, y)), gradient)
    layers = structure.layers[: top.at + 1]
    own = tuple(k for layer in layers for k in layer.leaves if k in structure.own)
    if whole[0] <= EXACT or len(own) < len(gradient):
        return whole
    slopes, _ = refine.gradients_below(layers, own, descent.leaves, jnp.asarray(top.d), image)
    return min(whole, _misfit(slopes, [gradient[k] for k in own]))


def _dot(a: list[jax.Array], b: list[jax.Array]) -> float:
    return sum(float(np.vdot(p, q)) for p, q in zip(a, b, strict=True))


def _misfit(a: list[jax.Array], b: list[jax.Array]) -> tuple[float, float]:
    """min over c of || c a - b || / || b ||, and c."""
    scale = _dot(a, b) / max(_dot(a, a), 1e-300)
    off = [scale * np.asarray(p) - np.asarray(q) for p, q in zip(a, b, strict=True)]
    return float(np.sqrt(_dot(off, off) / _dot(b, b))), scale


def _finish(descent: Descent, seed: int) -> Solution:
    """The image where the descent reached it, else from its lowest levels; the one of least residual."""
    found = list[tuple[tuple[float, float], np.ndarray]]()

    def add(x: np.ndarray | None) -> bool:
        if x is not None and np.isfinite(x).all():
            found.append((_residual(descent, x), x))
        return bool(found) and _best(found)[0][0] <= EXACT

    done = add(descent.image)
    # A chain's steps cost little; through what lies above a first layer that was read off, they do not.
    enough = POLISHED if descent.levels[0].at else EXACT
    if found and descent.smooth() and descent.open is None and _best(found)[0][0] > enough:
        done = add(_polished(descent, _best(found)[1]))
    if not done and descent.open is None and len(descent.levels) > 1:
        done = _search(descent, add, seed)
    if not found:
        return Solution(None, np.inf, False, None, tuple(descent.steps))
    (residual, scale), image = _best(found)
    if done and abs(scale - 1) > ODD_SCALE:
        descent.steps.append(f"the leak is {scale:.4g} times the gradient of that image")
    return Solution(image, residual, done, None if done else descent.open, tuple(descent.steps))


def _best(found: list[tuple[tuple[float, float], np.ndarray]]) -> tuple[tuple[float, float], np.ndarray]:
    return min(found, key=lambda f: f[0])


def _polished(descent: Descent, x: np.ndarray) -> np.ndarray:
    """By Gauss-Newton on the whole gradient, which contracts from a good start where nothing jumps."""
    residual = refine.residual_of_loss(descent.structure.loss, descent.tree)
    x, cost = refine.least_squares(residual, (list(descent.leaves), list(descent.gradient)), x, steps=8)
    descent.steps.append(f"all pixels from the whole gradient: sum of squares {cost:.1e}")
    return x


def _search(descent: Descent, add: Callable[[np.ndarray | None], bool], seed: int) -> bool:
    """The image from the lowest level below whose layer it is not determined, by one tolerance of constants after another."""
    layers, level = descent.structure.layers, descent.levels[-1]
    own = tuple(k for k in layers[level.at].leaves if k in descent.structure.own)
    residual = refine.residual_below(layers[: level.at + 1], own)
    assert descent.hidden is not None
    start = 0.05 * np.random.default_rng(seed).normal(size=layers[0].shape)
    done = False
    for multiple in (4.0, 0.5, 16.0):  # half an error: it is estimated up to ten times too large
        level = descent.level_below(multiple * descent.hidden[-1])
        x, cost = refine.below(residual, descent.leaves, descent.gradient, level, start)
        descent.steps.append(f"the image from the output of layer {level.at} and its gradient: sum of squares {cost:.1e}")
        done = add(x)
        if done and cost < CONVERGED:
            break
    return done
