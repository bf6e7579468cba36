"""Approximate message passing: the posterior mean of an image in a noisy rank-one matrix, by a few calls of the denoiser.

A first dense layer's gradient under noise is [u; 1] delta^T + sigma N, u its input. In turns delta is estimated from the image
and the image from delta, both as posterior means, less what each owes to the noise that it is held against next (Montanari &
Venkataramanan, Ann. Statist. 2021, arXiv 1711.01682). The image's prior is a diffusion's. That of delta is what the network
computes at the image found so far: how far this lies from what is measured tells how far it errs [our choice]. At the end
the scale of the image, which the length of delta decides, is held against the whole gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdiff_jax.samplers.base import Denoise
from gdiff_jax.samplers.estimate import denoise_estimate, posterior_deviation
from gdiff_jax.schedule import Schedule
from gdiff_jax.trace import Objective, StepInfo, norm, x0_error

STEPS = 4  # the third changed nothing more, up to sigma 0.3 [measured]
FIRST_COSINE = 0.7  # of delta and what the network makes of the mean image [our choice]
JITTER = 1e-3  # of the image that the network is asked at: at mid-grey, where biases are 0, its ReLUs tell nothing
CHANCE = 3.0  # standard deviations that delta by the image and by the network must agree by, to be no chance [our choice]
LENGTH = 4.0  # variance of the network's || delta ||, in that of an entry of its delta: 2 to 4 [measured]
# The scale of the image at the end: levels and points of its grid, and by how much in log it may be off; what is less than so
# many relative errors of the image, or so small, is not believed [our choice, measured].
LEVELS, POINTS, WIDEST, DEVIATION = 3, 17, 1.1, 0.5
REJECTED, LEAST = 2.0, 0.02
POWER = 30  # iterations; nearer to where noise drowns the singular value they would be more


class RankOne(NamedTuple):
    """The gradient of a dense layer whose input is scale * image + shift, flat.

    Attributes:
      kernel, bias: (pixels, neurons) and (neurons,), with noise of standard deviation `sigma`, which may be 0.
      scale, shift: broadcast to (H, W, C).
    """

    kernel: jax.Array
    bias: jax.Array
    sigma: jax.Array | float
    scale: jax.Array | float = 1.0
    shift: jax.Array | float = 0.0


class _State(NamedTuple):
    image: jax.Array
    owed: jax.Array  # (neurons,), what kernel^T u is expected to hold of the noise that has gone into u
    estimate: jax.Array  # that `image` was expected of, and the deviation of its error
    std: jax.Array
    length: jax.Array  # of delta, by which the estimate was scaled, and that of the first step; nan before there are
    first: jax.Array


def _measured(leak: RankOne, u: jax.Array, owed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """delta by an input u, with white errors if u is a posterior mean, and the variance of its entries."""
    size = jnp.vdot(u, u) + 1
    return (leak.kernel.T @ u + leak.bias - owed) / size, jnp.square(leak.sigma) / size


def _delta(leak: RankOne, u: jax.Array, owed: jax.Array, network: jax.Array) -> tuple[jax.Array, ...]:
    """The posterior mean of delta as its direction and length, and the weight of u's noise in kernel @ direction.

    Where network = delta + e with || network || = || delta || and e white, E[delta | network] = c network, c their cosine.
    """
    network = jnp.where(norm(network) > 0, network, leak.bias)  # at an image that activates no neuron
    m, square = network.size, jnp.vdot(network, network)
    measured, noise = _measured(leak, u, owed)
    away = jnp.maximum(jnp.mean(jnp.square(measured - network)) - noise, 0.1 * noise)
    cosine = jnp.clip(1 - m * away / (2 * square), 0.0, 1.0)
    error = square * jnp.maximum(1 - jnp.square(cosine), 1e-12) / m  # of cosine * network
    weight = error / (error + noise)
    mean = weight * measured + (1 - weight) * cosine * network
    direction = mean / norm(mean)
    # Its length by the network, and by the bias, the one measurement that does not depend on the length of u.
    part = jnp.sqrt(jnp.clip(1 - m * (1 - weight) * error / square, 0.01, 1.0))
    by_bias, by_network = jnp.square(leak.sigma / part), LENGTH * error  # variances
    whole = (leak.bias @ direction / part * by_network + norm(network) * by_bias) / (by_network + by_bias)
    length = part * whole
    return direction, length, m * weight * noise / length


def first_delta(key: jax.Array, delta: Callable[[jax.Array], jax.Array], mean: jax.Array) -> jax.Array:
    """What the network makes of the mean image, as far as it is that of the image: FIRST_COSINE of it."""
    return FIRST_COSINE * delta(mean + JITTER * jax.random.rademacher(key, mean.shape, mean.dtype))


def leading_delta(leak: RankOne) -> jax.Array:
    """By the gradient alone: along its leading right singular vector, by power iterations, as long as the bias says there."""

    def again(_: int, v: jax.Array) -> jax.Array:
        v = leak.kernel.T @ (leak.kernel @ v) + leak.bias * (leak.bias @ v)
        return v / jnp.maximum(norm(v), 1e-30)

    line = jax.lax.fori_loop(0, POWER, again, leak.bias / jnp.maximum(norm(leak.bias), 1e-30))
    return (leak.bias @ line) * line


def rank_one_mean(
    key: jax.Array,
    denoise: Denoise,
    schedule: Schedule,
    leak: RankOne,
    delta: Callable[[jax.Array], jax.Array],
    objective: Objective,
    mean: jax.Array,
    *,
    begin: jax.Array | None = None,
    rescaled: Objective | None = None,
    aside: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    clip: bool = True,
    steps: int = STEPS,
    truth: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, StepInfo]:
    """The image to be expected given the gradient of a dense layer that sees it, and the network above.

    Args:
      key: typed PRNG key of the trial, of probes for the trace (Hutchinson) and the diagonal of the denoiser's derivative.
      denoise: `eps, v = denoise(x_t, t)`, a pytree (see `samplers.base`).
      schedule: kept timesteps of the prior.
      leak: the layer's gradient.
      delta: delta (neurons,) of an image (H, W, C) by the network, such as the gradient of the layer's bias.
      objective: distance of an image to the whole leak; reported, and asked for the scale of the image.
      mean: (H, W, C), of the images one may expect.
      begin: delta (neurons,) to begin with, such as `leading_delta`; by itself what the network makes of `mean`.
      rescaled: the same as `objective`, with the gradient times the factor that fits best. Where an image as it is explains
        the leak better by that than at another scale, its scale is not changed.
      aside: for a leak that is known but for a factor, as a clipped one: distance(image, length) of its arrays beside the
        kernel to an image's, times the factor that gives delta that length. They then tell the scale of the image in each
        step, among lengths near the first step's, which is right to a third [measured], and `rescaled` does not count.
      clip: clip to [-1, 1].
      steps: of the iteration; each is a call of the denoiser and its derivative.
      truth: (H, W, C); only fills `x0_error` of the trace.

    Returns:
      image (H, W, C), by how much each of its pixels is expected to err (`posterior_deviation`), and a trace of `steps`, whose
      guidance_norm is the standard deviation that was given to the denoiser. Of a layer whose gradient is zero, and where delta
      by the image and by the network agree by chance alone, as they do where noise is all or the label is wrong, the image is
      `mean` and its deviation nan. Of a gradient that is not finite the image is not finite either. Where channels differ in
      scale the error of the one with the least is taken for that of all.
    """
    scale, shift = (jnp.broadcast_to(jnp.asarray(a), mean.shape) for a in (leak.scale, leak.shift))

    def times(s: jax.Array, image: jax.Array) -> jax.Array:
        """The image whose layer's input is s times as large."""
        return (s * (scale * image + shift) - shift) / scale

    def scale_aside(state: _State) -> jax.Array:
        """By how much the input must be larger, and delta's length smaller, by the arrays beside the kernel."""
        assert aside is not None
        costs = lambda s: jnp.square(aside(times(s, state.image), state.length / s))
        return _scale_of(costs, leak.sigma, jnp.zeros_like(state.std), jnp.log(state.length / state.first))

    if begin is None:
        begin = first_delta(jax.random.fold_in(key, steps + 1), delta, mean)
    begin = jnp.where(norm(begin) > 0, begin, leak.bias)  # of a mean image that activates no neuron

    def step(state: _State, i: jax.Array) -> tuple[_State, StepInfo]:
        if aside is not None:
            s = jnp.where(i == 0, 1.0, scale_aside(state))
            state = state._replace(image=times(s, state.image), owed=s * state.owed, length=state.length / s)
        u = (scale * state.image + shift).ravel()
        probe = jax.random.rademacher(jax.random.fold_in(key, i), mean.shape, mean.dtype)
        network = delta(state.image + JITTER * probe)
        if aside is not None:
            network = state.length / norm(network) * network
        later = _delta(leak, u, state.owed, network)
        # At first nothing is measured, as u is the mean image.
        direction, length, overlap = (
            jnp.where(i == 0, a, b) for a, b in zip((begin / norm(begin), norm(begin), jnp.zeros(())), later, strict=True)
        )
        estimate = ((leak.kernel @ direction - overlap * u) / length).reshape(mean.shape)
        estimate, std = (estimate - shift) / scale, leak.sigma / length / jnp.abs(scale).min()
        lost = (norm(leak.kernel) == 0) | (length <= 0)
        estimate, std = jnp.where(lost, mean, estimate), jnp.where(lost, jnp.inf, std)
        denoised = lambda x: denoise_estimate(denoise, schedule, x, std, mean, clip=clip)
        x, pull = jax.vjp(denoised, estimate)
        divergence = jnp.where(lost, 0.0, jnp.vdot(probe, pull(probe)[0]))
        owed = jnp.where(lost, 0.0, jnp.square(leak.sigma) * divergence / length * direction)
        state = _State(x, owed, estimate, std, length, jnp.where(i == 0, length, state.first))
        return state, StepInfo(objective(x), std, x0_error(x, truth))

    start = _State(mean, jnp.zeros_like(leak.bias), mean, *jnp.asarray([jnp.inf, jnp.nan, jnp.nan], mean.dtype))
    state, trace = jax.lax.scan(step, start, jnp.arange(steps))
    deviation = posterior_deviation(jax.random.fold_in(key, steps), denoise, schedule, state.estimate, state.std)

    def cost(s: jax.Array) -> jax.Array:
        """Squared distance to the leak, less what it owes to the noise that has gone into the image."""
        image = times(s, state.image)
        return jnp.square(objective(image)) + 2 * s * jnp.vdot(state.owed, delta(image))

    if aside is not None:
        factor = scale_aside(state)
    else:
        factor = _scale_of(cost, leak.sigma, norm(deviation) / norm(state.image + shift / scale))
        if rescaled is not None:
            factor = jnp.where(jnp.square(rescaled(state.image)) < cost(factor), 1.0, factor)
    other = denoise_estimate(denoise, schedule, times(factor, state.estimate), factor * state.std, mean, clip=clip)
    image = jnp.where(factor == 1, state.image, other)
    network = delta(image)
    measured, noise = _measured(leak, (scale * image + shift).ravel(), factor * state.owed)
    chance = jnp.vdot(measured, network) < CHANCE * jnp.sqrt(noise) * norm(network)
    return jnp.where(chance, mean, image), jnp.where(chance, jnp.nan, jnp.minimum(factor * deviation, 1.0)), trace


def _scale_of(
    cost: Callable[[jax.Array], jax.Array], sigma: jax.Array | float, error: jax.Array, prior: jax.Array | float = 0.0
) -> jax.Array:
    """The s of least cost, of a likelihood exp(-cost(s) / (2 sigma^2)) and a broad prior; 1 where that may be chance.

    The length of delta decides the image's. By a network that fits an image well it is the network's confidence, which errs by
    more than its direction says. The whole gradient tells, on a grid that is drawn closer LEVELS times, but as if the image had
    no error but its scale: what is nearer to 1 than REJECTED times its relative error, or LEAST, is not believed. `prior` is
    the log of what is expected.
    """
    dtype = error.dtype
    sigma = jnp.asarray(sigma, dtype)
    variance = jnp.square(jnp.where(sigma > 0, sigma, 1.0))

    def level(at: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        centre, half = at
        logs = centre + half * jnp.linspace(-1, 1, POINTS, dtype=dtype)
        costs = jax.lax.map(cost, jnp.exp(logs))
        costs = jnp.where(jnp.isfinite(costs), costs, jnp.inf)
        weights = jax.nn.softmax(-costs / (2 * variance) - jnp.square(logs - prior) / (2 * DEVIATION**2))
        found = jnp.vdot(weights, logs)
        spread = jnp.sqrt(jnp.vdot(weights, jnp.square(logs - found)))
        return (found, jnp.clip(3 * spread, 2 * half / POINTS, half)), None

    start = jnp.zeros((), dtype), jnp.asarray(WIDEST, dtype)
    (found, _), _ = jax.lax.scan(level, start, None, length=LEVELS)
    return jnp.where((sigma > 0) & (jnp.abs(found) > jnp.maximum(REJECTED * error, LEAST)), jnp.exp(found), 1.0)
