"""What an audit's trials say: choices of attackers, intervals, the smallest noise that protects. Pure NumPy.

A *leak* is one released gradient, of one image or of a group; the trials of one leak are the methods that were run on it. A
seed is a leak of its own (other noise), so nobody can choose among seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gdiff_jax.auditing.record import COMBINED, PRIOR_ONLY, AuditRecord, Row
from gdiff_jax.intervals import RESAMPLES, Interval, median_interval, resampled, share_interval

EXACT = 60.0  # dB; above it an image is the truth to the rounding of 8 bits, and a difference says nothing


def attacker_picks(rows: list[Row], recognise: bool = False) -> list[Row]:
    """Of each leak the rows of the method that an attacker takes, without the truth.

    What is wanted is settled beforehand. To come close to the private image (the default) the attacks of `COMBINED` and auto
    are in the running, where there are any, and the analytic estimate; to recognise it, every attack but `COMBINED`. Of those
    the one whose image's gradient is closest to the leak is taken. With all in the running, that choice would fall on
    what fits the noise (benchmarks/results/calibration.md).
    """
    leaks: dict[tuple[int, int], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["method"] != PRIOR_ONLY and not row["failed"] and row["distance"] is not None:
            leaks[row["leak"], row["seed"]][row["method"]].append(row)
    distance = lambda rows: rows[0]["distance"]
    return [row for by_method in leaks.values() for row in min(_in_the_running(by_method, recognise).values(), key=distance)]


def _in_the_running(by_method: dict[str, list[Row]], recognise: bool) -> dict[str, list[Row]]:
    if recognise:
        others = {method: rows for method, rows in by_method.items() if method not in COMBINED}
        return others or by_method
    if not any(method in (*COMBINED, "auto") for method in by_method):
        return by_method
    return {method: rows for method, rows in by_method.items() if method in (*COMBINED, "auto", "analytic")}


def oracle_psnr(rows: list[Row]) -> dict[tuple[int, int], float]:
    """By (image, seed) the highest PSNR of all methods and steps: chosen with the truth, which no attacker has."""
    best: dict[tuple[int, int], float] = {}
    for row in rows:
        if row["method"] != PRIOR_ONLY and not row["failed"]:
            scores = [v for v in (row["psnr"], row.get("psnr_of_best_step")) if v is not None]
            if scores:
                key = row["image"], row["seed"]
                best[key] = max([*scores, best.get(key, -math.inf)])
    return best


def by_leak(rows: Iterable[Row], value: Callable[[Row], float | None]) -> list[list[float]]:
    """`value(row)` of the rows, without those of None, grouped by the private images that a leak is of."""
    groups: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        number = value(row)
        if number is not None:
            groups[row["leak"]].append(number)
    return list(groups.values())


@dataclasses.dataclass(frozen=True)
class Level:
    """What came of one noise level. Shares are of (image, seed); a failed trial recovers nothing."""

    sigma: float
    epsilon: float
    trials: int
    failed: int
    methods: str  # that the attacker chose, the most frequent first
    methods_to_recognise: str
    psnr: Interval  # of the attacker's picks, as all that follows but `identified`
    ssim: Interval
    lpips: Interval
    oracle: Interval  # PSNR
    recovered: Interval
    recovered_oracle: Interval
    identified: Interval  # of the picks to recognise, by correlation, or as audits of before did
    identified_in_pixels: Interval  # of the same, by distance; nan in audits of before
    distance_over_noise: float  # median || grad - leak || over || noise ||, nan without noise


def levels(record: AuditRecord) -> list[Level]:
    """One a noise level, ascending; empty for a gradient whose image is not known.

    Computed once per record, since each bootstraps: verdict, warnings, page and figures all ask.
    """
    if "levels" not in record.memo:
        record.memo["levels"] = [_level(record, sigma) for sigma in record.sigmas] if record.has_truth else []
    return record.memo["levels"]


def _level(record: AuditRecord, sigma: float) -> Level:
    rows = record.at(sigma)
    picks, to_recognise = attacker_picks(rows), attacker_picks(rows, recognise=True)
    epsilon = next((g["epsilon"] for g in record.guarantees if g["sigma"] == sigma), None)
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
        methods=_counted(picks),
        methods_to_recognise=_counted(to_recognise),
        psnr=median_interval(by_leak(picks, lambda r: r["psnr"])),
        ssim=median_interval(by_leak(picks, lambda r: r.get("ssim"))),
        lpips=median_interval(by_leak(picks, lambda r: r.get("lpips"))),
        oracle=median_interval(oracle.values()),
        recovered=share_interval(recovered_groups(record, sigma)),
        recovered_oracle=share_interval(recovered_groups(record, sigma, oracle=True)),
        identified=_identified(record, sigma, to_recognise, "rank"),
        identified_in_pixels=_identified(record, sigma, to_recognise, "rank_in_pixels"),
        distance_over_noise=float(np.median(ratios)) if ratios and sigma > 0 else math.nan,
    )


def _identified(record: AuditRecord, sigma: float, picks: list[Row], rank: str) -> Interval:
    """Share of the leaks at a noise level whose image is the nearest by this rank; nan where no trial has it."""
    if picks and not any(rank in row for row in picks):
        return Interval(math.nan, math.nan, math.nan)
    return share_interval(_hits(record, sigma, {(r["image"], r["seed"]): r.get(rank) == 0 for r in picks}))


def _counted(picks: list[Row]) -> str:
    """How often each method was chosen; ties in the order of the leaks."""
    return ", ".join(f"{method} {count}" for method, count in Counter(row["method"] for row in picks).most_common())


def recovered_groups(record: AuditRecord, sigma: float, oracle: bool = False) -> list[list[float]]:
    """Per leak's images, whether each (image, seed) came back at the threshold of the audit."""
    rows, threshold = record.at(sigma), record.about["threshold"]
    scores = oracle_psnr(rows) if oracle else {(r["image"], r["seed"]): r["psnr"] for r in attacker_picks(rows)}
    return _hits(record, sigma, {key: score is not None and score >= threshold for key, score in scores.items()})


def _hits(record: AuditRecord, sigma: float, hit: dict[tuple[int, int], bool]) -> list[list[float]]:
    trials = {(r["image"], r["seed"]): r for r in record.at(sigma)}
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
    low, high = sigmas[j], sigmas[j + 1]
    if psnr[j + 1] == -math.inf:  # no attack came to an end, which tells no point between
        return high
    part = (psnr[j] - threshold) / (psnr[j] - psnr[j + 1])
    return low + part * (high - low) if low == 0 else math.exp(math.log(low) + part * math.log(high / low))


def smallest_noise(record: AuditRecord, oracle: bool = False) -> Interval:
    """The noise from which on fewer than the audit's share of images is recovered, and its interval by bootstrap over images.

    Each image and seed has a `crossing` of its own; of these it is the one that leaves fewer than the share above it. 0 and inf
    are the ends of the grid.
    """
    scores = []
    for sigma in record.sigmas:
        rows = record.at(sigma)
        scores.append(oracle_psnr(rows) if oracle else {(r["image"], r["seed"]): r["psnr"] for r in attacker_picks(rows)})

    def crossing_of(row: Row) -> float:
        psnr = [at_level.get((row["image"], row["seed"])) for at_level in scores]
        return crossing(record.sigmas, [-math.inf if v is None else v for v in psnr], record.about["threshold"])

    return _enough(record, crossing_of)


def smallest_noise_to_hide(record: AuditRecord) -> Interval:
    """The noise from which on fewer than the audit's share of images is recognised, as in `smallest_noise`.

    An image is or is not, so its own noise is the first level tried from which on it never is.
    """
    found = [
        {(r["image"], r["seed"]) for r in attacker_picks(record.at(sigma), recognise=True) if r["rank"] == 0}
        for sigma in record.sigmas
    ]

    def first_hidden(row: Row) -> float:
        last = max((j for j, at_level in enumerate(found) if (row["image"], row["seed"]) in at_level), default=-1)
        return 0.0 if last < 0 else (*record.sigmas, math.inf)[last + 1]

    return _enough(record, first_hidden)


def _enough(record: AuditRecord, noise_of: Callable[[Row], float]) -> Interval:
    """Of the noise that each trial needs, what leaves fewer than the audit's share of them without enough."""
    units = {(r["image"], r["seed"]): r for r in record.at(record.sigmas[0])}
    groups = [np.array(g) for g in by_leak(units.values(), noise_of)]

    def enough(needed: np.ndarray) -> float:
        allowed = math.ceil(record.about["share"] * len(needed) - 1e-9) - 1  # so many may still be recovered
        return float(np.sort(needed)[::-1][allowed])

    value = enough(np.concatenate(groups))
    if len(groups) < 3:
        return Interval(value, math.nan, math.nan)
    estimates = sorted(enough(sample) for sample in resampled(groups))
    return Interval(value, estimates[int(0.025 * RESAMPLES)], estimates[int(0.975 * RESAMPLES) - 1])
