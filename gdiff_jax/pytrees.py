"""Frozen dataclasses as pytrees, each class a tree of its own; and a tree's arrays in float64."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")
static: Callable[..., Any] = functools.partial(dataclasses.field, metadata=dict(static=True))


@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are leaves, but for those made with `static()`.

    Not by `jax.tree_util.register_dataclass`: in jaxlib 0.10.2 the trees of two classes registered so are *equal* when their
    fields are, and differ in their hash alone. A jitted function that is called with one and then the other then runs,
    about once in a hundred pairs, the program of the first: Gaussian noise where Laplace was asked for.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    leaves = [f.name for f in fields if not f.metadata.get("static")]
    fixed = [f.name for f in fields if f.metadata.get("static")]
    keys = [jax.tree_util.GetAttrKey(name) for name in leaves]

    def values(tree: T, names: list[str]) -> tuple[Any, ...]:
        return tuple(getattr(tree, name) for name in names)

    jax.tree_util.register_pytree_with_keys(
        cls,
        lambda tree: (tuple(zip(keys, values(tree, leaves), strict=True)), values(tree, fixed)),
        lambda fixed_values, leaf_values: cls(**dict(zip(leaves + fixed, (*leaf_values, *fixed_values), strict=True))),
        lambda tree: (values(tree, leaves), values(tree, fixed)),
    )
    return cls


def at_least_float32(tree: Any) -> Any:
    """Its floating arrays of fewer bits (float16, bfloat16, float8) in float32; whatever else it holds as it is."""

    def widened(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf.astype(jnp.float32) if leaf.dtype.itemsize < 4 else leaf

    return jax.tree.map(widened, tree)


def as_float64(tree: Any) -> Any:
    """A pytree with its arrays of floats, of whichever kind, in float64, which JAX must have been told to know."""

    def cast(a: Any) -> jax.Array:  # by NumPy: JAX would compile a program for each shape
        array = np.asarray(a)
        array = array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array
        return jnp.asarray(array, array.dtype)

    return jax.tree.map(cast, tree)
