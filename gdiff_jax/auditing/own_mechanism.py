"""A mechanism of the caller's own, as a function of the noise's standard deviation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from gdiff_jax.auditing import checks
from gdiff_jax.auditing.about import gaussian_release
from gdiff_jax.mechanisms import GaussianNoise, LaplaceNoise, Mechanism, UniformNoise
from gdiff_jax.sweeping.plan import Plan

if TYPE_CHECKING:
    from gdiff_jax.theory.privacy import Guarantee


@dataclasses.dataclass(frozen=True)
class OwnMechanism:
    """A mechanism by a function of the noise's standard deviation: a `sweeping.plan.NoisyMechanism`."""

    make: Callable[[Any], Mechanism]
    hides_mask: bool = False  # only built-in victims are pruned, by their names

    @property
    def text(self) -> str:
        return str(self.make(0.123456789)).replace("0.123456789", "sigma")

    @property
    def clip_norm(self) -> float | None:
        release = gaussian_release(self.make(1.0))
        return release.norm if release and math.isfinite(release.norm) else None

    @property
    def only_noise(self) -> bool:
        return isinstance(self.make(1.0), GaussianNoise | LaplaceNoise | UniformNoise)

    def for_image(self, key: jax.Array, sigma: Any, victim: Any, params: Any, x: jax.Array) -> Mechanism:
        return self.make(sigma)

    def guarantee(self, sigma: float, size: int, delta: float) -> Guarantee:
        from gdiff_jax.theory import privacy  # with dp_accounting half a second, which a start need not wait

        return privacy.guarantee(self.make(sigma), size, delta)


def with_mechanism(plan: Plan, make: Callable[[Any], Mechanism], sigmas: Sequence[float]) -> Plan:
    (weights,) = plan.params.values()
    checks.check_mechanism(make, weights)
    checks.check_rate(make(1.0), plan.attacker.knowledge, plan.client)
    mechanism, levels = OwnMechanism(make), tuple(sorted(float(sigma) for sigma in sigmas))
    return dataclasses.replace(plan, mechanisms={mechanism.text: mechanism}, sigmas={mechanism.text: levels})
