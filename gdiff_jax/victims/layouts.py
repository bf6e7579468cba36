"""Torch's layouts and ours: which axis of an array in a file is which of a parameter, by what a loss does with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gdiff_jax.victims.uses import Kind, Use

Axes = tuple[int, ...]


def torch_axes(name: str, ndim: int, uses: set[Use] | None) -> Axes | None:
    """Of each axis of a parameter the place it has in torch's array, which `np.transpose` takes; None where nothing tells it.

    Torch holds a dense kernel as (out, in), a convolution's as (out, in, window), and whatever is looked up, added or
    multiplied as it is used.

    Args:
      name: of the parameter; without `uses`, `kernel` has Flax's layout.
      ndim: of the parameter.
      uses: all that the loss does with it, or None where that is not known.
    """
    as_it_is, flax = tuple(range(ndim)), {4: (2, 3, 1, 0), 3: (2, 1, 0), 2: (1, 0)}.get(ndim)
    if ndim < 2:
        return as_it_is
    if uses is None:
        return flax if name.rpartition(".")[2] == "kernel" else as_it_is
    found = {use for use in uses if use.kind not in (Kind.OTHER, Kind.UNKNOWN)}
    kinds = {use.kind for use in found}
    if Kind.TABLE in kinds or (not found and Use(Kind.OTHER) in uses):
        return as_it_is
    if len({use.axes for use in found}) != 1 or len(kinds) != 1:
        return None
    ((kind, axes),) = {(use.kind, use.axes) for use in found}
    if kind is Kind.CONVOLUTION and len(axes) == ndim:
        return tuple(axes.index(axis) for axis in as_it_is)
    if kind is Kind.MATRIX and axes == as_it_is[:-1]:
        return flax
    return as_it_is if kind is Kind.MATRIX and ndim == 2 else None


def rows_of(ndim: int, uses: set[Use] | None) -> int:
    """Which axis of a dense kernel its input goes along."""
    return next((use.axes[0] for use in uses or () if ndim == 2 and use.kind is Kind.MATRIX and len(use.axes) == 1), 0)


def may_be_dense(uses: set[Use] | None) -> bool:
    """Whether it is a dense kernel, as far as is known."""
    return uses is None or any(use.kind is Kind.MATRIX for use in uses)


def takes_map(uses: set[Use] | None) -> bool:
    """Whether it is multiplied with what was a feature map, or the image."""
    return any(use.of_map for use in uses or ())


def turned(value: np.ndarray, axes: Axes) -> np.ndarray:
    """Torch's array with the axes of a parameter; 1 x 1 convolutions become matrices where the parameter is one."""
    if len(axes) == 2 < value.ndim and math.prod(value.shape[2:]) == 1:
        value = value.reshape(value.shape[:2])
    return value.transpose(axes) if value.ndim == len(axes) else value


def is_torchs(arrays: list[tuple[np.ndarray, Any, Axes]]) -> bool | None:
    """Whether arrays under one name on both sides have torch's layout, by those that fit in one alone; None: none tells.

    Args:
      arrays: of each the file's array, the parameter, and torch's axes.
    """
    fits = [(value.shape == target.shape, turned(value, axes).shape == target.shape) for value, target, axes in arrays]
    told = {theirs for ours, theirs in fits if ours != theirs}
    return told.pop() if len(told) == 1 else None
