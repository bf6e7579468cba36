"""How what a search found is refined: by the structure of the network, where there is one that knows it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdiff_jax import expected_masks, gauss_newton
from gdiff_jax.mechanisms import Clip, GaussianNoise, LaplaceNoise, Mechanism, UniformNoise, stages_of
from gdiff_jax.parallel import one_by_one_on_cpu
from gdiff_jax.problem import Problem
from gdiff_jax.weighing import unexplained, weighed

# About how far the mean of images errs in each pixel, and more; and by which ratio the level falls from there: with 0.88 in
# place of 0.95 a trained LeNet loses 0.5 to 2 dB, a trained CNN 2 dB at sigma 0.1, in 0.4 of the time [measured].
AFAR, SLOWLY = 1.0, 0.95
# Where an image has a squared distance to the leak that is larger than noise's by that share it is refined again, so many
# times: of a LeNet 0.6 dB in all at sigma 0.01, 1.6 at 0.001; below 1.2 times noise's it costs 0.4 dB [measured].
UNSETTLED, AGAIN = 0.25, 3
# Of a smooth network's image that was refined beside the one that was searched for: what a search gains by fitting noise, as a
# share of the pixels, and how much more or less that may be [our choice, measured: 0.1 to 0.16 and 30 to 200 about the same].
SEARCHED, UNSURE = 1 / 8, 100.0
# Squared distance, in units of the noise's variance, that a refined image gains on the mean of images by fitting noise: at
# sigma 1 an untrained LeNet's is 0.4 dB better for it, a CNN's as good, and by 50 0.3 worse [measured].
REFINED = 10.0


class Refinement(NamedTuple):
    """How what was found is refined, and whether it is of a smooth network or of a chain of ReLUs."""

    words: str
    smooth: bool


def refined(problem: Problem, refinement: Refinement, found: jax.Array) -> jax.Array:
    """What a search found, refined; of a ReLU network the mean of images too, since its equations need not be near.

    Which of the two ends is right a search cannot know beforehand: of an untrained network what it found is the better
    start, of one that fits its images well the mean is [measured]. A smooth network's steps end in local minima under much
    noise, where the search does not: what it found counts as well, and the mean of images, which has fitted no noise.
    """
    mean = jnp.broadcast_to(problem.expected_image, problem.shape).astype(found.dtype)
    if refinement.smooth:
        # Named arguments: a default would be traced as one more.
        near = one_by_one_on_cpu(lambda problem, found: gauss_newton.refine(problem, found))(problem, found)
        image = weighed(problem, near, found, found.size * SEARCHED, UNSURE)
    else:
        image = _of_relus(problem, found, mean)
    return weighed(problem, image, mean, -REFINED)


def _of_relus(problem: Problem, found: jax.Array, mean: jax.Array) -> jax.Array:
    """From both, weighed; then from there, at the level by which the ends differ, where that does not explain the leak."""

    def run(problem: Problem, starts: jax.Array) -> jax.Array:
        def turn(state: tuple[jax.Array, jax.Array], k: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            ends, image = state
            differ = jnp.sqrt(jnp.mean(jnp.square(ends[0] - ends[1])))
            unsettled = unexplained(problem, image) > UNSETTLED
            level = jnp.where(unsettled, jnp.minimum(differ, expected_masks.FIRST), 0.0)  # 0: no step is taken
            first = jnp.where(k == 0, expected_masks.FIRST, jnp.where(k == 1, AFAR, level))
            ratio = jnp.where(k == 1, SLOWLY, expected_masks.RATIO)
            image = expected_masks.refine(problem, jnp.stack([*starts, image])[k], first, ratio)
            ends = ends.at[k].set(image, mode="drop")
            return (ends, jnp.where(k < len(starts), weighed(problem, *ends), image)), None

        turns = jnp.asarray([0, 1, *[2] * AGAIN])
        return jax.lax.scan(turn, (starts, starts[0]), turns)[0][1]

    # One program for all: of two it takes half the time to compile.
    return one_by_one_on_cpu(run)(problem, jnp.stack([found, mean]))


def refinement_of(problem: Problem) -> Refinement | None:
    """By the structure of the network, if there is one that knows it."""
    if not known_noise(problem):
        return None
    if expected_masks.chain_of(problem) is not None:
        return Refinement("expectation over the masks of its ReLUs", smooth=False)
    return Refinement("Gauss-Newton steps", smooth=True) if gauss_newton.smooth(problem) else None


def known_noise(problem: Problem) -> bool:
    """Whether the leak is of one image, and noise and clipping, which the attacker knows, are all that was done to it."""
    mechanism = problem.match.mechanism
    return len(problem.shape) == 3 and mechanism is not None and not compressed(mechanism)


def compressed(mechanism: Mechanism) -> str:
    """The first stage of a mechanism that changes more of a gradient than its length, beside noise; empty where none does."""
    known = (Clip, GaussianNoise, LaplaceNoise, UniformNoise)
    return next((type(stage).__name__ for stage in stages_of(mechanism) if not isinstance(stage, known)), "")
