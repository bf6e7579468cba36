"""The attack on a ReLU network whose gradient carries noise: its equations with masks that are probabilities, and the prior."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gdiff_jax import samplers
from gdiff_jax.algebra.masks import ReluChain, equations_at, relu_chain, residual_of
from gdiff_jax.matching import GradientMatching, at_full_precision, l2, victim_gradient
from gdiff_jax.problem import Problem
from gdiff_jax.samplers.dpir import Residual
from gdiff_jax.weighing import tells_little

# Level below which there is no step where the leak tells little: the image errs by far more there [measured: 0.1 dB and less].
COARSE = 0.06
TOLERANCE = 0.2  # of a step's conjugate gradients: as good as 0.1, in a sixth less time [measured]
# Level below which it falls by RATIO in any case: a slower one gains 0.2 dB at most, for a third of the time [measured].
FINE = 0.05
FIRST, RATIO = 0.3, 0.88  # of `samplers.plug_and_play`, for an image that a search found [our choice, measured]


def refine(
    problem: Problem,
    image: jax.Array,
    first: jax.Array | float = FIRST,
    ratio: jax.Array | float = RATIO,
) -> jax.Array:
    """The image to be expected of a ReLU network's equations (`algebra.masks`), near one that a search found.

    Args:
      problem: of one image, whose network is a chain of affine layers and ReLUs (`chain_of` says whether it is), under noise
        that the attacker knows; of the mechanism clipping is taken into account and no compression.
      image: (H, W, C), the first estimate.
      first: about how far it errs in each pixel.
      ratio: of a step's level to the one before, down to FINE; masks that are far off need slower ones.

    Returns:
      (H, W, C); by `samplers.plug_and_play`.

    Raises:
      ValueError: of another network.
    """
    p, chain = problem, chain_of(problem)
    if chain is None:
        raise ValueError("this problem's network is no chain of affine layers and ReLUs of one image; take another method")
    match, noise, rms = p.match, p.noise(), p.leak_rms()
    # An estimate that errs by a level errs in what it makes of the masks, by about that share of the gradient: under noise
    # equations that are taken for better leave a LeNet where it is. Without, they settle more masks [our choice, measured].
    doubt = jnp.where(p.sigma > 0, rms, 0.0)
    measured = lambda x, level: _measured(chain, match, jnp.maximum(noise, level * doubt), x, level)
    mean = jnp.broadcast_to(p.expected_image, p.shape)
    last = jnp.where(tells_little(p), COARSE, samplers.last_level(noise, rms))
    fall = lambda level: jnp.where(level > FINE, ratio, jnp.minimum(ratio, RATIO))
    options = dict[str, Any](first=first, last=last, ratio=fall, tolerance=TOLERANCE, clip=p.clip)
    return samplers.plug_and_play(image, p.denoise, p.schedule, measured, mean, **options)


def chain_of(problem: Problem) -> ReluChain | None:
    """The ReLU chain behind a leak of one gradient of one image; None where it is no such leak or no such network."""
    match = problem.match
    if len(problem.shape) != 3 or match.client is not None:
        return None
    return relu_chain(match.loss, match.params, problem.shape, match.label)


@at_full_precision
def _measured(chain: ReluChain, match: GradientMatching, noise: jax.Array, x: jax.Array, level: jax.Array) -> Residual:
    """The equations at an estimate, of the gradient before it was clipped, as far as the estimate tells by how much."""
    share = jnp.ones(())
    if match.mechanism is not None:
        gradient = victim_gradient(match.loss, match.params, x, match.label)
        zero = jax.tree.map(jnp.zeros_like, gradient)
        length = l2(gradient, zero)
        share = l2(match.mechanism.simulate(gradient, match.leak), zero) / jnp.where(length > 0, length, 1.0)
        share = jnp.where(share > 0, share, 1.0)
    leak = [g / share for g in jax.tree.leaves(match.leak)]
    leaves = jax.tree.leaves((match.params, match.label))
    equations = equations_at(chain, leaves, leak, noise / share, x, level)
    return at_full_precision(residual_of(chain, leaves, leak, equations))
