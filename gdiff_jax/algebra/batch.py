"""The images of a batch, solved from the gradient of a first dense layer by `spear`, and what they are worth."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.algebra import spear
from gdiff_jax.algebra.structure import Loss, on_host, wide
from gdiff_jax.first_dense import FirstDense

ALIKE = ": some are alike, or drown in the noise"
LEAST_AGREEMENT = 0.9  # below which what was found is no image; of wrong directions it is 1/2 to 3/4


class Batch(NamedTuple):
    """What the algebra made of the leak of a batch.

    Attributes:
      images: (B, H, W, C) float64, in the order of the labels that were given; None where nothing could be solved.
      std: (B,) standard deviation of the errors in each image's pixels, which are about normal, by what is known of the
        noise. A floor: the error of an image's scale, common to its pixels, is as large relative to it, and the deltas err
        too, which mixes the images the more, the more drowns in the noise.
      residual: || grad_W L(images, y) - leak || / || leak ||, but for the leak's length, which clipping changes. Large where
        the labels are wrong, too.
      exact: whether without noise every delta vanishes where its image leaves a unit inactive: no label is asked for that.
      steps: what was solved, a line each, for people.
    """

    images: np.ndarray | None
    std: np.ndarray
    residual: float
    exact: bool
    steps: tuple[str, ...]


def solve_batch(
    loss: Loss,
    params: Any,
    leak: Any,
    shape: tuple[int, ...],
    y: jax.Array,
    first_dense: FirstDense,
    sigma: float = 0.0,
    seed: int = 0,
) -> Batch:
    """The images of one leaked mean gradient, with no prior and without a look at the truth.

    Args:
      loss: `loss(params, x, y)` of a batch, a mean or sum over its images; its first layer is dense and feeds a ReLU.
      params: arrays by name.
      leak: its gradient, arrays by name, or any multiple of it.
      shape: (B, H, W, C).
      y: (B, ...) labels, in any order: they serve to order the images, and for the residual.
      first_dense: which arrays are the layer's, and what lies between image and layer.
      sigma: standard deviation of the noise on the leak.
      seed: of where the search begins.

    Returns:
      a `Batch`. Images that are equal are one to the gradient; which of them is repeated is told by the labels alone. Nothing
      is raised for a leak that cannot be solved: its steps say where the way ended.
    """
    count, names = shape[0], first_dense
    with on_host():
        tree = jax.tree.structure(params)
        params = jax.tree.unflatten(tree, wide(params))
        trial = np.random.default_rng(seed).uniform(-1, 1, (4, *shape[1:]))
        inputs = _inputs(names, trial)
        active = inputs @ np.asarray(names.kernel_of(params)) + np.asarray(params[names.bias]) > 0
        deltas = np.asarray(_deltas(loss, names, params, jnp.asarray(trial), y[:1]))[:, 0]
        if not (deltas[active].any() and not deltas[~active].any() and not active.all()):
            return _nothing(count, "its first dense layer does not feed a ReLU")
        neurons = active.shape[1]
        if neurons < 2 * count:
            return _nothing(count, f"{neurons} neurons of the first dense layer are too few to tell {count} images apart")
        if not all(np.isfinite(leak[name]).all() for name in (names.kernel, names.bias)):
            return _nothing(count, "the gradient is not finite")
        layer = spear.read_layer(names, params, leak, count, sigma)
        rank = len(layer.values)
        if rank == 0:
            return _nothing(count, "the gradient of the first dense layer is zero, or drowns in the noise")
        factors, starts = spear.factorise(layer, sigma == 0, seed)
        steps = [f"the gradient of {names.kernel} has rank {rank} for {count} images" + ("" if rank == count else ALIKE)]
        if factors is None or factors.agreement < LEAST_AGREEMENT:
            found = "no" if factors is None else f"{factors.agreement:.1%} of units agree with the"
            return _nothing(count, *steps, f"{found} images whose deltas are the sparsest directions, after {starts} starts")
        steps.append(f"its sparsest directions, from {starts} starts, are the deltas: {factors.agreement:.2%} of units agree")
        images = _images(names, factors.inputs.reshape(rank, *shape[1:]))
        order = _by_label(loss, names, params, images, factors.deltas, y)
        std = layer.noise * np.sqrt(np.diag(np.linalg.inv(factors.deltas @ factors.deltas.T)))
        if names.scale is not None:
            std = std / np.abs(names.scale).min()
        images = images[order]
        residual = _residual(loss, params, images, y, leak)
        return Batch(images, std[order], residual, sigma == 0 and factors.agreement >= spear.AGREE, tuple(steps))


def _nothing(count: int, *steps: str) -> Batch:
    return Batch(None, np.full(count, np.inf), np.inf, False, steps)


def _numbers(of: tuple[float, ...] | None, otherwise: float) -> np.ndarray:
    return np.asarray(otherwise if of is None else of, np.float64)


def _inputs(names: FirstDense, images: np.ndarray) -> np.ndarray:
    """(N, inputs) of the layer."""
    return (images * _numbers(names.scale, 1.0) + _numbers(names.shift, 0.0)).reshape(len(images), -1)


def _images(names: FirstDense, inputs: np.ndarray) -> np.ndarray:
    """Of inputs (N, H, W, C)."""
    return (inputs - _numbers(names.shift, 0.0)) / _numbers(names.scale, 1.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _deltas(loss: Loss, names: FirstDense, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """(N, K, neurons) dL/dz of the first layer, each image alone with each label."""
    alone = lambda bias, x, y: loss({**params, names.bias: bias}, x[None], y[None])
    of = lambda x: jax.vmap(lambda y: jax.grad(alone)(params[names.bias], x, y))(labels)
    return jax.vmap(of)(images)


def _by_label(loss: Loss, names: FirstDense, params: Any, images: np.ndarray, deltas: np.ndarray, y: jax.Array) -> np.ndarray:
    """(B,) which of the R images goes with each label: by the cosines of its deltas to those that the label would give."""
    labels, which = np.unique(np.asarray(y), axis=0, return_inverse=True)
    expected = np.asarray(_deltas(loss, names, params, jnp.asarray(images), jnp.asarray(labels)))
    unit = lambda d: d / np.maximum(np.linalg.norm(d, axis=-1, keepdims=True), 1e-300)
    cosines = np.einsum("rkn,rn->rk", unit(expected), unit(deltas))[:, which.reshape(-1)]
    from scipy.optimize import linear_sum_assignment  # half a second of every start, --help's too, for this one function

    order = cosines.argmax(0)
    rows, columns = linear_sum_assignment(-cosines)
    order[columns] = rows
    return order


def _residual(loss: Loss, params: Any, images: np.ndarray, y: jax.Array, leak: Any) -> float:
    flat = lambda tree: np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])
    own, target = flat(_gradient(loss, params, jnp.asarray(images), y)), flat(leak)
    own *= own @ target / max(own @ own, 1e-300)
    return float(np.linalg.norm(own - target) / np.linalg.norm(target))


@functools.partial(jax.jit, static_argnums=0)
def _gradient(loss: Loss, params: Any, images: jax.Array, y: jax.Array) -> Any:
    return jax.grad(loss)(params, images, y)
