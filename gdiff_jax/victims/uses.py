"""What a loss does with each parameter, found in its jaxpr: that, and not its shape, says what a kernel's axes are."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from gdiff_jax.jaxprs import inner_of
from gdiff_jax.matching import Loss
from gdiff_jax.modules import Params


class Kind(enum.Enum):
    MATRIX = "a matrix that is multiplied with"
    CONVOLUTION = "a convolution's kernel"
    TRANSPOSED = "a transposed convolution's kernel"
    TABLE = "a table whose rows are looked up"
    OTHER = "added or multiplied, number by number"
    UNKNOWN = "used in a way that is not followed"


class Use(NamedTuple):
    """One thing that is done with a parameter.

    Attributes:
      kind: what it is used as.
      axes: of a matrix those of its axes that are summed over; of a convolution's kernel its axes of the outputs, the inputs
        and the window, in this order. () where they are axes of a reshaped parameter.
      of_map: whether a matrix takes rows that were a feature map, or the image: three axes or more in one.
    """

    kind: Kind
    axes: tuple[int, ...] = ()
    of_map: bool = False


_Axes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A parameter on its way: of each of its axes now, those of the array as it is stored."""

    name: str
    axes: _Axes


@dataclasses.dataclass(frozen=True)
class _Moving:
    """What depends on the image."""

    flattened: bool = False


_State = _Parameter | _Moving | None  # None: a constant, the label, or what was made of parameters
Uses = dict[str, set[Use]]
_SAME = {
    "convert_element_type",
    "copy",
    "stop_gradient",
    "optimization_barrier",
    "reduce_precision",
    "neg",
    "sharding_constraint",
}
_NUMBERWISE = {"add", "sub", "mul", "div", "max", "min", "add_any", "select_n"}


def uses(loss: Loss, params: Params, x: Any, y: Any) -> Uses:
    """By name, all that `loss(params, x, y)` does with a parameter; nothing is computed."""
    program = by_name(loss, params, x, y)
    found: Uses = {name: set() for name in params}
    whole = [_Parameter(name, tuple((axis,) for axis in range(params[name].ndim))) for name in params]
    _walk(program, [*whole, *(_Moving() for _ in program.invars[len(params) :])], found)
    return found


def by_name(loss: Loss, params: Params, x: Any, y: Any) -> Any:
    """The jaxpr of `loss(params, x, y)`, whose inputs are the parameters in the order of their names in `params`, then x."""
    flat = lambda leaves, x: loss(dict(zip(params, leaves, strict=True)), x, y)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.make_jaxpr(flat)(list(params.values()), x).jaxpr


def _walk(jaxpr: Any, states: Sequence[_State], found: Uses) -> list[_State]:
    state: dict[Any, _State] = dict(zip(jaxpr.invars, states, strict=True))
    read = lambda atom: None if isinstance(atom, core.Literal) else state.get(atom)
    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        outputs = _step(eqn, inputs, found) if any(s is not None for s in inputs) else [None] * len(eqn.outvars)
        state.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _step(eqn: Any, inputs: list[_State], found: Uses) -> list[_State]:
    """The states of an equation's outputs; what it does with a parameter goes to `found`."""
    name = eqn.primitive.name
    if name == "cond":
        branches = [_walk(branch.jaxpr, inputs[1:], found) for branch in eqn.params["branches"]]
        return [next((s for s in states if s is not None), None) for states in zip(*branches, strict=True)]
    inner = inner_of(eqn)
    if inner is not None and len(inner.invars) == len(inputs):
        if name != "scan":
            return _walk(inner, inputs, found)
        kept = eqn.params["num_consts"] + eqn.params["num_carry"]  # what is scanned over loses its first axis
        sliced = [dataclasses.replace(s, axes=s.axes[1:]) if isinstance(s, _Parameter) else s for s in inputs[kept:]]
        return [None if isinstance(s, _Parameter) else s for s in _walk(inner, [*inputs[:kept], *sliced], found)]
    parameters = [(i, s) for i, s in enumerate(inputs) if isinstance(s, _Parameter)]
    moving = [s for s in inputs if isinstance(s, _Moving)]
    if len(parameters) == 1 and not moving:
        ((place, one),) = parameters
        axes = _moved(eqn, place, one.axes)
        if axes is not None:
            return [dataclasses.replace(one, axes=axes)]
    for place, one in parameters:
        found[one.name].add(_use(eqn, place, one.axes, moving))
    if not moving:
        return [None] * len(eqn.outvars)
    if name == "reshape":
        return [_Moving(moving[0].flattened or _flattens(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape))]
    mixes = name in ("dot_general", "conv_general_dilated") or name.startswith("reduce")
    return [_Moving(not mixes and any(s.flattened for s in moving))] * len(eqn.outvars)


def _moved(eqn: Any, place: int, axes: _Axes) -> _Axes | None:
    """The axes of a parameter behind an equation that only moves or scales it; None for one that does more."""
    name, shape, out = eqn.primitive.name, eqn.invars[place].aval.shape, eqn.outvars[0].aval.shape
    if name in _SAME or (name in _NUMBERWISE and out == shape):
        return axes
    if name == "transpose":
        return tuple(axes[i] for i in eqn.params["permutation"])
    if name == "squeeze":
        return tuple(a for i, a in enumerate(axes) if i not in eqn.params["dimensions"])
    if name in ("broadcast_in_dim", "expand_dims") and math.prod(out) == math.prod(shape):
        back = dict(zip(eqn.params["broadcast_dimensions"], axes, strict=True))
        return tuple(back.get(i, ()) for i in range(len(out)))
    return _regrouped(axes, shape, out) if name == "reshape" else None


def _regrouped(axes: _Axes, shape: Any, out: Any) -> _Axes | None:
    """Axes behind a reshape that puts neighbours together or adds axes of 1; None for one that cuts an axis."""
    result, k = [], 0
    for size in out:
        group, found = 1, tuple[int, ...]()
        while k < len(shape) and group < size:
            group, found, k = group * shape[k], found + axes[k], k + 1
        if group != size:
            return None
        result.append(found)
    return tuple(result) if all(n == 1 for n in shape[k:]) else None


def _flattens(shape: Any, out: Any) -> bool:
    """Whether a reshape makes one axis of three or more: a map of (H, W, C) becomes a vector."""
    groups = _regrouped(tuple((i,) if n > 1 else () for i, n in enumerate(shape)), shape, out)
    return groups is not None and any(len(group) >= 3 for group in groups)


def _use(eqn: Any, place: int, axes: _Axes, moving: list[_Moving]) -> Use:
    name = eqn.primitive.name
    single = lambda places: tuple(axes[i][0] for i in places) if all(len(axes[i]) == 1 for i in places) else ()
    if name == "dot_general" and moving:
        summed = eqn.params["dimension_numbers"][0][place]
        return Use(Kind.MATRIX, tuple(sorted(a for i in summed for a in axes[i])), any(s.flattened for s in moving))
    if name == "conv_general_dilated" and moving and place == 1:
        spread = any(n != 1 for n in eqn.params["lhs_dilation"])
        return Use(Kind.TRANSPOSED if spread else Kind.CONVOLUTION, single(eqn.params["dimension_numbers"].rhs_spec))
    if name in ("gather", "dynamic_slice") and place == 0:
        return Use(Kind.TABLE)
    return Use(Kind.OTHER if name in {*_NUMBERWISE, "slice", "concatenate", "broadcast_in_dim"} else Kind.UNKNOWN)
