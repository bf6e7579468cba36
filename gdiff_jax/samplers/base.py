"""What the samplers share: the posterior of one reverse step, its guidance, and the loop.

A *denoiser* is a callable `out, v = denoise(x_t, t)` on one image and a timestep: `out` is eps unless the schedule's
`parametrisation` says otherwise, v is the learned variance or None. `predict` makes x0hat of it, and nothing else here knows
what the network predicts. An *objective* is a callable `distance = objective(x0)` to a scalar. Both must be pytrees (a module,
a registered dataclass, `jax.tree_util.Partial`) if they are to pass through jit as arguments. Images are (H, W, C) in [-1, 1];
a batch of trials is a `jax.vmap` over keys and objectives. Nothing here knows of victims or gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from gdiff_jax.schedule import Schedule
from gdiff_jax.trace import Objective, StepInfo, norm, x0_error

Denoise = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]
Report = TypeVar("Report")  # what a step reports, a pytree: a `StepInfo`, or what else a method has to say


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
        self,
        key: jax.Array,
        steps_before: jax.Array,
        last_noise_pull: jax.Array,
        x0: jax.Array,
        distance: jax.Array,
        gradient: jax.Array,
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
    noise = jnp.square(schedule.noise)
    index = jnp.minimum(jnp.searchsorted(noise / schedule.abar, jnp.square(std)), schedule.num_steps - 1)
    # Of x_t, not of the image: finite where abar is 0.
    missing = jnp.sqrt(jnp.maximum(noise[index] - schedule.abar[index] * jnp.square(std), 0.0))
    x = jnp.sqrt(schedule.abar[index]) * image + missing * jax.random.normal(key, image.shape)
    return Start(x, index)


def batched(denoise: Denoise) -> Denoise:
    """The denoiser of a batch of images (B, H, W, C), all at one timestep: for a leak of several images, guided together."""
    return jax.tree_util.Partial(_each, denoise)


def _each(denoise: Denoise, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    return jax.vmap(denoise, (0, None))(x_t, t)


def predict(
    denoise: Denoise, schedule: Schedule, x_t: jax.Array, signal: jax.Array, noise: jax.Array, t: jax.Array
) -> tuple[jax.Array, Any]:
    """x0hat of one x_t = signal x0 + noise n, not clipped, and v; t is what the network is told of the level."""
    p = schedule.parametrisation
    out, v = denoise(p.shown(x_t, signal, noise), t)
    return p.x0(x_t, out, signal, noise), v


def predict_kept(denoise: Denoise, schedule: Schedule, x: jax.Array, i: jax.Array, clip: bool) -> tuple[jax.Array, Any]:
    """x0hat at the kept step i, clipped to [-1, 1] if so asked, and v."""
    x0, v = predict(denoise, schedule, x, jnp.sqrt(schedule.abar[i]), schedule.noise[i], schedule.t[i])
    return (jnp.clip(x0, -1.0, 1.0) if clip else x0), v


def _posterior(schedule: Schedule, x0: jax.Array, v: jax.Array | None, x: jax.Array, i: jax.Array) -> Posterior:
    return Posterior(x0, schedule.posterior_mean(x0, x, i), schedule.posterior_std(i, v))


def posterior(denoise: Denoise, schedule: Schedule, x: jax.Array, i: jax.Array, clip: bool = True) -> Posterior:
    """The prior's own reverse step (DDPM, Eq. 7), unguided."""
    x0, v = predict_kept(denoise, schedule, x, i, clip)
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
        x0, pull, v = jax.vjp(lambda x: predict_kept(denoise, schedule, x, i, clip), x, has_aux=True)
    else:
        x0, v = predict_kept(denoise, schedule, x, i, clip)
    distance, grad = jax.value_and_grad(objective)(x0)
    worth = None if share is None else share(x0, distance, grad)
    if through_prior:
        (grad,) = pull(grad)
    info = StepInfo(distance, norm(grad), x0_error(x0, truth))
    return _posterior(schedule, x0, v, x, i), grad, worth, info


def reverse(
    key: jax.Array,
    step: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Report]],
    schedule: Schedule,
    shape: tuple[int, ...],
    start: Start | None = None,
) -> tuple[jax.Array, Report]:
    """Runs `step` from pure noise at the last index down to 0, as one `lax.scan`; from `start`, as one loop.

    A step(key, x, i) makes x_{t-1} of x_t and its index i, and a report. Step i draws from fold_in(key, i), so what a step
    draws depends on neither the other steps nor the other trials. The trace has a report for every kept step; those above a
    start are nan. From a start it cannot be differentiated in reverse.
    """

    def alone(key: jax.Array, state: tuple[jax.Array], i: jax.Array) -> tuple[tuple[jax.Array], Report]:
        x, info = step(key, state[0], i)
        return (x,), info

    return reverse_with_memory(key, alone, schedule, shape, start)


def reverse_with_memory(
    key: jax.Array,
    step: Callable[[jax.Array, Any, jax.Array], tuple[Any, Report]],
    schedule: Schedule,
    shape: tuple[int, ...],
    start: Start | None,
    *memory: float,
) -> tuple[jax.Array, Report]:
    """`reverse` of a step(key, (x, *memory), i), which makes the state of the step below, and a report."""
    key_init, key_steps = jax.random.split(key)
    last = schedule.num_steps - 1
    x = jax.random.normal(key_init, shape) if start is None else start.x
    state: Any = (x, *(jnp.asarray(m, x.dtype) for m in memory))

    def run(state: Any, i: jax.Array) -> tuple[Any, Report]:
        return step(jax.random.fold_in(key_steps, i), state, i)

    if start is None:
        (x, *_), trace = jax.lax.scan(run, state, jnp.arange(last, -1, -1))
        return x, trace

    def below(carry: tuple[jax.Array, Any, Report]) -> tuple[jax.Array, Any, Report]:
        i, state, trace = carry
        state, info = run(state, i)
        return i - 1, state, jax.tree.map(lambda all_steps, value: all_steps.at[last - i].set(value), trace, info)

    # A loop of as many steps as there are: under vmap as many as the earliest start of the trials needs.
    _, report = jax.eval_shape(run, state, jnp.asarray(last))
    not_run = jax.tree.map(lambda leaf: jnp.full((schedule.num_steps, *leaf.shape), jnp.nan, leaf.dtype), report)
    _, (x, *_), trace = jax.lax.while_loop(lambda carry: carry[0] >= 0, below, (jnp.asarray(start.step), state, not_run))
    return x, trace
