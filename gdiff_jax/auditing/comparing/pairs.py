"""Audits of the same images beside each other: which trials make a pair, and by how much they differ. Pure NumPy.

Trials of one image (by its pixels) and one seed's number make a pair. An audit's random numbers come from its --seed, the
image's place and the seed's number alone (`sweeping.trials`), so a pair has the same start, and the same noise where weights
have the same shapes and the noise has the same place in its mechanism; `words.warnings` says where that does not hold. What is
resampled for intervals are images, an image's seeds and a leak's images together.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence

from gdiff_jax.auditing.comparing.same_images import identities, in_common, restricted
from gdiff_jax.auditing.record import AuditRecord, Row
from gdiff_jax.auditing.summary import EXACT, attacker_picks
from gdiff_jax.intervals import Interval, mean_interval, median_interval

SAME_SIGMA = 1e-6  # relative
SAME_EPSILON = 0.01  # relative
NOTHING = Interval(math.nan, math.nan, math.nan)

Pair = tuple[int, int]  # number of the image among those in common, seed


@dataclasses.dataclass(frozen=True)
class Difference:
    """An audit less the first one, at a level of noise that both have.

    Attributes:
      audit: its place among the audits, from 1 on; the first, 0, is what it is held against.
      at: "sigma" or "epsilon", of which both have the same.
      sigma: the noise of the audit, and `first_sigma` that of the first; standard deviations in units of the gradient.
      epsilon: what the audit guarantees there for one release; nan where it guarantees nothing.
      images: groups of trials that were resampled: images, or leaks of several.
      pairs: (image, seed) that both have.
      without_psnr: of these, those where every attack failed in one of the two; they recover nothing, and have no PSNR.
      psnr: median over pairs of the PSNR of the attacker's pick less that of the first's, in dB, each cut at `EXACT`.
      recovered: the share of images recovered less that of the first, in [-1, 1], both at the first's threshold.
      recognised: the same of those recognised; nan where the two look among different numbers of candidates.
    """

    audit: int
    at: str
    sigma: float
    first_sigma: float
    epsilon: float
    images: int
    pairs: int
    without_psnr: int
    psnr: Interval
    recovered: Interval
    recognised: Interval


@dataclasses.dataclass(frozen=True)
class Paired:
    """Audits beside each other.

    Attributes:
      names: of the audits, for the reader.
      audits: as they are.
      shared: the same audits, of the trials alone whose image and seed all have, by the threshold and share of the first.
      places: for each image in common its place in each audit's set.
      by_pixels: whether images were told by their own pixels; else by their place in sets of the same hash.
      differences: of each audit but the first, by noise.
    """

    names: tuple[str, ...]
    audits: tuple[AuditRecord, ...]
    shared: tuple[AuditRecord, ...]
    places: tuple[tuple[int, ...], ...]
    by_pixels: bool
    differences: tuple[Difference, ...]

    def of(self, audit: int) -> list[Difference]:
        """The differences of one audit."""
        return [d for d in self.differences if d.audit == audit]


def pair(audits: Sequence[AuditRecord], names: Sequence[str]) -> Paired:
    """Pairs the trials of audits, and takes their differences.

    Raises:
      ValueError: for fewer than two audits, audits of gradients without images, of no common image, or without a level of noise
        that each has in common with the first; with the remedy.
    """
    if len(audits) < 2:
        raise ValueError(f"{len(audits)} audits to compare; give two or more")
    if len(names) != len(audits) or len(set(names)) != len(names):
        raise ValueError(f"{len(names)} names ({', '.join(names)}) for {len(audits)} audits; give each one of its own")
    for audit, name in zip(audits, names, strict=True):
        if not audit.has_truth:
            raise ValueError(
                f"{name} is of a gradient whose image is not known: there is nothing to score; audit it with --images"
            )
        if not audit.attacks:
            raise ValueError(f"{name} holds no attack yet; let it go on first")
    known_by, by_pixels = identities(audits, names)
    kept = in_common(audits, known_by)
    if not kept:
        raise ValueError(
            f"no image and seed is in all of {', '.join(names)}, so nothing makes a pair; audit both with the same --images"
        )
    common = {identity for identity, _ in kept}
    place_of = [{identity: place for place, identity in own.items()} for own in known_by]
    places = tuple(tuple(own[i] for own in place_of) for i in known_by[0].values() if i in common)
    shared = tuple(restricted(audit, own, kept, audits[0]) for audit, own in zip(audits, known_by, strict=True))
    differences: list[Difference] = []
    for k in range(1, len(audits)):
        found = _differences(shared[0], shared[k], [(row[0], row[k]) for row in places], k)
        if not found:
            raise ValueError(
                f"{names[0]} (sigma {_listed(audits[0])}) and {names[k]} (sigma {_listed(audits[k])}) have no level of noise "
                "in common; audit both with the same --sigma_grid"
            )
        differences += found
    return Paired(tuple(names), tuple(audits), shared, places, by_pixels, tuple(differences))


def _listed(audit: AuditRecord) -> str:
    return ", ".join(f"{sigma:.3g}" for sigma in audit.sigmas)


def levels_in_common(first: AuditRecord, other: AuditRecord) -> list[tuple[str, float, float]]:
    """("sigma" or "epsilon", the first's sigma, the other's) that are the same in both, ascending.

    Epsilons are held against each other where both clip, to different norms, and add Gaussian noise: with the same norm the
    same epsilon is the same sigma.
    """
    close = lambda a, b, tolerance: math.isclose(a, b, rel_tol=tolerance)
    found = [("sigma", a, b) for a in first.sigmas for b in other.sigmas if close(a, b, SAME_SIGMA)]
    norms = first.about.get("clip_norm"), other.about.get("clip_norm")
    same_delta = first.about["delta"] == other.about["delta"]
    if norms[0] and norms[1] and not close(*norms, SAME_SIGMA) and same_delta:
        ours, theirs = epsilons(first), epsilons(other)
        for a, epsilon in ours.items():
            nearest = min(theirs, key=lambda b: abs(theirs[b] - epsilon), default=None)
            if nearest is not None and close(theirs[nearest], epsilon, SAME_EPSILON):
                found.append(("epsilon", a, nearest))
    return found


def epsilons(audit: AuditRecord) -> dict[float, float]:
    """By sigma the epsilon of one release, where there is one."""
    return {g["sigma"]: g["epsilon"] for g in audit.guarantees if g["epsilon"] is not None}


def _differences(first: AuditRecord, other: AuditRecord, places: list[tuple[int, int]], audit: int) -> list[Difference]:
    units = _units(places, first, other)
    numbers = [{row[k]: i for i, row in enumerate(places)} for k in (0, 1)]
    alike = all(first.about.get(name) == other.about.get(name) for name in ("candidates", "recognised_by"))
    same_candidates = first.can_recognise and other.can_recognise and alike
    threshold = first.about["threshold"]
    found = []
    for at, first_sigma, sigma in levels_in_common(first, other):
        ours, theirs = _Scores(other, sigma, numbers[1]), _Scores(first, first_sigma, numbers[0])
        pairs = sorted(ours.tried & theirs.tried)
        if not pairs:  # of an audit that is not finished
            continue
        scored = [p for p in pairs if p in ours.psnr and p in theirs.psnr]
        apart = {p: min(ours.psnr[p], EXACT) - min(theirs.psnr[p], EXACT) for p in scored}
        back = lambda scores, p: float(scores.psnr.get(p, -math.inf) >= threshold)
        known = lambda scores, p: float(p in scores.recognised)
        found.append(
            Difference(
                audit=audit,
                at=at,
                sigma=sigma,
                first_sigma=first_sigma,
                epsilon=epsilons(other).get(sigma, math.nan),
                images=len({units[i] for i, _ in pairs}),
                pairs=len(pairs),
                without_psnr=len(pairs) - len(scored),
                psnr=median_interval(_grouped(units, apart)),
                recovered=mean_interval(_grouped(units, {p: back(ours, p) - back(theirs, p) for p in pairs})),
                recognised=mean_interval(_grouped(units, {p: known(ours, p) - known(theirs, p) for p in pairs}))
                if same_candidates
                else NOTHING,
            )
        )
    return found


class _Scores:
    """What an audit's attacker came to at one level, by image in common and seed.

    Attributes:
      tried: those that were attacked.
      psnr: of the pick to come close, in dB; without those where every attack failed.
      recognised: those whose pick to recognise is closest to the truth among the candidates.
    """

    def __init__(self, audit: AuditRecord, sigma: float, number: dict[int, int]):
        rows = audit.at(sigma)
        pair_of = lambda row: (number[row["image"]], row["seed"])
        self.tried: set[Pair] = {pair_of(row) for row in rows}
        self.psnr: dict[Pair, float] = {pair_of(r): r["psnr"] for r in attacker_picks(rows) if r["psnr"] is not None}
        self.recognised: set[Pair] = {pair_of(r) for r in attacker_picks(rows, recognise=True) if r["rank"] == 0}


def _units(places: list[tuple[int, int]], *audits: AuditRecord) -> list[int]:
    """A number for each image in common; images that share a leak, in either audit, have the same one."""
    unit = list(range(len(places)))
    leaks: list[list[int]] = []
    for k, audit in enumerate(audits):
        leak_of = {row["image"]: row["leak"] for row in audit.attacks}
        together = defaultdict(list)
        for i, row in enumerate(places):
            together[leak_of[row[k]]].append(i)
        leaks += together.values()
    settled = False
    while not settled:
        before = list(unit)
        for members in leaks:
            least = min(unit[i] for i in members)
            for i in members:
                unit[i] = least
        settled = unit == before
    return unit


def _grouped(units: list[int], values: dict[Pair, float]) -> list[list[float]]:
    """By what is resampled together, in the order of the pairs, whatever that of the trials was."""
    groups: dict[int, list[float]] = defaultdict(list)
    for (image, _), value in values.items():
        groups[units[image]].append(value)
    return list(groups.values())


def reconstruction(audit: AuditRecord, sigma: float, image: int) -> tuple[Row | None, str | None]:
    """Of seed 0 the attacker's pick and its picture; None where it failed, or is not kept."""
    row = next((r for r in attacker_picks(audit.at(sigma)) if (r["image"], r["seed"]) == (image, 0)), None)
    return row, audit.pictures.get(f"found/{sigma!r}/{image}")
