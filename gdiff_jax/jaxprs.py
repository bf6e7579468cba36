"""The equations of a program as JAX traces it, for what must be known of a stranger's loss before it is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters of an equation that hold the one program it runs


def inner_of(equation: Any) -> Any:
    """The jaxpr that an equation runs, as a call, a scan or a rule of its own does; None where there is none, or several."""
    found = (part for key in _CALLS if isinstance(part := equation.params.get(key), core.ClosedJaxpr | core.Jaxpr))
    inner = next(found, None)
    return getattr(inner, "jaxpr", inner)


def equations(program: Any) -> Iterator[Any]:
    """All equations of a jaxpr, closed or not, and of those within it."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for part in jax.tree.leaves(list(equation.params.values())):
            if isinstance(part, core.ClosedJaxpr | core.Jaxpr):
                yield from equations(part)
