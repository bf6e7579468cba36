"""What an audit's trials say: choices of attackers, intervals, the smallest noise that protects, warnings. Pure NumPy.

A *leak* is one released gradient, of one image or of a group; the trials of one leak are the methods that were run on it. A
seed is a leak of its own (other noise), so nobody can choose among seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gdiff_jax.auditing.intervals import RESAMPLES, Interval, median_interval, resampled, share_interval

if TYPE_CHECKING:
    from gdiff_jax.auditing.result import Audit

Row = dict[str, Any]
PRIOR_ONLY = "prior-only"
FEW_IMAGES = 10


def attacker_picks(rows: list[Row]) -> list[Row]:
    """Of each leak the rows of the method whose image's gradient is closest to the leak: what an attacker can choose by."""
    by_leak: dict[tuple[int, int], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["method"] != PRIOR_ONLY and not row["failed"] and row["distance"] is not None:
            by_leak[row["leak"], row["seed"]][row["method"]].append(row)
    return [row for methods in by_leak.values() for row in min(methods.values(), key=lambda found: found[0]["distance"])]


def oracle_psnr(rows: list[Row]) -> dict[tuple[int, int], float]:
    """By (image, seed) the highest PSNR of all methods and steps: chosen with the truth, which no attacker has."""
    best: dict[tuple[int, int], float] = {}
    for row in rows:
        if row["method"] != PRIOR_ONLY and not row["failed"]:
            seen = [v for v in (row["psnr"], row.get("psnr_of_best_step")) if v is not None]
            if seen:
                key = row["image"], row["seed"]
                best[key] = max([*seen, best.get(key, -math.inf)])
    return best


def by_leak(rows: Iterable[Row], value: Any) -> list[list[float]]:
    """`value(row)` of the rows, grouped by the private images that a leak is of."""
    groups: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        found = value(row)
        if found is not None:
            groups[row["leak"]].append(found)
    return list(groups.values())


@dataclasses.dataclass(frozen=True)
class Level:
    """What came of one noise level. Shares are of (image, seed); a failed trial recovers nothing."""

    sigma: float
    epsilon: float
    trials: int
    failed: int
    methods: str  # that the attacker chose, the most frequent first
    psnr: Interval  # of the attacker's picks
    ssim: Interval
    lpips: Interval
    oracle: Interval  # PSNR
    recovered: Interval
    recovered_oracle: Interval
    identified: Interval
    distance_over_noise: float  # median || grad - leak || over || noise ||, nan without noise


def levels(audit: Audit) -> list[Level]:
    """One a noise level, ascending; empty for a gradient whose image is not known."""
    return [_level(audit, sigma) for sigma in audit.sigmas] if audit.has_truth else []


def _level(audit: Audit, sigma: float) -> Level:
    rows = audit.at(sigma)
    picks = attacker_picks(rows)
    epsilon = next((g["epsilon"] for g in audit.guarantees if g["sigma"] == sigma), None)
    chosen = [row["method"] for row in picks]
    oracle: dict[int, list[float]] = defaultdict(list)
    leak_of = {row["image"]: row["leak"] for row in rows}
    for (image, _), psnr in oracle_psnr(rows).items():
        oracle[leak_of[image]].append(psnr)
    ratios = [row["distance"] / row["noise_norm"] for row in picks if row.get("noise_norm")]
    return Level(
        sigma=sigma,
        epsilon=math.inf if epsilon is None else epsilon,
        trials=len(rows),
        failed=sum(row["failed"] for row in rows),
        methods=", ".join(f"{m} {count}" for m, count in Counter(chosen).most_common()),  # ties in the order of the leaks
        psnr=median_interval(by_leak(picks, lambda r: r["psnr"])),
        ssim=median_interval(by_leak(picks, lambda r: r.get("ssim"))),
        lpips=median_interval(by_leak(picks, lambda r: r.get("lpips"))),
        oracle=median_interval(oracle.values()),
        recovered=share_interval(recovered_groups(audit, sigma)),
        recovered_oracle=share_interval(recovered_groups(audit, sigma, oracle=True)),
        identified=share_interval(_hits(audit, sigma, {(r["image"], r["seed"]): r["rank"] == 0 for r in picks})),
        distance_over_noise=float(np.median(ratios)) if ratios and sigma > 0 else math.nan,
    )


def recovered_groups(audit: Audit, sigma: float, oracle: bool = False) -> list[list[float]]:
    """Per leak's images, whether each (image, seed) came back at the threshold of the audit."""
    rows, threshold = audit.at(sigma), audit.about["threshold"]
    scores = oracle_psnr(rows) if oracle else {(r["image"], r["seed"]): r["psnr"] for r in attacker_picks(rows)}
    return _hits(audit, sigma, {key: score is not None and score >= threshold for key, score in scores.items()})


def _hits(audit: Audit, sigma: float, hit: dict[tuple[int, int], bool]) -> list[list[float]]:
    trials = {(r["image"], r["seed"]): r for r in audit.at(sigma)}
    return by_leak(trials.values(), lambda r: float(hit.get((r["image"], r["seed"]), False)))


def crossing(sigmas: Sequence[float], psnr: Sequence[float], threshold: float) -> float:
    """The noise from which on an image stays below the threshold: between the last level where it is not, and the next.

    Linear in log sigma (in sigma, next to 0). 0.0 if it is below at the first level already, inf if it is not at the last.
    """
    above = [j for j, value in enumerate(psnr) if value >= threshold]
    if not above:
        return 0.0
    j = above[-1]
    if j == len(sigmas) - 1:
        return math.inf
    part = (psnr[j] - threshold) / (psnr[j] - psnr[j + 1])
    low, high = sigmas[j], sigmas[j + 1]
    return low + part * (high - low) if low == 0 else math.exp(math.log(low) + part * math.log(high / low))


def smallest_noise(audit: Audit, oracle: bool = False) -> Interval:
    """The noise from which on fewer than the audit's share of images is recovered, and its interval by bootstrap over images.

    Each image and seed has a `crossing` of its own; of these it is the one that leaves fewer than the share above it. 0 and inf
    are the ends of the grid.
    """
    scores = []
    for sigma in audit.sigmas:
        rows = audit.at(sigma)
        scores.append(oracle_psnr(rows) if oracle else {(r["image"], r["seed"]): r["psnr"] for r in attacker_picks(rows)})
    units = {(r["image"], r["seed"]): r for r in audit.at(audit.sigmas[0])}

    def of(row: Row) -> float:
        found = [s.get((row["image"], row["seed"])) for s in scores]
        return crossing(audit.sigmas, [-math.inf if v is None else v for v in found], audit.about["threshold"])

    groups = [np.array(g) for g in by_leak(units.values(), of)]

    def enough(crossings: np.ndarray) -> float:
        allowed = math.ceil(audit.about["share"] * len(crossings)) - 1  # so many may still be recovered
        return float(np.sort(crossings)[::-1][allowed])

    value = enough(np.concatenate(groups))
    if len(groups) < 3:
        return Interval(value, math.nan, math.nan)
    found = sorted(enough(sample) for sample in resampled(groups))
    return Interval(value, found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES) - 1])


def noise_text(audit: Audit, noise: Interval) -> str:
    """An Interval of `smallest_noise` in words."""

    def one(sigma: float) -> str:
        if math.isinf(sigma):
            return f"above {audit.sigmas[-1]:.3g}"
        return f"{audit.sigmas[0]:.3g} or less" if sigma <= audit.sigmas[0] else f"{sigma:.2g}"

    bounds = "" if math.isnan(noise.low) else f" [{one(noise.low)}, {one(noise.high)}]"
    return one(noise.value) + bounds


def verdict(audit: Audit) -> list[str]:
    """The audit's answer, a few sentences with intervals: how bad, and how much noise."""
    if not audit.has_truth:
        return _verdict_without_truth(audit)
    found, about = audit.levels(), audit.about
    first, images = found[0], len({r["leak"] for r in audit.attacks})
    noise = "without noise" if first.sigma == 0 else f"at the smallest noise tried, sigma {first.sigma:.3g}"
    what = "images" if about["group"] == 1 else f"groups of {about['group']} images"
    count = f"{about['num_images']} images" if about["group"] == 1 else f"{images} groups of {about['group']} images"
    lines = [
        f"If a gradient of {about['victim']} leaks {noise}, {first.recovered.percent()} of images are recovered at "
        f"{about['threshold']:g} dB PSNR or better, with a median of {first.psnr.text()} dB; {first.identified.percent()} are "
        f"recognised among {audit.candidates} candidates, of which a blind guess names {1 / audit.candidates:.1%} "
        f"({count} x {about['seeds']} seeds; 95 % intervals)."
    ]
    chosen, best = smallest_noise(audit), smallest_noise(audit, oracle=True)
    share = f"Fewer than {about['share']:.0%} of images are recovered "
    if chosen.value == 0:
        lines.append(share + f"at every noise level tried, from sigma {audit.sigmas[0]:.3g} on.")
    elif math.isinf(chosen.value):
        lines.append(
            f"No noise level tried brings that below {about['share']:.0%}: try more than sigma {audit.sigmas[-1]:.3g}."
        )
    else:
        lines.append(
            share + f"from noise of sigma {noise_text(audit, chosen)} on, interpolated between levels (an oracle who "
            f"picks iterates by the truth: {noise_text(audit, best)}){_epsilon_text(audit, chosen.value)}."
        )
    lines += _recognised(audit, found, chosen.value)
    last = found[-1]
    if last.recovered.value < about["share"] <= last.recovered.high:
        lines.append(
            f"With {images} {what} even a share of {last.recovered.value:.0%} may be one of {last.recovered.high:.0%}: "
            f"audit more of them before you rely on the {about['share']:.0%}."
        )
    if all(math.isinf(level.epsilon) for level in found):
        reason = next((g["reason"] for g in audit.guarantees if g["sigma"] == last.sigma), "no noise")
        lines.append(f"There is no differential-privacy guarantee: {reason}. Stronger attacks than these may exist.")
    else:
        lines.append("Attacks show what is possible today; the guarantees below hold against every attack.")
    return lines


def _recognised(audit: Audit, found: list[Level], noise: float) -> list[str]:
    """What a picture below the threshold still gives away, at the first level with that noise."""
    at = next((level for level in found if level.sigma >= noise), found[-1])
    kappa = 1 / audit.candidates
    if at.identified.low <= kappa:
        return []
    return [
        f"But a poor picture can tell enough: at sigma {at.sigma:.3g} {at.identified.percent()} are still recognised, "
        f"at sigma {found[-1].sigma:.3g} {found[-1].identified.percent()}."
    ]


def _epsilon_text(audit: Audit, sigma: float) -> str:
    clip_norm = audit.about.get("clip_norm")
    if not clip_norm or not 0 < sigma < math.inf:
        return ""
    from gdiff_jax.theory import privacy

    epsilon = privacy.gaussian_epsilon(sigma / clip_norm, audit.about["delta"])
    return f", which guarantees epsilon {epsilon:.4g} at delta {audit.about['delta']:g} for one release"


def _verdict_without_truth(audit: Audit) -> list[str]:
    rows = [r for r in audit.attacks if not r["failed"] and r["distance"] is not None]
    if not rows:
        return ["Every attack on this gradient failed; see the warnings."]
    best = min(rows, key=lambda r: r["distance"])
    relative = best["distance"] / best["gradient_norm"] if best["gradient_norm"] else math.nan
    return [
        f"Of {len(rows)} attempts on this gradient the closest ({best['method']}, seed {best['seed']}) explains it up to a "
        f"residual of {relative:.1%} of its norm. The private image is not known here, so how close the picture is cannot be "
        "said: compare it with the image if you hold it, or audit the model with images of your own."
    ]


def warnings(audit: Audit) -> list[str]:
    """Signs that the figures mislead, each a sentence or two."""
    found = []
    failed = sum(r["failed"] for r in audit.attacks)
    if failed:
        found.append(
            f"{failed} of {len(audit.attacks)} trials ended in numbers that are not finite; they count as not recovered."
        )
    found += _rank_warnings(audit) + _curve_warnings(audit)
    if not audit.has_truth:
        return found
    all_levels, leaks = audit.levels(), len({r["leak"] for r in audit.attacks})
    if leaks < FEW_IMAGES:
        found.append(f"Only {leaks} leaks: intervals over images are wide, and rest on the images chosen.")
    first = all_levels[0]
    for name, rows in (("a sample of the prior", audit.prior_only), ("the mean image", audit.mean_image)):
        base = [r["psnr"] for r in rows if r["psnr"] is not None]
        if base and first.psnr.value <= np.median(base):
            found.append(
                f"At sigma {first.sigma:.3g} the attack is no better than {name} ({first.psnr.value:.1f} against "
                f"{np.median(base):.1f} dB): it failed, which is no evidence that the gradient is safe."
            )
    spread = _seed_spread(audit, first.sigma)
    if spread > 3:
        found.append(
            f"Seeds differ by {spread:.1f} dB (median range over the seeds of an image at sigma {first.sigma:.3g}): with more "
            "seeds an attacker may do better than the medians say."
        )
    gaps = [level.oracle.value - level.psnr.value for level in all_levels]
    worst = int(np.nanargmax(gaps)) if np.isfinite(gaps).any() else 0
    if gaps[worst] > 2:
        found.append(
            f"At sigma {all_levels[worst].sigma:.3g} an oracle gains {gaps[worst]:.1f} dB over the attacker's choice: a better "
            "rule of choice, or of when to stop, would make the attack stronger."
        )
    over = [level.sigma for level in all_levels if level.distance_over_noise < 0.8]
    if over:
        sigmas = ", ".join(f"{s:.3g}" for s in over)
        advice = " For an attacker who knows the noise, calibrated-mean may do better there."
        found.append(
            f"At sigma {sigmas} the attack fits the noise: its gradient is closer to the leak than the true one. Read these "
            f"levels as a lower bound of the risk.{advice * ('calibrated-mean' not in audit.methods)}"
        )
    accuracy = np.mean([r["label_accuracy"] for r in audit.attacks])
    if accuracy < 1:
        found.append(f"The attacker's labels were right in {accuracy:.0%} of trials.")
    return found


def _seed_spread(audit: Audit, sigma: float) -> float:
    """Median over images of max - min over seeds of the attacker's PSNR; 0 with one seed."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in attacker_picks(audit.at(sigma)):
        if row["psnr"] is not None:
            found[row["image"]].append(row["psnr"])
    return float(np.median([max(v) - min(v) for v in found.values()])) if found else 0.0


def _rank_warnings(audit: Audit) -> list[str]:
    spectra = (audit.theory or {}).get("spectra", [])
    lost = [s for s in spectra if s.get("rank") is not None and s["rank"] < s["dimensions"]]
    if not lost:
        return []
    s = lost[0]
    return [
        f"The gradient does not show the whole image: J^T J has rank {s['rank']} of {s['dimensions']}. What is missing "
        "can come from the prior only, so it is plausible rather than true."
    ]


def _curve_warnings(audit: Audit) -> list[str]:
    """Of attacks that stopped getting closer early, far from what noise explains, at the smallest noise."""
    sigma, found = audit.sigmas[0], []
    for method in audit.methods:
        rows = [r for r in audit.at(sigma) if r["method"] == method and not r["failed"]]
        curves = [audit.curve(r)["distance"] for r in rows]
        curves = [c for c in curves if len(c) > 9 and np.isfinite(c).all()]
        if not curves:
            continue
        median = np.median(np.array(curves), 0)
        floor = np.median([r["noise_norm"] or 0 for r in rows])
        settled = int(np.argmax(median <= 1.05 * median[-1]))
        if settled < len(median) / 2 and median[-1] > max(2 * floor, 0.1 * median[0]):
            found.append(
                f"{method} came no closer to the leak after step {settled} of {len(median)} at sigma {sigma:.3g}, at "
                f"{median[-1] / median[0]:.0%} of its first distance: an early plateau, of the attack and not of the risk."
            )
    return found
