"""The attack on a first dense layer whose gradient carries noise: its rank-one matrix, the network above, and the prior."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from gdiff_jax import samplers
from gdiff_jax.first_dense import FirstDense
from gdiff_jax.matching import as_compared, at_full_precision, l2, released
from gdiff_jax.problem import Info, Method, Problem
from gdiff_jax.pytrees import pytree


def first_dense_of(problem: Problem) -> FirstDense:
    """Of a problem.

    Raises:
      ValueError: where it has none.
    """
    if problem.first_dense is None:
        raise ValueError("this problem's victim has no first dense layer that sees the whole image; take another method")
    return problem.first_dense


@pytree
class AnalyticMean(Method):
    """`samplers.rank_one_mean`: the image to be expected given a first dense layer's gradient, by a few calls of the prior."""

    name: ClassVar[str] = "analytic-mean"
    needs_first_dense: ClassVar[bool] = True
    needs_noise: ClassVar[bool] = True

    def describe(self) -> str:
        return "the posterior mean of the analytic estimate"

    def __call__(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, Info]:
        p, first = problem, first_dense_of(problem)
        match = dataclasses.replace(p.match, weights=None)

        def gradient(x: jax.Array) -> Any:
            return as_compared(match, released(match.client, match.loss, match.params, x, match.label))

        @at_full_precision
        def rescaled(x: jax.Array) -> jax.Array:
            """By the factor that fits best: of a sum in place of a mean, say, or a rate that was guessed."""
            own = gradient(x)
            factor = optax.tree.vdot(match.leak, own) / jnp.maximum(optax.tree.vdot(own, own), 1e-30)
            return l2(jax.tree.map(lambda g: factor * g, own), match.leak)

        numbers = {k: jnp.asarray(v).reshape(1, 1, -1) for k in ("scale", "shift") if (v := getattr(first, k)) is not None}
        leak = samplers.RankOne(first.kernel_of(match.leak), match.leak[first.bias], p.sigma, **numbers)
        image, deviation, trace = samplers.rank_one_mean(
            key,
            p.denoise,
            p.schedule,
            leak,
            lambda x: gradient(x)[first.bias],
            match.in_l2(),
            p.expected_image,
            rescaled=rescaled,
            clip=p.clip,
            truth=p.truth,
        )
        return image, Info(trace, p.outcome(image), deviation=deviation)
