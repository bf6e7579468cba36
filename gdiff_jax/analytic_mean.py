"""The attack on a first dense layer whose gradient carries noise: its rank-one matrix, the network above, and the prior."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from gdiff_jax import samplers
from gdiff_jax.first_dense import FirstDense
from gdiff_jax.matching import as_compared, at_full_precision, l2, released
from gdiff_jax.mechanisms import Clip, Mechanism, stages_of
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

        def delta(x: jax.Array) -> jax.Array:
            return gradient(x)[first.bias]

        @at_full_precision
        def rescaled(x: jax.Array) -> jax.Array:
            """By the factor that fits best: of a sum in place of a mean, say, or a rate that was guessed."""
            own = gradient(x)
            factor = _factor(own, match.leak)
            return l2(jax.tree.map(lambda g: factor * g, own), match.leak)

        beside = lambda arrays: {name: g for name, g in arrays.items() if name != first.kernel}

        def delta_beside(x: jax.Array) -> jax.Array:
            """By the factor of the arrays beside the kernel, whose size is not the image's."""
            own = gradient(x)
            return jnp.maximum(_factor(beside(own), beside(match.leak)), 0.0) * own[first.bias]

        @at_full_precision
        def aside(x: jax.Array, length: jax.Array) -> jax.Array:
            own = gradient(x)
            square = jnp.vdot(own[first.bias], own[first.bias])
            factor = length / jnp.sqrt(jnp.where(square > 0, square, 1.0))
            return l2(jax.tree.map(lambda g: factor * g, beside(own)), beside(match.leak))

        numbers = {k: jnp.asarray(v).reshape(1, 1, -1) for k in ("scale", "shift") if (v := getattr(first, k)) is not None}
        leak = samplers.RankOne(first.kernel_of(match.leak), match.leak[first.bias], p.sigma, **numbers)

        def found(delta: Callable[[jax.Array], jax.Array], **tell: Any) -> Any:
            """From what the network makes of the mean image and from the leak's singular vector; the one that fits better."""
            begins = jnp.stack(
                [samplers.first_delta(jax.random.fold_in(key, 0), delta, p.expected_image), samplers.leading_delta(leak)]
            )
            mean = lambda begin: samplers.rank_one_mean(
                key,
                p.denoise,
                p.schedule,
                leak,
                delta,
                objective,
                p.expected_image,
                begin=begin,
                clip=p.clip,
                truth=p.truth,
                **tell,
            )
            ends = jax.lax.map(mean, begins)
            distances = jax.lax.map(objective, ends[0])
            return jax.tree.map(lambda a: a[jnp.argmin(distances)], ends)

        objective = match.in_l2()
        ended = found(delta, rescaled=rescaled)
        if (bound := clip_norm(p.match.mechanism)) is not None:
            # By how much a gradient was clipped the image decides, so that of one that is too pale the delta is too long, and
            # makes it pale: there the arrays beside the kernel tell the factor.
            unclipped, other = _is_below(match.leak, bound, p.sigma), found(delta_beside, aside=aside)
            ended = jax.tree.map(lambda a, b: jnp.where(unclipped, a, b), ended, other)
        image, deviation, trace = ended
        return image, Info(trace, p.outcome(image), deviation=deviation)


def _factor(own: Any, leak: Any) -> jax.Array:
    """By which one gradient fits another best."""
    return optax.tree.vdot(leak, own) / jnp.maximum(optax.tree.vdot(own, own), 1e-30)


def clip_norm(mechanism: Mechanism | None) -> jax.Array | float | None:
    """By which a mechanism bounds the norm of a gradient; None where it does not."""
    return next((stage.norm for stage in stages_of(mechanism) if isinstance(stage, Clip)), None)


def _is_below(leak: Any, bound: jax.Array | float, sigma: jax.Array | float) -> jax.Array:
    """Whether a leak's norm without its noise is, but for a chance of about 1 in 1,000, below a bound."""
    square, numbers = optax.tree.vdot(leak, leak), sum(g.size for g in jax.tree.leaves(leak))
    variance = jnp.square(jnp.asarray(sigma, square.dtype))
    deviation = jnp.sqrt(2 * numbers * jnp.square(variance) + 4 * variance * jnp.square(bound))
    return square - numbers * variance + 3 * deviation < jnp.square(bound)
