"""What an audit says of its run and of what is guaranteed, beside its attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gdiff_jax.mechanisms import Chain, Clip, GaussianNoise, Mechanism
from gdiff_jax.priors import Prior
from gdiff_jax.provenance import this_run

if TYPE_CHECKING:
    from gdiff_jax.theory.privacy import Guarantee


def about_run(prior: Prior, command: str | None = None) -> dict[str, Any]:
    """What made the result, for `AuditRecord.about`; `command` stands in place of the one that this process was started by."""
    run = this_run()
    revision = f", revision {prior.revision[:12]}" if prior.revision else ""
    hashed = f"{prior.name} (sha256 {prior.sha256[:12]}{revision})"
    versions = {k.replace("gdiff-jax", "gdiff_jax"): v for k, v in run["versions"].items()}
    return {**run, "versions": versions, "prior": hashed, **({"command": command} if command else {})}


def clip_norm(mechanism: Mechanism) -> float | None:
    """C of the Gaussian mechanism, whose epsilon follows from sigma / C; else None."""
    stages = mechanism.stages if isinstance(mechanism, Chain) else ()
    if len(stages) == 2 and isinstance(stages[0], Clip) and isinstance(stages[1], GaussianNoise):
        return float(stages[0].norm)
    return None


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
