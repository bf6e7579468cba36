"""What an audit says of its run and of what is guaranteed, beside its attacks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from gdiff_jax import numerics
from gdiff_jax.mechanisms import Clip, GaussianNoise, Mechanism
from gdiff_jax.mechanisms.base import stages_of
from gdiff_jax.priors import Prior
from gdiff_jax.provenance import this_run
from gdiff_jax.sweeping.plan import Plan

if TYPE_CHECKING:
    from gdiff_jax.theory.privacy import Guarantee


def about_run(prior: Prior, command: str | None = None) -> dict[str, Any]:
    """What made the result, for `AuditRecord.about`; `command` stands in place of the one that this process was started by."""
    run = this_run()
    revision = f", revision {prior.revision[:12]}" if prior.revision else ""
    hashed = f"{prior.name} (sha256 {prior.sha256[:12]}{revision})"
    versions = {k.replace("gdiff-jax", "gdiff_jax"): v for k, v in run["versions"].items()}
    return {**run, "versions": versions, "prior": hashed, **({"command": command} if command else {})}


class GaussianRelease(NamedTuple):
    """A gradient, clipped to `norm` (inf: as it is), with white Gaussian noise of standard deviation `noise`."""

    norm: float
    noise: float


def gaussian_release(mechanism: Mechanism) -> GaussianRelease | None:
    """What a mechanism of that kind is, by its own numbers; None of every other."""
    stages = stages_of(mechanism)
    if not stages or not isinstance(stages[-1], GaussianNoise) or not all(isinstance(stage, Clip) for stage in stages[:-1]):
        return None
    return GaussianRelease(min((float(stage.norm) for stage in stages[:-1]), default=math.inf), float(stages[-1].sigma))


def release_at(plan: Plan, sigma: float) -> GaussianRelease | None:
    """What the plan's one mechanism is at a noise level. A user's own may clip otherwise at each, and have units of its own."""
    ((state, params),), (mechanism,) = plan.params.items(), plan.mechanisms.values()
    if mechanism.clip_norm is None and not mechanism.only_noise:
        return None
    key = numerics.key(0)
    return gaussian_release(mechanism.for_image(key, sigma, plan.victims[state.name], params, plan.images[0]))


def clip_norm(plan: Plan) -> float | None:
    """C, where at each level sigma the mechanism clips to C and adds Gaussian noise of just sigma; else None.

    Then epsilon follows from sigma / C, between the levels too.
    """
    (levels,) = plan.sigmas.values()
    norms = set[float]()
    for sigma in levels:
        release = release_at(plan, sigma)
        if release is None or not math.isclose(release.noise, sigma, rel_tol=1e-6):
            return None
        norms.add(release.norm)
    return norms.pop() if len(norms) == 1 and math.isfinite(min(norms)) else None


def guarantee_row(sigma: float, guarantee: Guarantee, kappa: float) -> dict[str, Any]:
    """A guarantee as a line of a table, for `AuditRecord.guarantees`."""
    row: dict[str, Any] = {"sigma": float(sigma), "delta": guarantee.delta, "reason": guarantee.reason}
    names = ("epsilon", "mu", "advantage", "tpr", "gamma", "gamma_1e-4")
    if not guarantee:
        return {**row, **dict.fromkeys(names), "pure": False}
    values = (
        guarantee.epsilon,
        guarantee.mu,
        guarantee.advantage,
        guarantee.tpr(0.01),
        guarantee.reconstruction_bound(kappa),
        guarantee.reconstruction_bound(1e-4),
    )
    return {**row, **dict(zip(names, values, strict=True)), "pure": bool(guarantee.pure_epsilon)}
