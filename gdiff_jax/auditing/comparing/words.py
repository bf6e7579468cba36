"""What a comparison of audits says in sentences, and where it misleads. Pure NumPy."""

from __future__ import annotations

import math
import re

from gdiff_jax.auditing import sentences
from gdiff_jax.auditing.comparing.apart import SHORT, settings_apart, topics_apart
from gdiff_jax.auditing.comparing.pairs import Difference, Paired
from gdiff_jax.auditing.comparing.same_images import labels_apart
from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.auditing.sentences import FEW_IMAGES
from gdiff_jax.auditing.summary import EXACT, levels
from gdiff_jax.intervals import Interval

NOISES = ("gaussian", "laplace", "uniform")
METHOD = (
    "A pair is one image and one seed's number, attacked in both. PSNR: median over pairs of the difference of the attacker's "
    f"picks, each cut at {EXACT:g} dB, above which an image is the truth to rounding. Shares: the mean over images of the "
    "difference. Intervals of 95 %: percentiles of a bootstrap over images, 2,000 samples, an image's seeds and the images of "
    "one leak kept together; none for fewer than three images. Each stands for itself: of 20 that hold no true difference one "
    "is expected to miss 0."
)


def signed(interval: Interval, scale: float = 1.0, digits: int = 1) -> str:
    """With its sign and its ends; "-" where nothing was measured."""
    if math.isnan(interval.value):
        return "-"
    one = lambda value: f"{number:+.{digits}f}" if (number := round(scale * value, digits)) else f"{0:.{digits}f}"
    ends = "" if math.isnan(interval.low) else f" [{one(interval.low)}, {one(interval.high)}]"
    return one(interval.value) + ends


def told_apart(interval: Interval) -> bool | None:
    """Whether the interval leaves 0 out; None without an interval."""
    if math.isnan(interval.low):
        return None
    return not interval.low <= 0 <= interval.high


def judged(interval: Interval, images: int, scale: float = 1.0, digits: int = 1) -> str:
    """A difference as a table shows it, and whether so many images can tell it."""
    text = signed(interval, scale, digits)
    if math.isnan(interval.value):
        return text
    if told_apart(interval) is None:
        return f"{text} (no interval from {images} image{'s' * (images != 1)})"
    return text if told_apart(interval) else f"{text}: not told apart"


def level_text(difference: Difference) -> str:
    """The noise of a difference in words."""
    if difference.at == "sigma":
        return f"sigma {difference.sigma:.3g}"
    return f"epsilon {difference.epsilon:.3g} (sigma {difference.sigma:.3g} for {difference.first_sigma:.3g})"


def differs_in(paired: Paired) -> str:
    """A sentence: the settings that may make the difference."""
    topics = topics_apart(settings_apart(paired.audits))
    if not topics:
        return "No setting that may make a difference is another one in these audits."
    if len(topics) == 1:
        return f"The audits differ in one thing, the {topics[0]}."
    return (
        f"The audits differ in {len(topics)} things, {', '.join(topics[:-1])} and {topics[-1]}: which of them made a "
        "difference cannot be told from these alone."
    )


def verdict(paired: Paired) -> list[str]:
    """What came of it: a sentence on the pairs, one on the settings, and one for each audit held against the first."""
    images, seeds = len(paired.places), len({row["seed"] for row in paired.shared[0].attacks})
    first = paired.names[0]
    every = f"{', '.join(paired.names[:-1])} and {paired.names[-1]}"
    count = f"{images} image{'s' * (images != 1)} x {seeds} seed{'s' * (seeds != 1)}"
    lines = [
        f"{every} on the same {count}; medians of paired differences of PSNR, with intervals of 95 %. {differs_in(paired)}"
    ]
    for k, name in enumerate(paired.names[1:], 1):
        lines.append(_against(paired.of(k), name, first))
    return lines


def _against(differences: list[Difference], name: str, first: str) -> str:
    images = max(d.images for d in differences)
    kinds = {"less": list[Difference](), "more": list[Difference](), "same": list[Difference](), "unknown": list[Difference]()}
    for d in differences:
        apart = told_apart(d.psnr)
        kinds["unknown" if apart is None else "same" if not apart else "more" if d.psnr.value > 0 else "less"].append(d)
    parts = [f"{word} comes back at {_levels(kinds[word])}" for word in ("less", "more") if kinds[word]]
    if kinds["same"]:
        same = ", ".join(map(level_text, kinds["same"]))
        parts.append(f"at {same} they are not told apart by these {images} images")
    if kinds["unknown"]:
        parts.append(f"at {_levels(kinds['unknown'])} there is no interval, for want of images or of attacks that ended")
    return f"Of {name}, beside {first}: {'; '.join(parts)}."


def _levels(differences: list[Difference]) -> str:
    return ", ".join(f"{level_text(d)} ({signed(d.psnr)} dB)" for d in differences)


def warnings(paired: Paired) -> list[str]:
    """Signs that the comparison misleads."""
    names, audits = paired.names, paired.audits
    signs = []
    for name, audit in zip(names, audits, strict=True):
        if audit.about.get("unfinished"):
            signs.append(f"{name} is not finished: {len(audit.attacks)} of its attacks are done, and these alone are compared.")
    images = min(d.images for d in paired.differences)
    if images < FEW_IMAGES:
        few, rest = f"{images} image{'s' * (images != 1)}", 1 - 0.05 ** (1 / images)
        signs.append(
            f"No more than {few}, or leaks of several, are compared: intervals of a bootstrap over so few are rather too "
            f"narrow, and what holds for each of them may fail for up to {rest:.0%} of others."
        )
    left_out = [len({row["image"] for row in audit.attacks}) - len(paired.places) for audit in audits]
    if any(left_out):
        counts = ", ".join(f"{count} of {name}" for name, count in zip(names, left_out, strict=True) if count)
        signs.append(f"Images that are not in all of the audits are left out: {counts}.")
    moved = sum(len(set(places)) > 1 for places in paired.places)
    if moved:
        signs.append(
            f"{moved} of {len(paired.places)} images have another place in another set: there noise and start are other draws, "
            "and pairs share their image alone."
        )
    signs += _other_draws(audits)
    if count := labels_apart(paired.shared, paired.places):
        signs.append(f"{count} of the images have another label in another audit, so another gradient.")
    signs += _measures(paired)
    for k, name in enumerate(names[1:], 1):
        lost = [d for d in paired.of(k) if d.without_psnr]
        if lost:
            counts = ", ".join(f"{d.without_psnr} of {d.pairs} at {level_text(d)}" for d in lost)
            signs.append(
                f"Pairs of {name} in which every attack failed in one of the two: {counts}. They count as not recovered, and "
                "have no difference of PSNR."
            )
        exact = [d for d in paired.of(k) if _is_exact(paired, d)]
        if exact:
            where = ", ".join(map(level_text, exact))
            signs.append(
                f"At {where} half or more of the images come back exactly in both {names[0]} and {name}: neither protects."
            )
    if not paired.by_pixels:
        sha256 = str(audits[0].about["hashes"]["images"])[:SHORT]
        signs.append(f"Images are paired by their places, in sets of the same hash, {sha256}.")
    return signs


def _other_draws(audits: tuple[AuditRecord, ...]) -> list[str]:
    """Why the noise of a pair, of the same random key, is not the same in all audits; empty where it is."""
    if len({audit.about.get("seed", 0) for audit in audits}) > 1:
        return ["The audits were made with another --seed: pairs share their image, not their noise and start."]
    reasons = []
    if len({audit.about["parameters"] for audit in audits}) > 1:
        reasons.append("weights are of other shapes")
    if len({_noise_of(audit.about["mechanism"]) for audit in audits}) > 1:
        texts = dict.fromkeys(audit.about["mechanism"] for audit in audits)
        reasons.append(f"a stage of a mechanism draws by its place in it, of {', '.join(texts)}")
    if not reasons:
        return []
    return [f"The noise of a pair is not the same draw, since {' and '.join(reasons)}: pairs share their image and the start."]


def _noise_of(mechanism: str) -> tuple[tuple[str, int], ...] | str:
    """Its noises, each with what its key is folded with in a `Chain`, -1 alone; the text itself where there is no such noise.

    Of a command it is like clip:1+gaussian, of a call like Chain(stages=(Clip(norm=1.0), GaussianNoise(sigma=sigma))).
    """
    called = re.findall(r"(\w+)\(", mechanism)
    if called.count("Chain") > 1:
        return mechanism
    names = [name.removesuffix("Noise").lower() for name in called if name != "Chain"]
    names = names or [stage.partition(":")[0] for stage in mechanism.split("+")]
    alone = called[0] != "Chain" if called else len(names) == 1
    return tuple((name, -1 if alone else i) for i, name in enumerate(names) if name in NOISES) or mechanism


def _measures(paired: Paired) -> list[str]:
    """Of what was measured otherwise, and how it is compared all the same."""
    names, about, audits = paired.names, paired.audits[0].about, paired.audits
    signs = []
    for name, audit in zip(names[1:], audits[1:], strict=True):
        own = audit.about
        for what, form in (("threshold", "{:g} dB"), ("share", "{:.0%}")):
            if own[what] != about[what]:
                theirs, ours = form.format(own[what]), form.format(about[what])
                signs.append(f"{name} has a {what} of {theirs}; all are compared by the {ours} of {names[0]}.")
        if audit.candidates != audits[0].candidates:
            signs.append(
                f"{name} looks for the image among {audit.candidates} candidates, {names[0]} among {audits[0].candidates}: "
                "what is recognised is not compared."
            )
        elif own.get("recognised_by") != about.get("recognised_by"):
            signs.append(f"One of {name} and {names[0]} is of before, and recognises by distance: that is not compared.")
        elif own.get("candidates_from") != about.get("candidates_from"):
            signs.append(f"{name} and {names[0]} take their candidates from different files, which may hold other images.")
        if own.get("prior") != about.get("prior"):
            signs.append(f"{name} and {names[0]} attack with different priors: {own.get('prior')}, and {about.get('prior')}.")
        if own.get("attacks") != about.get("attacks"):
            signs.append(f"{name} and {names[0]} were attacked by different methods, or with other settings: see what differs.")
    return signs


def _is_exact(paired: Paired, difference: Difference) -> bool:
    """Whether both medians are of images that are the truth to rounding."""
    of = lambda audit, sigma: next(v for v in levels(paired.shared[audit]) if v.sigma == sigma).psnr.value
    return of(0, difference.first_sigma) >= EXACT and of(difference.audit, difference.sigma) >= EXACT


def own_warnings(paired: Paired) -> list[tuple[str, list[str]]]:
    """What each audit's own report warns of: an attack that failed looks like a defence."""
    return [(name, sentences.warnings(audit)) for name, audit in zip(paired.names, paired.audits, strict=True)]
