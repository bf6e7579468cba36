"""How much noise is enough, and what it costs: for a guarantee, by its closed form; against the best attacker among candidates,
where its success crosses the share; and against these attacks, as measured."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np

from gdiff_jax.auditing.against_bound import seldom_named
from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.auditing.summary import smallest_noise, smallest_noise_to_hide
from gdiff_jax.intervals import Interval

RARE = 1e-4  # probability of a blind guess's success
SELDOM = 0.01  # of an attack's, where that is the blind guess's
ADDED = {"clip", "gaussian", "laplace", "uniform"}  # stages after which a gradient is its clipped self plus white noise


@dataclasses.dataclass(frozen=True)
class Enough:
    """Noise that does what is wanted.

    Attributes:
      wanted: in words.
      noise: sigma; 0 and inf are ends of the grid where it is measured. The ends of its interval are nan where it is exact.
      measured: whether it is of attacks that were run; else of the best there can be.
      epsilon: what it guarantees for one release at the audit's delta; nan where it guarantees nothing.
      cosine: expected between a noisy gradient and itself without noise, median over the images; nan where it is not known. Its
        square is what is left of the decrease that a step guarantees. Of a loss of curvature at most L a step of length t along
        d = g + n, n of mean zero, decreases it by t g.d - L t^2 |d|^2 / 2 or more; its mean is largest at
        t = |g|^2 / (L E|d|^2), and is |g|^4 / (2 L E|d|^2) there, of |g|^2 / (2 L) without noise [derived]. A loss that is
        curved by L along g, and less along most of the noise, keeps more.
    """

    wanted: str
    noise: Interval
    measured: bool
    epsilon: float
    cosine: float


def enough(record: AuditRecord) -> list[Enough]:
    """What a release needs to be safe in several senses; none for a gradient whose image is not known."""
    if not record.has_truth:
        return []
    found, share = list[Enough](), record.about["share"]
    if clip_norm := record.about.get("clip_norm"):
        exact = lambda gamma, kappa: Interval(robust_noise_multiplier(gamma, kappa) * clip_norm, math.nan, math.nan)
        words = f"no attack succeeds in more than {SELDOM:.0%} of cases where a blind guess does in {RARE:.2%} (γ)"
        found.append(_of(record, words, exact(SELDOM, RARE), False))
        if 1 / record.candidates < share:
            words = f"no attack names an image drawn from {record.candidates} candidates in more than {share:.0%} of cases (γ)"
            found.append(_of(record, words, exact(share, 1 / record.candidates), False))
    if best := seldom_named(record):
        among = f"an image drawn from {best.candidates} candidates"
        words = f"the best attacker names {among} in fewer than {best.share:.0%} of cases"
        found.append(_of(record, words, best.noise, False))
    found.append(_of(record, f"these attacks recover fewer than {share:.0%}", smallest_noise(record), True))
    words = f"the same, were methods and iterates chosen by the truth, fewer than {share:.0%}"
    found.append(_of(record, words, smallest_noise(record, oracle=True), True))
    if record.can_recognise:
        words = f"these attacks recognise fewer than {share:.0%} among {record.candidates} candidates"
        found.append(_of(record, words, smallest_noise_to_hide(record), True))
    return found


def robust_noise_multiplier(gamma: float, kappa: float) -> float:
    """The least z = sigma / C of one Gaussian release for reconstruction robustness gamma at kappa.

    gamma = Phi(Phi^-1(kappa) + mu) with mu = 1 / z [derived], so z = 1 / (Phi^-1(gamma) - Phi^-1(kappa)).

    Raises:
      ValueError: unless 0 < kappa < gamma < 1: no noise makes an attack worse than a blind guess.
    """
    if not 0 < kappa < gamma < 1:
        raise ValueError(f"gamma {gamma} must lie between kappa {kappa} and 1")
    quantile = statistics.NormalDist().inv_cdf
    return 1 / (quantile(gamma) - quantile(kappa))


def _of(record: AuditRecord, wanted: str, noise: Interval, measured: bool) -> Enough:
    sigma, clip_norm = noise.value, record.about.get("clip_norm")
    epsilon = math.nan
    if clip_norm and 0 < sigma < math.inf:
        from gdiff_jax.theory import privacy  # half a second, which a page without an epsilon need not wait

        epsilon = privacy.gaussian_epsilon(sigma / clip_norm, record.about["delta"])
    untold = measured and sigma == 0 < record.sigmas[0]  # some noise below the least that was tried
    return Enough(wanted, noise, measured, epsilon, math.nan if untold else _cosine(record, sigma))


def _cosine(record: AuditRecord, sigma: float) -> float:
    """|g| / sqrt(|g|^2 + p sigma^2), g clipped: of p coordinates with white noise [derived, for large p]."""
    stages = {stage.split(":")[0] for stage in record.about["mechanism"].split("+")}
    if not math.isfinite(sigma) or not stages <= ADDED or (stages & {"clip"} and not record.about.get("clip_norm")):
        return math.nan
    limit = record.about.get("clip_norm") or math.inf
    norms = np.minimum([row["gradient_norm"] for row in record.at(record.sigmas[0])], limit)
    length = np.sqrt(np.square(norms) + record.about["parameters"] * sigma**2)
    return float(np.median(np.where(length > 0, norms / np.where(length > 0, length, 1), 0.0)))
