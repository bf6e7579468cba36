"""What a network predicts and how that becomes x0hat: epsilon, the sample, v, EDM's F, a score, the velocity of a flow.

Samplers know one process, x_t = signal x0 + noise n with signal^2 + noise^2 = 1, and of it x0hat and the noise level. Processes
that scale x_t otherwise are this one, seen through another scale [derived]:

- a variance-exploding x0 + sigma n, as EDM's, is x_t / signal, at sigma = noise / signal;
- a rectified flow's (1 - s) x0 + s n is x_t / (signal + noise), at s = noise / (signal + noise).

So a parametrisation is three functions of a level (signal, noise), scalars: what the network is shown of x_t, what it is told
of the time, and x0hat by what it says. `Sample`, `V` and `Flow` do not divide by the signal, which is 0 at a zero terminal SNR.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Parametrisation(Protocol):
    """Compared by value, as it is a part of a compiled program's key: a frozen dataclass."""

    def shown(self, x_t: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        """x_t as the network takes it."""
        ...

    def time(self, signal: jax.Array, noise: jax.Array) -> jax.Array | None:
        """What the network is told of the time, a float; None where that is the index of a timestep it was trained with."""
        ...

    def x0(self, x_t: jax.Array, out: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        """x0hat by the network's output, not clipped."""
        ...


@dataclasses.dataclass(frozen=True)
class _OfTimesteps:
    """Networks of a discrete process: they see x_t itself, and are told its index."""

    def shown(self, x_t: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        return x_t

    def time(self, signal: jax.Array, noise: jax.Array) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class Epsilon(_OfTimesteps):
    """The noise n (Ho et al. 2020): x0hat is Tweedie's formula (DPS, Eq. 10)."""

    def x0(self, x_t: jax.Array, out: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        return (x_t - noise * out) / signal


@dataclasses.dataclass(frozen=True)
class Sample(_OfTimesteps):
    """x0 itself."""

    def x0(self, x_t: jax.Array, out: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        return out


@dataclasses.dataclass(frozen=True)
class V(_OfTimesteps):
    """v = signal n - noise x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""

    def x0(self, x_t: jax.Array, out: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        return signal * x_t - noise * out


@dataclasses.dataclass(frozen=True)
class EDM:
    """The network F of EDM's preconditioning (Karras et al. 2022, arXiv 2206.00364, Table 1), continuous in sigma.

    D(x) = c_skip x + c_out F(c_in x, ln(sigma) / 4) with x = x_t / signal and sigma = noise / signal; in terms of x_t and
    r^2 = noise^2 + sigma_data^2 signal^2: c_in x = x_t / r, D = sigma_data^2 signal x_t / r^2 + sigma_data noise F / r
    [derived].
    """

    sigma_data: float = 0.5
    sign: float = 1  # of c_out: -1 for what diffusers calls v_prediction of its EDM schedulers

    def _r(self, signal: jax.Array, noise: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(noise) + jnp.square(self.sigma_data * signal))

    def shown(self, x_t: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        return x_t / self._r(signal, noise)

    def time(self, signal: jax.Array, noise: jax.Array) -> jax.Array:
        return jnp.log(noise / signal) / 4

    def x0(self, x_t: jax.Array, out: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        r = self._r(signal, noise)
        return self.sigma_data * (self.sigma_data * signal / r * x_t + self.sign * noise * out) / r


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of a variance-exploding process of images in [0, 1] (Song et al. 2021, arXiv 2011.13456), told its sigma.

    y = (x_t / signal + 1) / 2 is what it sees, with half of our sigma = noise / signal; y0hat = y + sigma^2 score, by Tweedie's
    formula.
    """

    def shown(self, x_t: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        return (x_t / signal + 1) / 2

    def time(self, signal: jax.Array, noise: jax.Array) -> jax.Array:
        return noise / signal / 2

    def x0(self, x_t: jax.Array, out: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        return x_t / signal + jnp.square(noise / signal) / 2 * out


@dataclasses.dataclass(frozen=True)
class Flow:
    """The velocity n - x0 of a rectified flow (Liu et al. 2023, arXiv 2209.03003; Lipman et al. 2023, arXiv 2210.02747).

    The network is told `times` s, s from 0 (image) to 1 (noise), as diffusers' flow-matching schedulers have it.
    """

    times: float = 1000

    def shown(self, x_t: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        return x_t / (signal + noise)

    def time(self, signal: jax.Array, noise: jax.Array) -> jax.Array:
        return self.times * (noise / (signal + noise))

    def x0(self, x_t: jax.Array, out: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        return (x_t - noise * out) / (signal + noise)
