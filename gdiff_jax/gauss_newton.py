"""Gauss-Newton passes on a smooth network's gradient under noise: from an image near the private one closer to it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from gdiff_jax import samplers
from gdiff_jax.algebra.chain import flatten
from gdiff_jax.algebra.links import Equation
from gdiff_jax.jaxprs import equations
from gdiff_jax.matching import GradientMatching, as_compared, at_full_precision, victim_gradient
from gdiff_jax.problem import Info, Method, Problem
from gdiff_jax.pytrees import pytree, static
from gdiff_jax.trace import StepInfo, x0_error

RENOISED = 0.3  # standard deviation of the noise from which a pass takes its image up again [our choice, measured]
# Of a value where it is not differentiable, or constant by pieces.
_KINKS = {
    *(
        "max",
        "min",
        "abs",
        "sign",
        "clamp",
        "reduce_max",
        "reduce_min",
        "argmax",
        "argmin",
        "cummax",
        "cummin",
        "sort",
        "top_k",
    ),
    *("reduce_window", "reduce_window_max", "reduce_window_min", "reduce", "floor", "ceil", "round", "rem"),
}
_SMOOTH_CALLS = {"logaddexp"}  # with a derivative of their own, though written with a maximum: softplus, log sigmoid


@pytree
class GaussNewton(Method):
    """`samplers.gauss_newton_sample`, a few times over, each from the image that the last one left.

    For networks without kinks (`smooth` says whether one is), of one image, under noise that the attacker knows. It refines
    what another method found. Called alone it starts at the expected image, from where it seldom finds the way.
    """

    passes: int = static(default=3)
    name: ClassVar[str] = "gauss-newton"
    needs_noise: ClassVar[bool] = True

    def describe(self) -> str:
        return f"Gauss-Newton, {self.passes} passes"

    def __call__(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, Info]:
        x = self.refine(key, problem, jnp.broadcast_to(problem.expected_image, problem.shape))
        step = StepInfo(problem.match.in_l2()(x), jnp.full((), jnp.nan), x0_error(jnp.clip(x, -1.0, 1.0), problem.truth))
        return x, Info(jax.tree.map(lambda a: jnp.asarray(a)[None], step), problem.outcome(x))

    def refine(self, key: jax.Array, problem: Problem, image: jax.Array) -> jax.Array:
        """An image (H, W, C) of no greater distance to the leak than the one that is given; that one, where it is not finite.

        A pass draws the image anew from `RENOISED`, and is kept where it is closer. There is none once the distance is what
        noise alone leaves, sigma sqrt(p) of p coordinates: below that it is the noise that is fitted.
        """
        p, distance = problem, problem.match.in_l2()
        sigma = p.noise()
        floor = sigma * math.sqrt(sum(g.size for g in jax.tree.leaves(p.match.leak)))

        def one(state: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, jax.Array, jax.Array]:
            i, x, before = state
            k_start, k_sample = jax.random.split(jax.random.fold_in(key, i))
            start = samplers.start_from(k_start, p.schedule, x, RENOISED)
            found, _ = samplers.gauss_newton_sample(
                k_sample, p.denoise, residual_of(p.match), p.schedule, p.shape, sigma, clip=p.clip, start=start
            )
            after = distance(found)
            closer = after < before  # not where either is nan
            return i + 1, jnp.where(closer, found, x), jnp.where(closer, after, before)

        unfinished = lambda state: (state[0] < self.passes) & (state[2] > floor)
        return jax.lax.while_loop(unfinished, one, (jnp.asarray(0), image, distance(image)))[1]


def residual_of(match: GradientMatching) -> Callable[[jax.Array], Any]:
    """r(x), a pytree: an image's gradient less the leak, through the mechanism, every coordinate counting alike."""
    known = dataclasses.replace(match, weights=None)

    @at_full_precision
    def residual(x: jax.Array) -> Any:
        gradient = victim_gradient(known.loss, known.params, x, known.label)
        return jax.tree.map(jnp.subtract, as_compared(known, gradient), known.leak)

    return residual


def smooth(problem: Problem) -> bool:
    """Whether Gauss-Newton steps can be taken on a problem's gradient, found where the loss is traced: nothing is computed.

    It is of one image and one gradient, differentiable forwards, and nothing between the image and the loss has a kink: no
    ReLU, no maximum, no choice by a value. What passes through a stop_gradient, as softmax's maximum, does not count.
    """
    match = problem.match
    if len(problem.shape) != 3 or match.client is not None:
        return False
    leaves, tree = jax.tree.flatten((match.params, match.label))
    return _is_smooth(match.loss, tree, tuple((jnp.shape(a), jnp.result_type(a)) for a in leaves), problem.shape)


@functools.lru_cache(maxsize=16)  # the host asks for every leak
def _is_smooth(loss: Any, tree: Any, shapes: tuple[Any, ...], image_shape: tuple[int, ...]) -> bool:
    params, label = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    image = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    if _has_kink(jax.make_jaxpr(loss)(params, image, label), len(jax.tree.leaves(params))):
        return False
    traced = jax.make_jaxpr(functools.partial(victim_gradient, loss))(params, image, label)
    return not any(e.primitive.name.startswith("custom_vjp_call") for e in equations(traced))


def _has_kink(closed: Any, image: int) -> bool:
    """Whether a program's result has kinks in its argument of that number."""
    program, _, inputs, outputs = flatten(closed)
    moving = {inputs[image]}
    for e in program:
        if moving.intersection(e.inputs):
            moving.update(e.outputs)
    needed, taken_by = set(outputs), dict[int, set[str]]()
    for e in reversed(program):
        name = e.eqn.primitive.name
        if name == "stop_gradient" or not needed.intersection(e.outputs):
            continue
        logs = all(taken_by.get(i) == {"log"} for i in e.outputs)
        if moving.intersection(e.inputs) and _is_kink(e, moving, logs):
            return True
        needed.update(e.inputs)
        for i in e.inputs:
            taken_by.setdefault(i, set()).add(name)
    return False


def _is_kink(e: Equation, moving: set[int], logs: bool) -> bool:
    """Of an equation that takes the image and gives the loss; `logs`: it is the log that takes its result."""
    name, call = e.eqn.primitive.name, e.eqn.params.get("call_jaxpr")
    if call is not None and call.jaxpr.debug_info.func_name in _SMOOTH_CALLS:
        return False
    if name == "abs" and logs:  # of a sum of exponentials, as logsumexp has it
        return False
    inner = {within.primitive.name for part in jax.tree.leaves(list(e.eqn.params.values())) for within in _equations_of(part)}
    return name in _KINKS or (name == "select_n" and e.inputs[0] in moving) or bool(inner & {*_KINKS, "select_n"})


def _equations_of(part: Any) -> list[Any]:
    """Of a loop's or a call's program: which of its values the image moves is not asked, each may be."""
    return list(equations(part)) if isinstance(part, jex.ClosedJaxpr | jex.Jaxpr) else []
