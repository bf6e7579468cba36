"""Plug-and-play restoration from a first estimate: the denoiser and Gauss-Newton steps in turns, at a falling noise level
(DPIR, Zhang et al., IEEE TPAMI 2021, arXiv 2008.13751, with a residual that is not linear).

The estimate's error is taken for white noise of a level; the denoiser says what image is to be expected then, and a step of
Gauss-Newton goes from there to what was measured. No noise is added, so it ends near a mean and not in a sample. It needs a
first estimate, such as a guided sampler's: from mid-grey or noise the steps end in local minima.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gdiff_jax.samplers.base import Denoise
from gdiff_jax.samplers.estimate import denoise_estimate
from gdiff_jax.schedule import Schedule

Residual = Callable[[jax.Array], list[jax.Array]]
# Level below which there is no step: it falls with the noise, as the error of what is found, between these [our choice,
# measured].
LAST, LEAST = 0.015, 5e-4  # in images of [-1, 1] 42 dB, and 72
PER_NOISE = 0.3
# Conjugate gradients a step, at most, and the share of its right side that they leave. Under little noise a step is
# ill-conditioned: of a sigmoid LeNet 40 of them find 31 dB at sigma 1e-4, 200 of them 51. A smaller share costs time alone
# [measured].
ITERATIONS, TOLERANCE = 200, 0.1
SETTLING = 0.1  # level from which on there is no momentum: with it noise would be fitted [our choice, measured]
LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.0)  # of a Gauss-Newton step, of which the best is taken


def gauss_newton(
    residual: Residual,
    x: jax.Array,
    x0: jax.Array,
    variance: jax.Array,
    iterations: int,
    tolerance: float = TOLERANCE,
) -> jax.Array:
    """One step from x towards the least || residual ||^2 + || x - x0 ||^2 / variance, by conjugate gradients.

    Args:
      residual: a list of arrays, each entry by its deviation.
      x: (H, W, C).
      x0: where the prior's Gaussian is centred.
      variance: of it, in each pixel, scalar.
      iterations: of the conjugate gradients at most, each one Jacobian-vector product and one of its transpose.
      tolerance: norm of what they leave of their right side, relative, from which on they end.
    """

    def cost(x: jax.Array) -> jax.Array:
        return jnp.stack([jnp.vdot(r, r) for r in [*residual(x), (x - x0) / jnp.sqrt(variance)]]).sum()

    r, along = jax.linearize(residual, x)
    back = jax.linear_transpose(along, x)
    downhill = -back(r)[0] - (x - x0) / variance
    curvature = lambda p: back(along(p))[0] + p / variance
    step, _ = jax.scipy.sparse.linalg.cg(curvature, downhill, tol=tolerance, maxiter=iterations)
    lengths = jnp.asarray(LENGTHS)
    costs = jax.lax.map(lambda length: cost(x + length * step), lengths)
    best = jnp.argmin(jnp.where(jnp.isfinite(costs), costs, jnp.inf))
    return jnp.where(jnp.isfinite(costs[best]), x + lengths[best] * step, x)


def last_level(noise: jax.Array, rms: jax.Array) -> jax.Array:
    """Of `plug_and_play`, for what was measured with noise of that standard deviation and is of that root mean square."""
    return jnp.clip(PER_NOISE * noise / jnp.where(rms > 0, rms, 1.0), LEAST, LAST)


def _sizes(residual: Residual, x: jax.Array) -> jax.Array:
    """Of each block its rms, and 1 where that is less: by how much its deviations are too small."""
    return jnp.stack([jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(r))), 1.0) for r in residual(x)])


def _tempered(residual: Residual, sizes: jax.Array) -> Residual:
    return lambda x: [r / size for r, size in zip(residual(x), sizes, strict=True)]


def plug_and_play(
    image: jax.Array,
    denoise: Denoise,
    schedule: Schedule,
    measured: Callable[[jax.Array, jax.Array], Residual],
    mean: jax.Array,
    *,
    first: jax.Array | float,
    last: jax.Array | float = LAST,
    ratio: jax.Array | float | Callable[[jax.Array], jax.Array],
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    momentum: jax.Array | float = 0.0,
    clip: bool = True,
) -> jax.Array:
    """The image to be expected of what was measured, near a first estimate.

    Args:
      image: (H, W, C), the first estimate.
      denoise: `eps, v = denoise(x_t, t)`, a pytree (see `samplers.base`).
      schedule: kept timesteps of the prior.
      measured: `residual = measured(x, level)` at an estimate and the deviation of its error in each pixel; residual(x) is a
        list of arrays, each entry by its deviation. It is asked anew in each step.
      mean: (H, W, C) of the images that one may expect.
      first: level of the first step, about the first estimate's error.
      last: level below which no step is taken, scalar; above `first` the first estimate is the answer.
      ratio: of a level to the one before, in (0, 1), or what says it by that; in each the denoiser is called once.
      iterations: conjugate gradients in each of them, at most.
      tolerance: of these, see `gauss_newton`.
      momentum: share of the last step that is added to the estimate before the next, in [0, 1), while the level is above
        SETTLING; none after a step that leads back (O'Donoghue & Candes, Found. Comput. Math. 2015, arXiv 1204.3982). It helps
        where steps are many, and short since they follow a valley that bends; else it costs some of the image [measured].
      clip: clip what the denoiser says to [-1, 1].

    Returns:
      (H, W, C), about [-1, 1]; where the residual is nowhere finite, the first estimate. It has no
      derivative in reverse.

    Raises:
      ValueError: where `ratio`, if it is not traced, does not lie in (0, 1).
    """
    if isinstance(ratio, float | int) and not 0 < ratio < 1:
        raise ValueError(f"ratio {ratio} must lie in (0, 1): levels fall")
    fall = ratio if callable(ratio) else lambda level: ratio
    start, last = jnp.asarray(first, image.dtype), jnp.maximum(last, 1e-6)
    State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

    def step(state: State) -> State:
        x, before, sizes, level = state
        beyond = x + jnp.where(level > SETTLING, momentum, 0.0) * (x - before)
        expected = denoise_estimate(denoise, schedule, beyond, level, mean, clip=clip)
        residual = measured(beyond, level)
        new = gauss_newton(_tempered(residual, sizes), beyond, expected, jnp.square(level), iterations, tolerance)
        after = _sizes(residual, new)
        lost = ~jnp.isfinite(after).all()  # beyond was too far: the next begins at x, without momentum
        onward = (jnp.vdot(new - beyond, new - x) > 0) & ~lost
        new = jnp.where(lost, x, new)
        return new, jnp.where(onward, x, new), jnp.where(lost, sizes, after), level * fall(level)

    # As many steps as the noise asks for: under vmap as many as the trial with the least noise needs.
    going = lambda state: state[3] > last * (1 - 1e-3)
    return jax.lax.while_loop(going, step, (image, image, _sizes(measured(image, start), image), start))[0]
