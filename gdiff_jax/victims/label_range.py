"""Whether labels are classes of a loss: an index beyond them is clamped or wrapped by JAX, and another class is attacked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.matching import Loss

Values = Callable[[int], np.ndarray]  # of a label, the loss's values at several random weights

_BEYOND = (100_003, 100_019)  # classes that no loss has
_COMPARED = 64  # classes at most, whose values are held against each other
_DRAWS = 3  # of random weights, so that no two classes agree in all, also in 16 bits


def check_label_range(loss: Loss, params: Any, x: Any, labels: Any) -> None:
    """Whether each of whole labels (N,) or (N, 1) is a class of the loss, as far as the loss's values tell.

    A loss that takes its label as an index, or makes it one-hot, has one value for all labels beyond its classes; one that
    takes it as a number, or not at all, may have any.

    Args:
      loss: `loss(params, x, y)`; of one that fails nothing is said, `check_loss` does.
      params: a pytree of floating arrays.
      x: what the loss takes for one leak: an image (H, W, C), or several (B, H, W, C).
      labels: those of all images; what is no single array of whole numbers is not checked.

    Raises:
      ValueError: naming the first label that is none of the classes.
    """
    leaves = jax.tree.leaves(labels)
    if len(leaves) != 1 or np.shape(leaves[0])[1:] not in ((), (1,)) or np.asarray(leaves[0]).dtype.kind not in "iuf":
        return
    values = np.asarray(leaves[0])
    if values.dtype.kind == "f" and not (np.isfinite(values) & (values == np.round(values))).all():
        return
    values = values.astype(np.int64).ravel()
    high = int(values.max())
    if not values.any():
        return
    try:
        at = _values(loss, params, jnp.asarray(x), labels)
        if not _is_index(at):
            return
        classes = _classes(at, high)
        wrong = np.flatnonzero((values < 0) | (values >= (high + 1 if classes is None else classes)))
        if not len(wrong) or not _are_told_apart(at, high + 1 if classes is None else classes):
            return
    except Exception:  # whatever the user's function raises
        return
    value, known = values[wrong[0]], "which count from 0" if classes is None else f"0 .. {classes - 1}"
    remedy = "leave out images without a label" if value < 0 else "count them from 0, in the order of the model's classes"
    raise ValueError(f"label {value} of image {wrong[0]} is none of the loss's classes, {known}; {remedy}")


def _values(loss: Loss, params: Any, x: jax.Array, labels: Any) -> Values:
    rng = np.random.default_rng(0)
    weights = [_random(rng, params) for _ in range(_DRAWS)]
    wrap = lambda y: jax.tree.map(lambda a: jnp.full(x.shape[:-3] + np.shape(a)[1:], y, jnp.asarray(a).dtype), labels)
    value = jax.jit(lambda weights, x, y: loss(weights, x, wrap(y)))

    @functools.cache
    def at(label: int) -> np.ndarray:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.debug_nans(False):
            return np.array([float(value(drawn, x, jnp.int32(label))) for drawn in weights])

    return at


def _random(rng: np.random.Generator, params: Any) -> Any:
    """Weights under which values neither vanish nor saturate: kernels by their fan-in, vectors near those that are given."""

    def draw(leaf: Any) -> jax.Array:
        noise = rng.standard_normal(leaf.shape, np.float32)
        value = noise / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else np.asarray(leaf, np.float32) + 0.1 * noise
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.map(draw, params)


def _is_index(at: Values) -> bool:
    """Whether all labels far beyond the classes have one value, on either side of 0, and two classes at least have others.

    A loss of two classes that asks whether its label is 0 has one value for all others too: that is no index.
    """
    alike = all(_same(at(sign * _BEYOND[0]), at(sign * _BEYOND[1])) for sign in (1, -1))
    two = not _same(at(0), at(_BEYOND[0])) and not _is_beyond(at, 1)
    return alike and two and bool(np.isfinite(at(0)).all())


def _are_told_apart(at: Values, classes: int) -> bool:
    """Whether each class has a value of its own, and label -1, where JAX clamps an index, that of the last.

    A loss that asks whether its label is above a threshold, looks it up in a coarser table or clips it has one value for many.
    """
    some = [at(label) for label in range(min(classes, _COMPARED))]
    apart = not any(_same(a, b) for k, a in enumerate(some) for b in some[:k])
    return apart and (not _is_clamped(at) or _same(at(-1), at(_BEYOND[0])))


def _is_clamped(at: Values) -> bool:
    """Whether beyond the classes the value is the last one's, and not that of no class.

    Label -2 tells the two apart: clamped or counted from the end it is a class.
    """
    beyond = at(_BEYOND[0])
    return bool(np.isfinite(beyond).all()) and not _same(at(-2), beyond)


def _is_beyond(at: Values, label: int) -> bool:
    """Whether a label from 1 on is none of the classes."""
    return _same(at(label - 1 if _is_clamped(at) else label), at(_BEYOND[0]))


def _classes(at: Values, high: int) -> int | None:
    """How many classes there are, if `high` is none of them; else None."""
    if high < 1 or not _is_beyond(at, high):
        return None
    low = 0  # a class, which `high` is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _is_beyond(at, middle) else (middle, high)
    return high


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=True)
