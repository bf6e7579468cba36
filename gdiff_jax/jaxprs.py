"""The equations of a program as JAX traces it, for what must be known of a stranger's loss before it is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core


def equations(program: Any) -> Iterator[Any]:
    """All equations of a jaxpr, closed or not, and of those within it."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for part in jax.tree.leaves(list(equation.params.values())):
            if isinstance(part, core.ClosedJaxpr | core.Jaxpr):
                yield from equations(part)
