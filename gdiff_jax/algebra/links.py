"""One map of a chain, and the patch embedding, which is two: it cuts tokens, and is dense on them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Kind(enum.Enum):
    AFFINE = "affine"
    POINTWISE = "pointwise"
    OTHER = "other"


class Equation(NamedTuple):
    """One of the flattened jaxpr's, its variables numbered."""

    eqn: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Link:
    """One map of the chain, `out = link(leaves, v)`; `leaves` are all arrays of the parameters and the label.

    Attributes:
      kind: what it is in v.
      leaves: which of the parameters it takes, by their place in the flat list.
      shape, out_shape: of v and of what it returns.
    """

    kind: Kind
    leaves: tuple[int, ...]
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    call: Callable[[Sequence[Any], Any], Any] = dataclasses.field(repr=False, compare=False)

    def __call__(self, leaves: Sequence[jax.Array], v: jax.Array) -> jax.Array:
        return self.call(leaves, v)


def cuts_patches(equation: Equation, moving: set[int]) -> bool:
    """Whether it is a convolution of the image's windows that neither overlap nor leave pixels out: a patch embedding."""
    eqn = equation.eqn
    if eqn.primitive.name != "conv_general_dilated" or equation.inputs[0] not in moving:
        return False
    p, dims = eqn.params, eqn.params["dimension_numbers"]
    image, kernel = (atom.aval.shape for atom in eqn.invars)
    sizes = [(image[i], kernel[k]) for i, k in zip(dims.lhs_spec[2:], dims.rhs_spec[2:], strict=True)]
    return (
        tuple(p["window_strides"]) == tuple(k for _, k in sizes)
        and all(n % k == 0 and k > 1 for n, k in sizes)
        and not np.any(p["padding"])
        and set(p["lhs_dilation"]) == set(p["rhs_dilation"]) == {p["feature_group_count"]} == {p["batch_group_count"]} == {1}
    )


def by_patches(link: Link, eqn: Any) -> list[Link]:
    """The link as one that makes tokens, (N, tokens, numbers in the kernel's order), and one that is dense on them."""
    dims = eqn.params["dimension_numbers"]
    image, kernel = (atom.aval.shape for atom in eqn.invars)
    lhs, rhs = dims.lhs_spec, dims.rhs_spec
    # Axes of the image, each spatial one as (windows, within); where each of them is in that longer list.
    split, at = list[int](), dict[int, tuple[int, ...]]()
    for axis, n in enumerate(image):
        if axis in lhs[2:]:
            k = kernel[rhs[lhs.index(axis)]]
            at[axis] = (len(split), len(split) + 1)
            split += [n // k, k]
        else:
            at[axis] = (len(split),)
            split.append(n)
    inner = [at[lhs[rhs.index(axis)]][-1] for axis in range(len(kernel)) if axis != rhs[0]]
    order = [at[lhs[0]][0], *(at[axis][0] for axis in lhs[2:]), *inner]
    grid = [split[i] for i in order]
    tokens = (grid[0], int(np.prod(grid[1 : len(lhs) - 1])), int(np.prod(grid[len(lhs) - 1 :])))
    back = [int(i) for i in np.argsort(order)]
    cut = lambda _, v: v.reshape(split).transpose(order).reshape(tokens)
    joined = lambda leaves, u: link(leaves, u.reshape(grid).transpose(back).reshape(image))
    return [
        Link(Kind.AFFINE, (), link.shape, tokens, cut),
        Link(link.kind, link.leaves, tokens, link.out_shape, joined),
    ]
