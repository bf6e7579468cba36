"""What noise guarantees, whatever the attack: (epsilon, delta), mu-GDP, advantage, TPR at FPR, reconstruction robustness.

z = sigma / C is the noise multiplier: sigma the standard deviation of the noise on a sum of per-example gradients, C their
clip norm. Adjacency is add/remove of one example, so the L2 sensitivity is C. The figures are dp_accounting's; the closed
forms are of the Gaussian mechanism, which is exactly mu-GDP with mu = 1 / z (Dong, Roth & Su 2022).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting import pld
from scipy.special import log_ndtr, ndtr, ndtri

from gdiff_jax.mechanisms import Clip, GaussianNoise, LaplaceNoise, Mechanism, PruneRepresentation, UniformNoise, stages_of


def gaussian_delta(z: float, epsilon: float) -> float:
    """The least delta of one release at an epsilon (Balle & Wang 2018, Theorem 8): with mu = 1/z,
    Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu).
    """
    _positive(z=z)
    mu = 1 / z
    log_first, log_second = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return float(-np.exp(log_first) * np.expm1(log_second - log_first))


def gaussian_epsilon(z: float, delta: float, steps: int = 1) -> float:
    """The least epsilon at a delta of `steps` releases of the same data, which are one with z / sqrt(steps)."""
    _positive(z=z, steps=steps)
    _check_delta(delta)
    return float(dp_accounting.get_epsilon_gaussian(z / math.sqrt(steps), delta))


def gaussian_noise_multiplier(epsilon: float, delta: float, steps: int = 1) -> float:
    """The least z = sigma / C for (epsilon, delta) of `steps` releases of the same data."""
    _positive(epsilon=epsilon, steps=steps)
    _check_delta(delta)
    return float(dp_accounting.get_sigma_gaussian(epsilon, delta)) * math.sqrt(steps)


def gdp_tpr(mu: float, fpr: float) -> float:
    """Largest true-positive rate of a membership test at a false-positive rate, of a mu-GDP mechanism."""
    return float(ndtr(ndtri(fpr) + mu))


def gdp_advantage(mu: float) -> float:
    """Largest difference between TPR and FPR of a mu-GDP mechanism: 2 Phi(mu / 2) - 1."""
    return float(2 * ndtr(mu / 2) - 1)


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """What a mechanism guarantees against every attack: exact for the Gaussian mechanism, upper bounds for all others.

    Attributes:
      epsilon: at `delta`; inf where there is none.
      delta: as asked for.
      mu: of mu-GDP, where the mechanism is exactly that; else None.
      pure_epsilon: epsilon at delta 0, where it is finite; else None.
      reason: why there is no guarantee; "" where there is one.
    """

    epsilon: float
    delta: float
    mu: float | None = None
    pure_epsilon: float | None = None
    reason: str = ""
    _loss: Any = dataclasses.field(default=None, repr=False, compare=False)  # dp_accounting's privacy loss distribution

    def __bool__(self) -> bool:
        return not self.reason

    def tpr(self, fpr: float) -> float:
        """Largest true-positive rate of a membership test at this false-positive rate.

        Exact for mu-GDP. Else the least of e^eps fpr + delta(eps) over a grid of eps: each is a bound, so this is one.
        """
        if not 0 <= fpr <= 1:
            raise ValueError(f"fpr {fpr} must lie in 0..1")
        if self.mu is not None:
            return gdp_tpr(self.mu, fpr)
        if self._loss is not None:
            epsilons, deltas = self._curve
            return float(min(1.0, np.min(np.exp(epsilons) * fpr + deltas)))
        if self.pure_epsilon is not None:
            e = math.exp(min(self.pure_epsilon, 700.0))
            return float(min(1.0, e * fpr, 1 - (1 - fpr) / e))
        return 1.0

    @functools.cached_property
    def _curve(self) -> tuple[np.ndarray, np.ndarray]:
        """delta(epsilon) on a grid, of a numerical privacy loss distribution: seconds, and the same for every rate."""
        grid = np.linspace(-20.0, 60.0, 4001)
        return grid, np.array(self._loss.get_delta_for_epsilon(grid))

    @property
    def advantage(self) -> float:
        """Largest TPR - FPR of a membership test: delta at epsilon 0."""
        if self.mu is not None:
            return gdp_advantage(self.mu)
        if self._loss is not None:
            return float(self._loss.get_delta_for_epsilon(0.0))
        return math.tanh(self.pure_epsilon / 2) if self.pure_epsilon is not None else 1.0

    def reconstruction_bound(self, kappa: float) -> float:
        """gamma(kappa): largest probability of a reconstruction that a blind guess achieves with probability kappa.

        The power at a false-positive rate kappa of the test between the release with this image and the one without it
        (Balle, Cherubin & Hayes 2022; Hayes et al. 2023; Kaissis et al. 2023). For the Gaussian mechanism
        Phi(Phi^-1(kappa) + mu) [derived]; for pure epsilon-DP at most kappa e^epsilon.
        """
        return self.tpr(kappa)

    def __str__(self) -> str:
        if self.reason:
            return f"none: {self.reason}"
        mu = "" if self.mu is None else f", mu {self.mu:.3g}"
        return (
            f"({self.epsilon:.4g}, {self.delta:g})-DP{mu}, advantage {self.advantage:.3g}, "
            f"TPR {self.tpr(0.01):.3g} at 1 % FPR, gamma {self.reconstruction_bound(1e-4):.3g} at kappa 1e-4"
        )


def gaussian_guarantee(z: float, delta: float, steps: int = 1, sampling_probability: float = 1.0) -> Guarantee:
    """DP-SGD: `steps` Gaussian releases, each of a batch that holds every example with a probability (Poisson sampling).

    Args:
      z: noise multiplier sigma / C > 0.
      delta: in (0, 1).
      steps: number of releases.
      sampling_probability: q in (0, 1]. Below 1 dp_accounting composes privacy loss distributions, which rounds epsilon up a
        little (pessimistic discretisation), and the released gradients of *all* steps are what is protected.
    """
    _positive(z=z, steps=steps)
    _check_delta(delta)
    if not 0 < sampling_probability <= 1:
        raise ValueError(f"sampling_probability {sampling_probability} must lie in (0, 1]")
    if sampling_probability == 1:
        return Guarantee(gaussian_epsilon(z, delta, steps), delta, mu=math.sqrt(steps) / z)
    loss = pld.privacy_loss_distribution.from_gaussian_mechanism(z, sampling_prob=sampling_probability).self_compose(steps)
    return Guarantee(float(loss.get_epsilon_for_delta(delta)), delta, _loss=loss)


def laplace_guarantee(sigma: float, l1_sensitivity: float, delta: float) -> Guarantee:
    """Laplace noise of standard deviation sigma in every coordinate: pure DP with epsilon = l1_sensitivity sqrt(2) / sigma.

    A worst case: for a gradient spread over many coordinates the epsilon at a delta above 0 is far smaller, so this figure is
    not to be set beside a Gaussian's to compare the two noises.
    """
    _positive(sigma=sigma, l1_sensitivity=l1_sensitivity)
    _check_delta(delta)
    epsilon = l1_sensitivity * math.sqrt(2) / sigma
    return Guarantee(epsilon, delta, pure_epsilon=epsilon)


def guarantee(mechanism: Mechanism, size: int, delta: float) -> Guarantee:
    """What one release of one example's gradient through `mechanism` guarantees, add/remove adjacency.

    The first noise counts, if what it meets is bounded; everything after it that looks at its output alone is
    post-processing and costs nothing.

    Args:
      mechanism: with concrete numbers.
      size: number of coordinates of the gradient: it bounds the L1 norm, sqrt(size) times the L2 norm, for Laplace noise.
      delta: in (0, 1).
    """
    _check_delta(delta)
    none = lambda reason: Guarantee(math.inf, delta, reason=reason)
    bound = math.inf
    stages = stages_of(mechanism)
    for i, stage in enumerate(stages):
        if isinstance(stage, GaussianNoise | LaplaceNoise | UniformNoise):
            sigma = float(stage.sigma)
            if isinstance(stage, UniformNoise):
                return none("uniform noise is bounded, and so tells some pairs of inputs apart for certain")
            if sigma > 0 and math.isinf(bound):
                # Were it clipped later, an absent example would still send clipped noise: twice the norm apart.
                late = any(isinstance(later, Clip) for later in stages[i + 1 :])
                return none("no clipping before the noise" if late else "no clipping")
            if sigma > 0:
                if any(isinstance(later, PruneRepresentation) for later in stages[i + 1 :]):
                    return none("the pruned features are chosen by the image, after the noise")
                if isinstance(stage, GaussianNoise):
                    return gaussian_guarantee(sigma / bound, delta)
                return laplace_guarantee(sigma, math.sqrt(size) * bound, delta)
        bound = stage.norm_bound(bound, size)
    return none("no noise")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} {value} must be finite and above 0")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} must lie in (0, 1), and be well below 1 over the number of examples")
