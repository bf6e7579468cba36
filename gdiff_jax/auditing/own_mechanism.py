"""A mechanism of the caller's own, as a function of the noise's standard deviation."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gdiff_jax import numerics
from gdiff_jax.auditing import checks
from gdiff_jax.auditing.about import gaussian_release
from gdiff_jax.errors import need
from gdiff_jax.mechanisms import GaussianNoise, LaplaceNoise, Mechanism, UniformNoise, noise_of, stages_of
from gdiff_jax.methods import Method
from gdiff_jax.sweeping.plan import Plan
from gdiff_jax.victims.own import digest_of

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
    """The plan with this mechanism at these levels.

    Raises:
      ConfigError: where it cannot be one, or its noise is not what the levels say: they may be in units of its own, in which
        0 must be no noise and more be more.
    """
    (weights,) = plan.params.values()
    checks.check_mechanism(make, weights)
    checks.check_rate(make(1.0), plan.attacker.knowledge, plan.client)
    mechanism, levels = OwnMechanism(make), tuple(sorted(float(sigma) for sigma in sigmas))
    noises = [(sigma, float(noise_of(made, math.nan))) for sigma in levels if _is_ours(made := make(sigma))]
    for sigma, noise in noises:
        if math.isnan(noise):
            need(sigma == 0, f"mechanism({sigma:g}) adds no noise: put GaussianNoise(sigma) into it, or give sigma_grid=[0]")
        need(sigma > 0 or not noise > 0, f"mechanism(0) adds noise of standard deviation {noise:g}; at 0 there must be none")
    for (s, n), (t, m) in itertools.pairwise(noises):
        more = math.isnan(n) or m > n
        need(more, f"mechanism({s:g}) adds noise of standard deviation {n:g}, and mechanism({t:g}) of {m:g}: no more")
    return dataclasses.replace(plan, mechanisms={mechanism.text: mechanism}, sigmas={mechanism.text: levels})


def _is_ours(mechanism: Mechanism) -> bool:
    return all(type(stage).__module__.startswith("gdiff_jax.") for stage in stages_of(mechanism))


def digest(make: Callable[[Any], Mechanism], params: Any) -> str:
    """SHA-256 of what a mechanism does to a gradient, as a program, and of what an attacker expects of it."""

    def both(key: jax.Array, sigma: Any, gradient: Any) -> Any:
        mechanism = make(sigma)
        leak = mechanism(key, gradient)
        return leak, mechanism.simulate(gradient, leak)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return digest_of(jax.make_jaxpr(both)(numerics.key(0), np.float32(1), params))


def code_of(methods: Iterable[Method]) -> str:
    """SHA-256 of what tells methods of the caller's own from others of their names: their arrays and their source."""
    sha = hashlib.sha256()
    for method in methods:
        for leaf in jax.tree.leaves(method):
            sha.update(np.asarray(leaf).tobytes())
        for kind in type(method).__mro__:
            if not kind.__module__.startswith(("gdiff_jax.", "builtins", "typing", "abc")):
                with contextlib.suppress(OSError, TypeError):  # of a session there is no source
                    place = kind if kind.__module__ == "__main__" else sys.modules[kind.__module__]
                    sha.update(inspect.getsource(place).encode())
    return sha.hexdigest()
