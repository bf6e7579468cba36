"""Gauss-Newton steps on a smooth network's gradient under noise, with the prior: from a first estimate to the private image."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from gdiff_jax import samplers
from gdiff_jax.algebra.chain import flatten
from gdiff_jax.algebra.links import Equation
from gdiff_jax.jaxprs import equations
from gdiff_jax.matching import GradientMatching, as_compared, at_full_precision, victim_gradient
from gdiff_jax.problem import Problem

FIRST, RATIO = 1.0, 0.9  # of `samplers.plug_and_play` [our choice, measured]
# How often it is run, at most, each time from where it ended, by how much the squared distance must fall for another, in units
# of the noise's variance, and with which momentum: a ViT's steps are far from their end after once [our choice, measured].
PASSES, FALL, MOMENTUM = 4, 50.0, 0.9
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


def refine(problem: Problem, image: jax.Array, first: float = FIRST) -> jax.Array:
    """The image to be expected of a smooth network's gradient, from a first estimate on.

    Args:
      problem: of one image, whose loss has no kink (`smooth` says so), under noise that the attacker knows.
      image: (H, W, C), the first estimate, which may be far off.
      first: about how far it errs in each pixel.

    Returns:
      (H, W, C); by `samplers.plug_and_play`.
    """
    p, noise, residual = problem, problem.noise(), residual_of(problem.match)

    def whole(x: jax.Array) -> list[jax.Array]:
        # As one block: while the image is far off, a small layer that is fitted already must not outweigh the others.
        return [jnp.concatenate([r.ravel() for r in jax.tree.leaves(residual(x))]) / noise]

    square = lambda x: jnp.square(whole(x)[0]).sum()

    once = functools.partial(
        samplers.plug_and_play,
        denoise=p.denoise,
        schedule=p.schedule,
        measured=lambda *_: whole,
        mean=jnp.broadcast_to(p.expected_image, p.shape),
        first=first,
        last=samplers.last_level(noise, p.leak_rms()),
        ratio=RATIO,
        clip=p.clip,
    )

    State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

    def again(state: State) -> State:
        x, least, _, count = state
        new = once(x, momentum=jnp.where(count > 0, MOMENTUM, 0.0))
        now = square(new)
        fell = least - now
        return jnp.where(fell > FALL, new, x), jnp.where(fell > FALL, now, least), fell, count + 1

    going = lambda state: (state[2] > FALL) & (state[3] < PASSES)
    infinite = jnp.asarray(jnp.inf, image.dtype)  # what the first pass makes is taken
    return jax.lax.while_loop(going, again, (image, infinite, infinite, jnp.asarray(0)))[0]


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
