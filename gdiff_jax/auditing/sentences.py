"""What an audit says in sentences: the verdict, and the warnings where its figures mislead. Pure NumPy."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np

from gdiff_jax.auditing import against_bound, between, worst
from gdiff_jax.auditing.advice import advice
from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.auditing.summary import attacker_picks, levels, smallest_noise
from gdiff_jax.auto import UNEXPLAINED
from gdiff_jax.intervals import Interval

FEW_IMAGES = 10


def noise_text(record: AuditRecord, noise: Interval) -> str:
    """An Interval of `smallest_noise` in words."""

    def one(sigma: float) -> str:
        if math.isinf(sigma):
            return f"above {record.sigmas[-1]:.3g}"
        return f"{record.sigmas[0]:.3g} or less" if sigma <= record.sigmas[0] else f"{sigma:.2g}"

    bounds = "" if math.isnan(noise.low) else f" [{one(noise.low)}, {one(noise.high)}]"
    return one(noise.value) + bounds


def verdict(record: AuditRecord) -> list[str]:
    """The audit's answer, with intervals: findings, then what those who decide must know, then what those who build can do."""
    return [*against_bound.findings(record), *decision(record), *advice(record)]


def paragraphs(record: AuditRecord) -> list[str]:
    """The same for reading: each finding, then a paragraph for each of the two."""
    told = {"For those who decide": decision(record), "For those who build": advice(record)}
    return [*against_bound.findings(record), *[f"{who}: {' '.join(lines)}" for who, lines in told.items() if lines]]


def decision(record: AuditRecord) -> list[str]:
    """For those who decide: what is at risk, compared with what, how much noise prevents it, and under which assumptions."""
    if not record.has_truth:
        return [*_without_truth(record), *_assumed(record)]
    return [
        *_at_risk(record),
        *_noise_enough(record),
        *worst.sentences(record),
        *against_bound.sentences(record),
        _guarantee(record),
        *_assumed(record),
    ]


def _at_risk(record: AuditRecord) -> list[str]:
    """What comes back at the smallest noise, of how many, beside what who has no gradient comes to."""
    about, first = record.about, levels(record)[0]
    noise = "without noise" if first.sigma == 0 else f"at the smallest noise tried, sigma {first.sigma:.3g}"
    recognised = ""
    if record.can_recognise:
        recognised = f", and {first.identified.percent()} recognised among {record.candidates} candidates"
    return [
        f"If a gradient of {about['victim']} leaks {noise}, {first.recovered.percent()} of images are recovered at "
        f"{about['threshold']:g} dB PSNR or better{recognised} ({_count(record)} x {about['seeds']} seeds; 95 % intervals).",
        f"The median is {first.psnr.text()} dB{_without_leak(record)}.",
    ]


def _count(record: AuditRecord) -> str:
    leaks, group = len({r["leak"] for r in record.attacks}), record.about["group"]  # of one that goes on, so far
    return f"{leaks} images" if group == 1 else f"{leaks} groups of {group} images"


def _noise_enough(record: AuditRecord) -> list[str]:
    """From which noise on few are recovered, and what is still recognised there."""
    chosen, share = smallest_noise(record), f"{record.about['share']:.0%}"
    recognised = _recognised(record, chosen.value)
    if chosen.value == 0:
        said = f"Fewer than {share} are recovered at every noise level tried, from sigma {record.sigmas[0]:.3g} on"
    elif math.isinf(chosen.value):
        said = f"No noise level tried, up to sigma {record.sigmas[-1]:.3g}, leaves fewer than {share} recovered"
    else:
        said = (
            f"Fewer than {share} are recovered from noise of sigma {noise_text(record, chosen)} on"
            f"{_interpolated(record, chosen)}{_epsilon_text(record, chosen.value)}"
        )
    return [f"{said}{recognised}."]


def _guarantee(record: AuditRecord) -> str:
    noise_levels = levels(record)
    if all(math.isinf(level.epsilon) for level in noise_levels):
        last = noise_levels[-1]
        reason = next((g["reason"] for g in record.guarantees if g["sigma"] == last.sigma), "no noise")
        return f"There is no differential-privacy guarantee: {reason}. Stronger attacks than these may exist."
    return "Attacks show what is possible today; the guarantees below hold against every attack."


def _interpolated(record: AuditRecord, noise: Interval) -> str:
    levels = between.bracket(record, noise)
    return f", interpolated between {levels[0]:.3g} and {levels[1]:.3g}" if levels and noise.value != levels[1] else ""


def _without_leak(record: AuditRecord) -> str:
    """What who has no gradient comes to, which is what a reconstruction is to be compared with; "" where it is not known."""
    every = ((record.prior_only, "a sample of the prior"), (record.mean_image, "the mean image"))
    bases = {name: [r["psnr"] for r in rows if r["psnr"] is not None] for rows, name in every}
    told = [f"{name} has {np.median(psnr):.1f}" for name, psnr in bases.items() if psnr]
    return f"; without the leak {' and '.join(told)} dB" if told else ""


def _assumed(record: AuditRecord) -> list[str]:
    """The attacker, and what images and releases the figures are of."""
    model = record.about.get("threat_model", "")
    what = "Assumed are one release, images like these, and" if record.has_truth else "Assumed is"
    return [f"{what} {model[0].lower()}{model[1:]}"] if model else []


def _recognised(record: AuditRecord, noise: float) -> str:
    """What a picture below the threshold still gives away, at the first level with that noise; "" where no more than others."""
    if not record.can_recognise:
        return ""
    noise_levels = levels(record)
    at = next((level for level in noise_levels if level.sigma >= noise), noise_levels[-1])
    if at.identified.low <= 1 / record.candidates or at.identified.value <= at.recovered.value:
        return ""
    there = f"{at.identified.percent()} at sigma {at.sigma:.3g}"
    return f"; but a poor picture can tell enough, and {there} are still recognised"


def _epsilon_text(record: AuditRecord, sigma: float) -> str:
    clip_norm = record.about.get("clip_norm")
    if not clip_norm or not 0 < sigma < math.inf:
        return ""
    from gdiff_jax.theory import privacy

    epsilon = privacy.gaussian_epsilon(sigma / clip_norm, record.about["delta"])
    return f", which guarantees epsilon {epsilon:.4g} at delta {record.about['delta']:g} for one release"


def _contradicts(row: dict[str, Any]) -> bool:
    """Whether what was solved of a gradient, by `auto` or by the first layer alone, does not have it."""
    off = row["method"] == "analytic" and not row["sigma"] and (row["distance"] or 0) > 0.1 * row["gradient_norm"]
    return off or str(row.get("how")).startswith(UNEXPLAINED)


def _without_truth(record: AuditRecord) -> list[str]:
    rows = [r for r in record.attacks if not r["failed"] and r["distance"] is not None]
    if not rows:
        return ["Every attack on this gradient failed; see the warnings."]
    best = min(rows, key=lambda r: r["distance"])
    relative = best["distance"] / best["gradient_norm"] if best["gradient_norm"] else math.nan
    solved = str(best.get("how")).startswith("solved") and relative < 1e-2
    known = (
        "It was solved, not searched for: unless another image has the same gradient, it is the private one."
        if solved
        else "The private image is not known here, so how close the picture is cannot be said: compare it with the image if "
        "you hold it, or audit the model with images of your own."
    )
    return [
        f"Of {len(rows)} attempts on this gradient the closest ({best['method']}, seed {best['seed']}) explains it up to a "
        f"residual of {relative:.2g} of its norm. {known}",
        *(f"Assumed: {text}." for text in record.about.get("assumed", [])),
    ]


def warnings(record: AuditRecord) -> list[str]:
    """Signs that the figures mislead, each a sentence or two."""
    signs = []
    if record.about.get("unfinished"):
        signs.append(
            f"This audit is not finished: {len(record.attacks)} attacks are done, and the figures are of these alone. The page "
            "is written again as more finish; the same command goes on with one that was ended."
        )
    failed = sum(r["failed"] for r in record.attacks)
    if failed:
        names = list(dict.fromkeys(str(r.get("name", r["image"])) for r in record.attacks if r["failed"]))
        some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        signs.append(
            f"{failed} of {len(record.attacks)} trials ended in numbers that are not finite, of image {some}; they count as "
            "not recovered."
        )
    silent = sorted({r["image"] for r in record.attacks if r["gradient_norm"] == 0})
    if silent:
        images = ", ".join(map(str, silent[:10]))
        signs.append(
            f"The gradient is zero at {len(silent)} of the images ({images}, counted from 0): nothing leaks there, and what "
            "an attack makes of it comes from the prior alone."
        )
    signs += [record.about["doubt"]] if record.about.get("doubt") else []
    if not record.has_truth and any(map(_contradicts, record.attacks)):
        signs.append(
            "The layers give an image away, but that image does not have this gradient: its weights (--weights), the order of "
            "its arrays (--flattened), the range of its pixels or its loss may be others than are attacked here, or something "
            "was done to it (--mechanism)."
        )
    signs += [f"Left out, because it failed: {part}." for part in record.about.get("failed_parts", [])]
    signs += against_bound.warnings(record) + _rank_warnings(record) + _curve_warnings(record)
    if not record.has_truth:
        return signs
    noise_levels, leaks = levels(record), len({r["leak"] for r in record.attacks})
    if leaks < FEW_IMAGES:
        signs.append(f"Only {leaks} leaks: intervals over images are wide, and rest on the images chosen.")
    if not record.can_recognise:
        signs.append(
            "Whether an image is recognised was not measured: no other image was there to take it for; see candidates."
        )
    signs += _one_class(record)
    first = noise_levels[0]
    for name, rows in (("a sample of the prior", record.prior_only), ("the mean image", record.mean_image)):
        base = [r["psnr"] for r in rows if r["psnr"] is not None]
        if base and first.psnr.value <= np.median(base):
            signs.append(
                f"At sigma {first.sigma:.3g} the attack is no better than {name} ({first.psnr.value:.1f} against "
                f"{np.median(base):.1f} dB): it failed, which is no evidence that the gradient is safe."
            )
    spread = _seed_spread(record, first.sigma)
    if spread > 3:
        signs.append(
            f"Seeds differ by {spread:.1f} dB (median range over the seeds of an image at sigma {first.sigma:.3g}): with more "
            "seeds an attacker may do better than the medians say."
        )
    gaps = [level.oracle.value - level.psnr.value for level in noise_levels]
    worst = int(np.nanargmax(gaps)) if np.isfinite(gaps).any() else 0
    if gaps[worst] > 2:
        signs.append(
            f"At sigma {noise_levels[worst].sigma:.3g} an oracle gains {gaps[worst]:.1f} dB over the attacker's choice: "
            "a better rule of choice, or of when to stop, would make the attack stronger."
        )
    over = [level.sigma for level in noise_levels if level.distance_over_noise < 0.8]
    if over:
        sigmas = ", ".join(f"{s:.3g}" for s in over)
        advice = " For an attacker who knows the noise, calibrated-mean may do better there."
        signs.append(
            f"At sigma {sigmas} the attack fits the noise: its gradient is closer to the leak than the true one. Read these "
            f"levels as a lower bound of the risk.{advice * (not {'calibrated-mean', 'auto'} & set(record.methods))}"
        )
    signs += between.warnings(record)
    accuracy = np.mean([r["label_accuracy"] for r in record.attacks])
    if accuracy < 1:
        signs.append(f"The attacker's labels were right in {accuracy:.0%} of trials.")
    return signs


def _one_class(record: AuditRecord) -> list[str]:
    """Of a folder of classes the first images are all of its first class."""
    classes = record.about.get("images_classes") or {}  # of files alone, whose labels are numbers
    labels = {r.get("label") for r in record.attacks} if classes else set()
    if len(classes) < 2 or len(labels) > 1 or len({r["image"] for r in record.attacks}) < 2:
        return []
    name = next((name for name, label in classes.items() if {label} == labels), "one")
    return [
        f"All images audited are of class {name}, of {len(classes)} that the set has: what holds of them may not hold of "
        "others. More are taken by a larger num_images, or move some of each class into a folder of their own."
    ]


def _seed_spread(record: AuditRecord, sigma: float) -> float:
    """Median over images of max - min over seeds of the attacker's PSNR; 0 with one seed."""
    psnr: dict[int, list[float]] = defaultdict(list)
    for row in attacker_picks(record.at(sigma)):
        if row["psnr"] is not None:
            psnr[row["image"]].append(row["psnr"])
    return float(np.median([max(v) - min(v) for v in psnr.values()])) if psnr else 0.0


def _rank_warnings(record: AuditRecord) -> list[str]:
    spectra = (record.theory or {}).get("spectra", [])
    lost = [s for s in spectra if s.get("rank") is not None and s["rank"] < s["dimensions"]]
    if not lost:
        return []
    s = lost[0]
    return [
        f"The gradient does not show the whole image: J^T J has rank {s['rank']} of {s['dimensions']}. What is missing "
        "can come from the prior only, so it is plausible rather than true."
    ]


def _curve_warnings(record: AuditRecord) -> list[str]:
    """Of attacks that stopped getting closer early, far from what noise explains, at the smallest noise."""
    sigma, plateaus = record.sigmas[0], []
    for method in record.methods:
        rows = [r for r in record.at(sigma) if r["method"] == method and not r["failed"]]
        curves = [record.curve(r)["distance"] for r in rows]
        curves = [c for c in curves if len(c) > 9 and np.isfinite(c).all()]
        if not curves:
            continue
        median = np.median(np.array(curves), 0)
        floor = np.median([r["noise_norm"] or 0 for r in rows])
        settled = int(np.argmax(median <= 1.05 * median[-1]))
        if settled < len(median) / 2 and median[-1] > max(2 * floor, 0.1 * median[0]):
            plateaus.append(
                f"{method} came no closer to the leak after step {settled} of {len(median)} at sigma {sigma:.3g}, at "
                f"{median[-1] / median[0]:.0%} of its first distance: an early plateau, of the attack and not of the risk."
            )
    return plateaus
