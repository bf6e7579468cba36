"""A forward derivative, also of what JAX can differentiate in reverse only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from gdiff_jax.jaxprs import equations


def jvp(function: Callable[[Any], Any], at: Any, along: Any) -> Any:
    """J v of a function at a point, along v shaped as that point; pytrees.

    A victim may hold a rule of its own, `jax.custom_vjp`, of which no forward derivative can be taken, as JAX says only when it
    compiles. There J^T u, which is linear in u, is transposed once more: two reverse passes in place of a forward one.
    """
    if not any(e.primitive.name.startswith("custom_vjp_call") for e in equations(jax.make_jaxpr(function)(at))):
        return jax.jvp(function, (at,), (along,))[1]
    out, transposed = jax.vjp(function, at)
    return jax.linear_transpose(lambda u: transposed(u)[0], out)(along)[0]
