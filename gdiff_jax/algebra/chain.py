"""The chain of maps between an image and the loss, found in the loss's jaxpr: no layer has to be declared.

A variable through which everything passes that depends on the image cuts the computation in two. What lies between two
neighbouring cuts is a link: affine in what enters it (a layer, a reshape, a mean over a window), pointwise (an activation),
or neither (a norm, attention, softmax). Nothing here knows of networks: whatever a loss was written in, it ends in a jaxpr.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from gdiff_jax.algebra.links import Equation, Kind, Link, by_patches, cuts_patches

# Affine in all that depends on the image together; of `select_n` where the choice does not depend on it.
_AFFINE = {
    *("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "slice", "rev", "pad", "concatenate", "split"),
    *("convert_element_type", "copy", "copy_p", "neg", "reduce_sum", "cumsum", "add", "sub", "add_any", "gather"),
    *("dynamic_slice", "select_n", "reduce_window_sum", "real", "optimization_barrier", "reduce_precision"),
    "sharding_constraint",
}  # fmt: skip
_PRODUCTS = {"mul", "dot_general", "conv_general_dilated"}  # affine where one factor alone depends on the image
_POINTWISE = {
    *("add", "sub", "mul", "div", "neg", "max", "min", "exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "erf"),
    *("erfc", "erf_inv", "abs", "sign", "sin", "cos", "atan2", "integer_pow", "pow", "sqrt", "rsqrt", "cbrt", "square"),
    *("select_n", "gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not", "is_finite", "clamp", "convert_element_type"),
    *("copy", "copy_p", "custom_jvp_call", "stop_gradient", "sinh", "cosh", "asinh", "acosh", "atan", "broadcast_in_dim"),
}  # fmt: skip
# Calls that are looked into, and where their equations are. A `custom_jvp_call` is kept whole: its derivative is its own.
_INLINED = {
    **dict.fromkeys(("jit", "pjit", "checkpoint", "remat", "remat2"), "jaxpr"),
    **dict.fromkeys(("closed_call", "core_call", "custom_vjp_call"), "call_jaxpr"),
}


def flatten(closed: Any) -> tuple[list[Equation], dict[int, Any], list[int], list[int]]:
    """Equations with calls inlined, values of constants by variable, the inputs and the outputs."""
    equations: list[Equation] = []
    constants: dict[int, Any] = {}
    count = iter(range(10**9))

    def run(jaxpr: Any, consts: Sequence[int], args: Sequence[int]) -> list[int]:
        number: dict[Any, int] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Any) -> int:
            if isinstance(atom, jex.Literal):
                i = next(count)
                constants[i] = atom.val
                return i
            return number[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            inner = eqn.params.get(_INLINED.get(eqn.primitive.name, ""))
            if inner is not None:
                inner = inner if hasattr(inner, "consts") else jex.ClosedJaxpr(inner, ())
                outputs = run(inner.jaxpr, [_constant(c) for c in inner.consts], inputs)
            else:
                outputs = [next(count) for _ in eqn.outvars]
                equations.append(Equation(eqn, tuple(inputs), tuple(outputs)))
            number.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _constant(value: Any) -> int:
        i = next(count)
        constants[i] = value
        return i

    inputs = [next(count) for _ in closed.jaxpr.invars]
    outputs = run(closed.jaxpr, [_constant(c) for c in closed.consts], inputs)
    return equations, constants, inputs, outputs


def _in_full(eqn: Any) -> Any:
    """The equation without casts to fewer bits: what a network does to save memory is not what its algebra is."""
    wide = jnp.result_type(float)  # float64 on the host, float32 in a traced function of the device
    narrow = {
        name: wide
        for name in ("new_dtype", "preferred_element_type")
        if (dtype := eqn.params.get(name)) is not None and jax.dtypes.issubdtype(dtype, np.floating)
    }
    return eqn.replace(params=eqn.params | narrow) if narrow else eqn


def _bind(equation: Equation, values: list[Any]) -> list[Any]:
    """The equation's results."""
    eqn = _in_full(equation.eqn)
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # versions of JAX differ
    out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _evaluator(equations: Sequence[Equation], constants: dict[int, Any], leaf: dict[int, int], v: int, out: int) -> Any:
    """The function (leaves, v) -> out of these equations, of those that it needs."""
    needed, kept = {out}, []
    for equation in reversed(equations):
        if needed.intersection(equation.outputs) and v not in equation.outputs:
            kept.append(equation)
            needed.update(equation.inputs)
    kept.reverse()

    def call(leaves: Sequence[Any], value: Any) -> Any:
        env = (
            {i: c for i, c in constants.items() if i in needed}
            | {i: leaves[k] for i, k in leaf.items() if i in needed}
            | {v: value}
        )
        for equation in kept:
            env.update(zip(equation.outputs, _bind(equation, [env[i] for i in equation.inputs]), strict=True))
        return env[out]

    return call


def _is_affine(equations: Sequence[Equation], moving: set[int]) -> bool:
    for eqn, inputs, _ in equations:
        of_image = [i in moving for i in inputs]
        name = eqn.primitive.name
        if name in _PRODUCTS:
            if sum(of_image) != 1:
                return False
        elif name == "div":
            if of_image[1]:
                return False
        elif name == "select_n":
            if of_image[0]:
                return False
        elif name in ("gather", "dynamic_slice"):
            if any(of_image[1:]):
                return False
        elif name == "integer_pow":
            if eqn.params["y"] != 1:
                return False
        elif name not in _AFFINE:
            return False
    return True


def _is_pointwise(equations: Sequence[Equation], moving: set[int], shape: tuple[int, ...]) -> bool:
    """Every entry of the result depends on the same entry of v alone; what is broadcast does not depend on the image."""
    for eqn, inputs, _ in equations:
        if eqn.primitive.name not in _POINTWISE or any(out.aval.shape != shape for out in eqn.outvars):
            return False
        if any(atom.aval.shape != shape for atom, i in zip(eqn.invars, inputs, strict=True) if i in moving):
            return False
        inner = eqn.params.get("call_jaxpr")
        if inner is not None and not _inner_is_pointwise(inner.jaxpr, shape):
            return False
    return True


def _inner_is_pointwise(jaxpr: Any, shape: tuple[int, ...]) -> bool:
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if inner is not None:
            if not _inner_is_pointwise(getattr(inner, "jaxpr", inner), shape):
                return False
        elif eqn.primitive.name not in _POINTWISE or any(out.aval.shape not in (shape, ()) for out in eqn.outvars):
            return False
    return True


def find_chain(loss: Callable[..., jax.Array], params: Any, x: Any, y: Any) -> list[Link]:
    """The links from the image to the loss, in order; the last ends in the scalar loss.

    Args:
      loss: `loss(params, x, y)`, a scalar; nothing is computed with it.
      params: any pytree of arrays or their shapes.
      x: (H, W, C), the image or its shape.
      y: its label. Its arrays stand behind those of the parameters in the flat list that links take.
    """
    leaves, tree = jax.tree.flatten((params, y))

    def of_flat(leaves: list[Any], x: Any) -> jax.Array:
        params, y = jax.tree.unflatten(tree, leaves)
        return loss(params, x, y)

    closed = jax.make_jaxpr(of_flat)(leaves, x)
    equations, constants, inputs, (out,) = flatten(closed)
    leaf = {variable: k for k, variable in enumerate(inputs[:-1])}
    image = inputs[-1]

    moving = {image}  # variables that depend on the image
    for _, ins, outs in equations:
        if moving.intersection(ins):
            moving.update(outs)
    needed = {out}  # of these, what the loss needs
    for _, ins, outs in reversed(equations):
        if needed.intersection(outs):
            needed.update(ins)
    path = [e for e in equations if moving.intersection(e.inputs) and needed.intersection(e.outputs)]
    last_use = {i: k for k, e in enumerate(path) for i in e.inputs if i in moving} | {out: len(path)}

    shapes = {image: tuple(closed.jaxpr.invars[-1].aval.shape)}
    links, start, begin, live = [], image, 0, {image}
    for k, e in enumerate(path):
        live |= {i for i in e.outputs if i in last_use}
        shapes.update({i: tuple(o.aval.shape) for i, o in zip(e.outputs, e.eqn.outvars, strict=True)})
        live = {i for i in live if last_use[i] > k}
        if len(live) != 1:
            continue
        (cut,) = live
        part = path[begin : k + 1]
        shape = shapes[start]
        if _is_affine(part, moving):
            kind = Kind.AFFINE
        elif shapes[cut] == shape and _is_pointwise(part, moving, shape):
            kind = Kind.POINTWISE
        else:
            kind = Kind.OTHER
        used = _leaves_used(equations, leaf, moving, part)
        link = Link(kind, used, shape, shapes[cut], _evaluator(equations, constants, leaf, start, cut))
        links += by_patches(link, part[0].eqn) if len(part) == 1 and cuts_patches(part[0], moving) else [link]
        start, begin = cut, k + 1
    return links


def _leaves_used(equations: list[Equation], leaf: dict[int, int], moving: set[int], part: list[Equation]) -> tuple[int, ...]:
    """Parameters that reach these equations otherwise than through the image's path."""
    needed = {i for e in part for i in e.inputs if i not in moving}
    for e in reversed(equations):
        if needed.intersection(e.outputs) and not moving.intersection(e.inputs):
            needed.update(e.inputs)
    return tuple(sorted({leaf[i] for i in needed if i in leaf}))
