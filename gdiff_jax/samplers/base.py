"""What the samplers share: the posterior of one reverse step, its guidance, and the loop.

A *denoiser* is a callable `eps, v = denoise(x_t, t)` on one image and an integer timestep (v is the learned variance or
None); an *objective* is a callable `distance = objective(x0)` to a scalar. Both must be pytrees (a module, a registered
dataclass, `jax.tree_util.Partial`) if they are to pass through jit as arguments. Images are (H, W, C) in [-1, 1]; a batch of
trials is a `jax.vmap` over keys and objectives. Nothing here knows of victims or gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from gdiff_jax.schedule import Schedule

Denoise = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]
Objective = Callable[[jax.Array], jax.Array]


class StepInfo(NamedTuple):
    """What a step reports, float32 scalars; the trace of a sampler stacks them to (num_steps,), noisiest step first."""

    distance: jax.Array  # objective(x0hat); nan where the step was not guided
    guidance_norm: jax.Array  # || grad_{x_t} objective(x0hat(x_t)) ||; nan where the step was not guided
    x0_error: jax.Array  # mean over pixels of (x0hat - truth)^2, images in [-1, 1]; nan without a truth
    # Share of signal in the guidance and its parts, see `Share`; nan where a sampler was given no signal.
    signal: jax.Array | float = float("nan")
    pull: jax.Array | float = float("nan")
    noise_pull: jax.Array | float = float("nan")
    curvature: jax.Array | float = float("nan")


class Share(NamedTuple):
    """What is known of a guidance besides its direction, scalars: signal = clip(1 - noise_pull^2 / pull^2, 0, 1).

    The expected cosine between the guidance and what it would be without noise is sqrt(signal), where x0hat does not depend on
    that noise: it does the more, the longer it was guided [inferred].
    """

    signal: jax.Array  # share of signal in the pull's energy
    pull: jax.Array  # || J^T r ||, the residual's pull on the pixels of x0hat
    noise_pull: jax.Array  # the same of what noise alone would leave
    curvature: jax.Array  # || J u ||^2, u the pull's direction

    def length(self) -> jax.Array:
        """How far to go along the pull until the distance *without* its noise is least, J taken as constant.

        Half its square falls by a signal pull - a^2 curvature / 2 for a step a, signal and noise being orthogonal in
        expectation, under the same condition.
        """
        return self.signal * self.pull / jnp.where(self.curvature > 0, self.curvature, 1.0)


class Signal(Protocol):
    """A pytree that says what a guidance is worth.

    Of a key of its own, the number of guided steps before this one, the noise_pull of the one before (nan in the first), x0hat,
    the objective's value and its gradient there.
    """

    def __call__(
        self, key: jax.Array, n: jax.Array, held: jax.Array, x0: jax.Array, distance: jax.Array, gradient: jax.Array
    ) -> Share: ...


ShareOf = Callable[[jax.Array, jax.Array, jax.Array], Share]  # of x0hat, the objective's value and its gradient


class Posterior(NamedTuple):
    """p(x_{t-1} | x_t) of one step: x0hat and mean (H, W, C), std scalar or (H, W, C)."""

    x0: jax.Array
    mean: jax.Array
    std: jax.Array


class Start(NamedTuple):
    """Where a reverse process begins when something is known of the image: x_t (the image's shape) at index `step`, scalar."""

    x: jax.Array
    step: jax.Array


def start_from(key: jax.Array, schedule: Schedule, image: jax.Array, std: jax.Array | float) -> Start:
    """The start for an estimate = image + std n, n standard normal: it *is* x_t / sqrt(abar) where (1 - abar) / abar = std^2.

    The first kept step with at least that much noise is taken, and the missing noise added; the noisiest, if none has it.
    """
    ratio = (1 - schedule.abar) / schedule.abar
    index = jnp.minimum(jnp.searchsorted(ratio, jnp.square(std)), schedule.num_steps - 1)
    missing = jnp.sqrt(jnp.maximum(ratio[index] - jnp.square(std), 0.0))
    x = jnp.sqrt(schedule.abar[index]) * (image + missing * jax.random.normal(key, image.shape))
    return Start(x, index)


def batched(denoise: Denoise) -> Denoise:
    """The denoiser of a batch of images (B, H, W, C), all at one timestep: for a leak of several images, guided together."""
    return jax.tree_util.Partial(_each, denoise)


def _each(denoise: Denoise, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    return jax.vmap(denoise, (0, None))(x_t, t)


class Step(Protocol):
    """One reverse step: x_t and index i to x_{t-1}."""

    def __call__(self, key: jax.Array, x: jax.Array, i: jax.Array) -> tuple[jax.Array, StepInfo]: ...


def _predict_x0(denoise: Denoise, schedule: Schedule, x: jax.Array, i: jax.Array, clip: bool) -> tuple[jax.Array, Any]:
    eps, v = denoise(x, schedule.t[i])
    x0 = schedule.predict_x0(x, eps, i)
    return (jnp.clip(x0, -1.0, 1.0) if clip else x0), v


def _posterior(schedule: Schedule, x0: jax.Array, v: jax.Array | None, x: jax.Array, i: jax.Array) -> Posterior:
    return Posterior(x0, schedule.posterior_mean(x0, x, i), schedule.posterior_std(i, v))


def posterior(denoise: Denoise, schedule: Schedule, x: jax.Array, i: jax.Array, clip: bool = True) -> Posterior:
    """The prior's own reverse step (DDPM, Eq. 7), unguided."""
    x0, v = _predict_x0(denoise, schedule, x, i, clip)
    return _posterior(schedule, x0, v, x, i)


def guided_posterior(
    denoise: Denoise,
    objective: Objective,
    schedule: Schedule,
    x: jax.Array,
    i: jax.Array,
    clip: bool = True,
    through_prior: bool = True,
    share: ShareOf | None = None,
    truth: jax.Array | None = None,
) -> tuple[Posterior, jax.Array, Share | None, StepInfo]:
    """The reverse step, the gradient G of objective(x0hat(x_t)) with respect to x_t, what `share` says of it, what to report.

    With `clip` G passes through the clip, so a saturated pixel gets no guidance (as in the public DPS code). Without
    `through_prior` G is the gradient with respect to x0hat, as MPGD takes it (He et al., ICLR 2024, arXiv 2311.16424, without
    its projection onto the data's manifold): the prior is not differentiated.
    """
    if through_prior:
        x0, pull, v = jax.vjp(lambda x: _predict_x0(denoise, schedule, x, i, clip), x, has_aux=True)
    else:
        x0, v = _predict_x0(denoise, schedule, x, i, clip)
    distance, grad = jax.value_and_grad(objective)(x0)
    told = None if share is None else share(x0, distance, grad)
    if through_prior:
        (grad,) = pull(grad)
    info = StepInfo(distance, jnp.linalg.norm(grad), x0_error(x0, truth), *(told or ()))
    return _posterior(schedule, x0, v, x, i), grad, told, info


def x0_error(x0: jax.Array, truth: jax.Array | None) -> jax.Array:
    """Mean squared error of x0hat, or nan without a truth."""
    return jnp.full((), jnp.nan, x0.dtype) if truth is None else jnp.square(x0 - truth).mean()


def reverse(
    key: jax.Array, step: Step, schedule: Schedule, shape: tuple[int, ...], start: Start | None = None
) -> tuple[jax.Array, StepInfo]:
    """Runs `step` from pure noise at the last index down to 0, as one `lax.scan`; from `start`, as one loop.

    Step i draws from fold_in(key, i), so what a step draws depends on neither the other steps nor the other trials. The trace
    has an entry for every kept step; those above a start are nan. From a start it cannot be differentiated in reverse.
    """

    def alone(key: jax.Array, state: tuple[jax.Array], i: jax.Array) -> tuple[tuple[jax.Array], StepInfo]:
        x, info = step(key, state[0], i)
        return (x,), info

    return _reverse(key, alone, schedule, shape, start)


def reverse_guided(
    key: jax.Array,
    step: Callable[[jax.Array, jax.Array, jax.Array, ShareOf | None], tuple[jax.Array, StepInfo]],
    schedule: Schedule,
    shape: tuple[int, ...],
    start: Start | None = None,
    signal: Signal | None = None,
    interval: int = 1,
) -> tuple[jax.Array, StepInfo]:
    """`reverse` of a step(key, x, i, share), guided where i is a multiple of `interval`, with the share of signal in it."""
    if signal is None:
        return reverse(key, lambda key, x, i: step(key, x, i, None), schedule, shape, start)
    first = (schedule.num_steps - 1 if start is None else start.step) // interval

    def remembering(key: jax.Array, state: Any, i: jax.Array) -> tuple[Any, StepInfo]:
        x, held = state
        x, info = step(key, x, i, functools.partial(signal, jax.random.fold_in(key, 1), first - i // interval, held))
        return (x, jnp.where(jnp.isnan(info.noise_pull), held, info.noise_pull)), info

    return _reverse(key, remembering, schedule, shape, start, jnp.nan)


def _reverse(
    key: jax.Array, step: Any, schedule: Schedule, shape: tuple[int, ...], start: Start | None, *memory: float
) -> tuple[jax.Array, StepInfo]:
    """Of a step whose state is (x, *memory)."""
    key_init, key_steps = jax.random.split(key)
    last = schedule.num_steps - 1
    x = jax.random.normal(key_init, shape) if start is None else start.x
    state: Any = (x, *(jnp.asarray(m, x.dtype) for m in memory))

    def run(state: Any, i: jax.Array) -> tuple[Any, StepInfo]:
        return step(jax.random.fold_in(key_steps, i), state, i)

    if start is None:
        (x, *_), trace = jax.lax.scan(run, state, jnp.arange(last, -1, -1))
        return x, trace

    def below(carry: tuple[jax.Array, Any, StepInfo]) -> tuple[jax.Array, Any, StepInfo]:
        i, state, trace = carry
        state, info = run(state, i)
        return i - 1, state, jax.tree.map(lambda all_steps, value: all_steps.at[last - i].set(value), trace, info)

    # A loop of as many steps as there are: under vmap as many as the earliest start of the trials needs.
    untold = StepInfo(*[jnp.full((schedule.num_steps,), jnp.nan, x.dtype)] * len(StepInfo._fields))
    _, (x, *_), trace = jax.lax.while_loop(lambda carry: carry[0] >= 0, below, (jnp.asarray(start.step), state, untold))
    return x, trace
