"""A sweep with everything loaded, as the engine runs it; `inputs.load` makes it of names, `gdiff_jax.audit` of objects."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

from gdiff_jax.federated import LocalSGD
from gdiff_jax.matching import Distance, l2
from gdiff_jax.mechanisms import Mechanism
from gdiff_jax.methods import Method
from gdiff_jax.priors import Prior
from gdiff_jax.schedule import Schedule
from gdiff_jax.sweeping.attackers import Attacker
from gdiff_jax.sweeping.config import Client
from gdiff_jax.victims import Victim
from gdiff_jax.victims.own import OwnVictim

if TYPE_CHECKING:
    from gdiff_jax.theory.privacy import Guarantee

PRIOR_ONLY = "prior-only"


class NoisyMechanism(Protocol):
    """A mechanism but for its noise's standard deviation: `mechanisms.text.Spec`, or one of the user's own."""

    @property
    def text(self) -> str:
        """Its name in records."""

    @property
    def clip_norm(self) -> float | None:
        """C of the Gaussian mechanism, whose sigma follows from epsilon; else None."""

    @property
    def only_noise(self) -> bool:
        """Whether it is noise of mean zero, or nothing at all."""

    @property
    def hides_mask(self) -> bool:
        """Whether it prunes by a mask that cannot be read off the leak."""

    def for_image(self, key: jax.Array, sigma: Any, victim: Any, params: Any, x: jax.Array) -> Mechanism:
        """The mechanism of a client that holds the images x."""

    def guarantee(self, sigma: float, size: int, delta: float) -> Guarantee:
        """What one release of a gradient of `size` coordinates guarantees."""


class VictimState(NamedTuple):
    """A victim in one of its training states."""

    name: str
    training_steps: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that decides the results of a sweep, loaded and checked; nothing has been compiled or written.

    Attributes:
      prior: with the clipping that is asked for.
      schedule: the kept steps.
      images: (N, H, W, C) in [-1, 1], private; nan where they are not known.
      labels: (N, ...), whatever the losses take.
      names: of the images, for records.
      victims: by name.
      params: by name and training steps.
      mechanisms: by their text.
      sigmas: noise levels of each mechanism, ascending.
      methods: by name, options bound.
      attacker: what is known.
      client: what is released.
      proxy: (K, H, W, C) images that every attacker has: the prior's mean image, or samples of it.
      delta: of the guarantees.
      seeds: trials an image.
      seed: of all random numbers.
      distance: between gradients, for the guided samplers.
      equal_layers: whether every array of the gradient counts the same.
      leak: a gradient from elsewhere, shaped as the params, in place of those of the images.
      reading: how the images' files were read, see `ImageSet.reading`.
      identity: by name, JSON-able: what was asked for and hashes of all that was loaded. Where it is equal results are.
    """

    prior: Prior
    schedule: Schedule
    images: np.ndarray
    labels: Any
    names: tuple[str, ...]
    victims: dict[str, Victim | OwnVictim]
    params: dict[VictimState, Any]
    mechanisms: dict[str, NoisyMechanism]
    sigmas: dict[str, tuple[float, ...]]
    methods: dict[str, Method]
    attacker: Attacker
    client: Client
    proxy: np.ndarray
    delta: float = 1e-5
    seeds: int = 1
    seed: int = 0
    distance: Distance = l2
    equal_layers: bool = False
    leak: Any = None
    reading: dict[str, Any] = dataclasses.field(default_factory=dict)
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def images_known(self) -> bool:
        return bool(np.isfinite(self.images).all())

    @property
    def local_sgd(self) -> LocalSGD | None:
        """What the client computes in place of one gradient."""
        c = self.client
        return LocalSGD(c.local_learning_rate, c.local_steps, c.local_batch or None) if c.local_steps > 1 else None

    def size(self, victim: str) -> int:
        """Parameters of a victim."""
        params = next(params for state, params in self.params.items() if state.name == victim)
        return sum(p.size for p in jax.tree.leaves(params))

    def guarantee(self, victim: str, mechanism: str, sigma: float) -> Guarantee:
        """What one release of a gradient of this victim guarantees."""
        return self.mechanisms[mechanism].guarantee(sigma, self.size(victim), self.delta)


def first_leak(tree: Any, group: int) -> Any:
    """Of arrays (N, ...) what the first leak is of: an image's, or those of a group."""
    return jax.tree.map((lambda a: a[0]) if group == 1 else (lambda a: a[:group]), tree)
