"""Which parameters a loss has a gradient of, found in its jaxpr: torch leaves None, and no zeros, of the others.

What is computed and thrown away has none (a pooler that no head reads), nor what is detached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from gdiff_jax.jaxprs import inner_of
from gdiff_jax.matching import Loss
from gdiff_jax.modules import Params
from gdiff_jax.victims.uses import by_name


def reached(loss: Loss, params: Params, x: Any, y: Any) -> set[str]:
    """The names of those that a gradient of `loss(params, x, y)` may get to, be it zero there; nothing is computed."""
    program = by_name(loss, params, x, y)
    found = _back(program, [True] * len(program.outvars))
    return {name for name, is_reached in zip(params, found, strict=False) if is_reached}


def _back(jaxpr: Any, outputs: Sequence[bool]) -> list[bool]:
    """Of each input of a program whether a gradient gets to it from those of its outputs."""
    live = {v for v, is_live in zip(jaxpr.outvars, outputs, strict=True) if is_live and not isinstance(v, core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        asked = [_is_real(v) and v in live for v in eqn.outvars]
        if any(asked) and eqn.primitive.name != "stop_gradient":
            live.update(v for v, on in zip(eqn.invars, _through(eqn, asked), strict=True) if on and _is_real(v))
    return [v in live for v in jaxpr.invars]


def _is_real(atom: Any) -> bool:
    return not isinstance(atom, core.Literal) and jnp.issubdtype(getattr(atom.aval, "dtype", bool), jnp.inexact)


def _through(eqn: Any, outputs: list[bool]) -> list[bool]:
    """Of each input of an equation whether a gradient gets to it."""
    name, each = eqn.primitive.name, [True] * len(eqn.invars)
    if name == "cond":
        branches = [_back(branch.jaxpr, outputs) for branch in eqn.params["branches"]]
        return [False, *(any(ways) for ways in zip(*branches, strict=True))]
    inner = inner_of(eqn)
    # A derivative of its own may have what the function itself has not.
    if inner is None or name.startswith("custom_") or (len(inner.invars), len(inner.outvars)) != (len(each), len(outputs)):
        return each
    if name != "scan":
        return _back(inner, outputs)
    first, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    while True:  # what a step carries on is an output of the step before
        inputs = _back(inner, outputs)
        carry = [a or b for a, b in zip(outputs[:carried], inputs[first : first + carried], strict=True)]
        if carry == outputs[:carried]:
            return [*inputs[:first], *carry, *inputs[first + carried :]]
        outputs = [*carry, *outputs[carried:]]
