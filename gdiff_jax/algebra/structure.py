"""The layers of a loss, and how far down its gradient can be solved."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax import attacks, numerics
from gdiff_jax.algebra.chain import find_chain
from gdiff_jax.algebra.layers import Layer, activation_of, direct_leaf, layers_of
from gdiff_jax.algebra.links import Kind
from gdiff_jax.pytrees import as_float64

Loss = Callable[[Any, jax.Array, Any], jax.Array]


@contextmanager
def on_host() -> Iterator[None]:
    """Float64 on a CPU device, by one thread of BLAS."""
    host = jax.local_devices(backend="cpu")[0]
    with (
        numerics.one_blas_thread(),
        jax.enable_x64(True),
        jax.default_device(host),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """The layers of a loss.

    Attributes:
      loss: of the whole.
      layers: from the image to the loss.
      names: of all parameters, flat.
      own: parameters that one layer alone uses.
    """

    loss: Loss
    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    own: frozenset[int]

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(self, params: Any, x: jax.Array, y: Any) -> Any:
        return jax.grad(self.loss)(params, x, y)


def wide(tree: Any) -> list[jax.Array]:
    """Its arrays, those of floats in float64; within `on_host`."""
    return jax.tree.leaves(as_float64(tree))


@functools.lru_cache(maxsize=16)
def _structure(loss: Loss, tree: Any, shapes: tuple[Any, ...], image_shape: tuple[int, ...], real: Any) -> Structure:
    abstract = lambda shape, dtype: jax.ShapeDtypeStruct(shape, real if jnp.issubdtype(dtype, jnp.floating) else dtype)
    params, y = jax.tree.unflatten(tree, [abstract(*s) for s in shapes])
    layers = tuple(layers_of(find_chain(loss, params, jax.ShapeDtypeStruct(image_shape, real), y)))
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    names = tuple(jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths)
    uses = [k for layer in layers for k in layer.leaves]
    return Structure(loss, layers, names, frozenset(k for k in range(len(names)) if uses.count(k) == 1))


def structure_of(loss: Loss, params: Any, image_shape: tuple[int, ...], y: Any) -> Structure:
    """The layers of `loss(params, x, y)`, found in its jaxpr, in float64; kept for the next leak of the same network."""
    with on_host():
        return _structure(loss, *_abstract(params, y), image_shape, jnp.float64)


def structure_in_float32(loss: Loss, params: Any, image_shape: tuple[int, ...], y: Any) -> Structure:
    """The same to be computed on the device, in a traced function too."""
    return _structure(loss, *_abstract(params, y), image_shape, jnp.float32)


def _abstract(params: Any, y: Any) -> tuple[Any, tuple[Any, ...]]:
    """Their tree, and shape and dtype of each array."""
    leaves, tree = jax.tree.flatten((params, y))
    return tree, tuple((jnp.shape(a), jnp.result_type(a)) for a in leaves)


def entry_of(structure: Structure, leaves: list[jax.Array]) -> tuple[int, int] | None:
    """The lowest layer whose delta is an array of the gradient, and which."""
    for i, layer in enumerate(structure.layers):
        if layer.kind is Kind.AFFINE and (leaf := direct_leaf(layer, leaves, set(structure.own))) is not None:
            return i, leaf
    return None


def infer_label(loss: Loss, params: Any, leak: Any, image_shape: tuple[int, ...]) -> int:
    """The label of one image, read off the gradient of the last layer as `attacks.infer_label` does, under noise as well.

    The layer is found in the loss, as all are; it must be dense, with a bias, before a softmax with cross-entropy.

    Raises:
      ValueError: where there is no such layer.
    """
    kernel, bias = last_layer_of(loss, params, leak, image_shape)
    largest = max(np.abs(kernel).max(initial=0.0), np.abs(bias).max())
    scale = 1 / largest if largest > 0 else 1.0  # in float32, as it was computed, zeros are told from small numbers
    with on_host():
        return int(attacks.infer_label(jnp.float32(kernel * scale), jnp.float32(bias * scale)))


def last_layer_of(loss: Loss, params: Any, leak: Any, image_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(features, classes) and (classes,), float64: what a gradient holds of the last layer's matrix and bias.

    Raises:
      ValueError: where there is no such bias; a matrix that is none, as of a convolution, is without rows.
    """
    structure = structure_of(loss, params, image_shape, jnp.asarray(0))
    with on_host():
        leaves, gradient = wide((params, jnp.asarray(0))), wide(leak)
        layer, leaf = _last_layer(structure, leaves)
        return np.asarray(_dense_kernel(structure, layer, leaves, gradient)), np.asarray(gradient[leaf]).ravel()


def _dense_kernel(structure: Structure, layer: Layer, leaves: list[jax.Array], gradient: list[jax.Array]) -> jax.Array:
    """(features, classes): the gradient of the matrix of a layer whose output is a vector; without rows where it has none."""
    rng, classes = np.random.default_rng(0), int(np.prod(layer.out_shape))
    first = np.zeros(classes)
    first[0] = 1.0
    for leaf in structure.own.intersection(layer.leaves):
        if leaves[leaf].ndim != 2:
            continue
        of_first = np.asarray(layer.gradient(leaves, first.reshape(layer.out_shape), rng.normal(size=layer.input_shape), leaf))
        for matrix, ours in ((of_first, gradient[leaf]), (of_first.T, gradient[leaf].T)):
            if matrix.shape[1] == classes and matrix[:, 0].any() and not matrix[:, 1:].any():
                return ours
    return jnp.zeros((0, classes))


def last_bias(loss: Loss, params: Any, image_shape: tuple[int, ...]) -> str:
    """The name of the bias of the last layer with parameters, of which the gradient is that of the logits.

    Raises:
      ValueError: where there is no such layer.
    """
    structure = structure_of(loss, params, image_shape, jnp.asarray(0))
    with on_host():
        return structure.names[_last_layer(structure, wide((params, jnp.asarray(0))))[1]]


def _last_layer(structure: Structure, leaves: list[jax.Array]) -> tuple[Layer, int]:
    """The last one with parameters, and which of these is its bias; within `on_host`."""
    for layer in reversed(structure.layers):
        if layer.kind is Kind.AFFINE and any(k < len(structure.names) for k in layer.leaves):
            leaf = direct_leaf(layer, leaves, set(structure.own))
            if leaf is None:
                break
            return layer, leaf
    raise ValueError("no last layer with a bias was found in the loss from which its label could be read")


def explain(loss: Loss, params: Any, x: Any, y: Any = 0) -> list[str]:
    """A line a layer: what it is, from which arrays of the gradient its input can be solved, and where that stops and why.

    Args:
      loss: `loss(params, x, y)`.
      params: any pytree of arrays.
      x: an image (H, W, C); its shape alone matters.
      y: a label.
    """
    y = jax.tree.map(jnp.asarray, y)
    structure = structure_of(loss, params, tuple(np.shape(x)), y)
    with on_host():
        leaves = wide((params, y))
        entry = entry_of(structure, leaves)
        lines = []
        for i, layer in enumerate(structure.layers):
            arrays = ", ".join(structure.names[k] for k in layer.leaves if k < len(structure.names)) or "no parameters"
            what = f"{i}: {layer.shape} -> {layer.out_shape}, {layer.kind.value}, {arrays}"
            lines.append(f"{what}: {_reach(structure, leaves, i, entry)}")
        return lines


def _reach(structure: Structure, leaves: list[jax.Array], i: int, entry: tuple[int, int] | None) -> str:
    """What the descent does at a layer, in words."""
    if entry is None:
        return "not reached: no layer's delta can be read off an array of the gradient"
    layer, (first, leaf) = structure.layers[i], entry
    if i > first:
        return "not needed"
    if i == first:
        return f"its delta is the gradient of {structure.names[leaf]}; its input is solved from its kernel's"
    between = structure.layers[i:first]
    stops = [k for k, one in enumerate(between, i) if one.kind is Kind.OTHER]
    stops += [k for k, one in enumerate(between, i) if one.kind is Kind.POINTWISE and activation_of(one, leaves) is None]
    if stops:
        stop = f"layer {max(stops)} (counted from 0) cannot be inverted"
        return f"not reached: {stop}; the image is searched for from what is known above"
    return "inverted" if layer.kind is Kind.POINTWISE else "its input is solved from its kernel's gradient and its output"
