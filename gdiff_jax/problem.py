"""What one attacker has of one leak, and what every method that attacks it has in common: a call, and why it ended."""

from __future__ import annotations

import enum
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from gdiff_jax.first_dense import FirstDense
from gdiff_jax.matching import GradientMatching
from gdiff_jax.pytrees import pytree, static
from gdiff_jax.samplers.base import Denoise
from gdiff_jax.schedule import Schedule

SPREAD = 0.5  # deviation of an image's pixels from the mean image's, on [-1, 1]: about CIFAR-10's 12 dB
ROUNDING = 1e-6  # deviation of a leak without noise, relative to the rms of its gradient


class Outcome(enum.IntEnum):
    """Why a method ended."""

    FINISHED = 0
    NOT_FINITE = 1  # the reconstruction holds nan or infinity
    LEAK_NOT_FINITE = 2  # so does the leak: there is nothing to attack
    DEAD_LAYER = 3  # no neuron of the layer that was to be read was active, or its noise was all


class Info(NamedTuple):
    """What a method reports beside the image."""

    trace: Any  # the method's own, an entry a step: a `StepInfo` or one with more fields
    outcome: jax.Array  # an `Outcome`, scalar
    label_logits: jax.Array | None = None  # (classes,) or (B, classes), of a method that looks for the labels too
    deviation: jax.Array | None = None  # (H, W, C), by which the truth is expected to differ in each pixel; nan: not known


@pytree
class Problem:
    """One leak, and what the attacker has to attack it with.

    Attributes:
      denoise: the prior, `eps, v = denoise(x_t, t)`; of a leak of several images `samplers.batched` of it.
      schedule: kept timesteps of the prior.
      match: distance of a candidate's gradient to the leak, through what is known of labels and mechanism.
      expected_image: (H, W, C), mean of images like the private ones.
      sigma: standard deviation of the noise that the mechanism adds, scalar.
      shape: (H, W, C), or (B, H, W, C) for a leak of B images.
      clip: clip x0hat to [-1, 1], as the prior was trained.
      first_dense: where the leak holds a first layer that is dense and sees the whole image; None where there is none.
      num_classes: of the labels.
      truth: (H, W, C), fills `x0_error` of the trace; no method uses it.
    """

    denoise: Denoise
    schedule: Schedule
    match: GradientMatching
    expected_image: jax.Array
    sigma: jax.Array | float = 0.0
    shape: tuple[int, ...] = static(default=(32, 32, 3))
    clip: bool = static(default=True)
    first_dense: FirstDense | None = static(default=None)
    num_classes: int = static(default=10)
    truth: jax.Array | None = None

    def noise(self) -> jax.Array:
        """Standard deviation of a coordinate of the leak: the mechanism's, and that of rounding at least."""
        rms = self.leak_rms()
        return jnp.maximum(jnp.asarray(self.sigma, rms.dtype), ROUNDING * rms)

    def leak_rms(self) -> jax.Array:
        """Root mean square of the leak's coordinates."""
        squares = jnp.stack([jnp.vdot(g, g) for g in jax.tree.leaves(self.match.leak)])
        return jnp.sqrt(squares.sum() / self.coordinates())

    def coordinates(self) -> int:
        """How many numbers the leak holds."""
        return sum(g.size for g in jax.tree.leaves(self.match.leak))

    def outcome(self, image: jax.Array, dead_layer: jax.Array | bool = False) -> jax.Array:
        """Of a reconstruction of this problem."""
        finite = lambda tree: jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
        why = jnp.where(dead_layer, int(Outcome.DEAD_LAYER), int(Outcome.NOT_FINITE))
        why = jnp.where(finite(self.match.leak), why, int(Outcome.LEAK_NOT_FINITE))
        return jnp.where(finite(image), int(Outcome.FINISHED), why)


class Method:
    """What all methods have beside their options and their call.

    Attributes:
      name: in flags, records and tables.
      needs_first_dense: reads a first layer that is dense, of a leak of one image.
      needs_noise: takes the distribution of the noise, which the attacker must know.
      calibrated: draws from the whole mechanism, and compares one gradient by l2.
    """

    name: ClassVar[str]
    needs_first_dense: ClassVar[bool] = False
    needs_noise: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False

    def fits(self, first_dense: FirstDense | None, images: int) -> bool:
        """Whether it can be run on a leak of so many images of a victim with such a first layer."""
        return not self.needs_first_dense or (first_dense is not None and images == 1)

    def describe(self) -> str:
        """The method with its options, in words."""
        raise NotImplementedError

    def __call__(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, Info]:
        """One reconstruction, of the problem's shape, about [-1, 1]; `key` is the trial's typed PRNG key."""
        raise NotImplementedError
