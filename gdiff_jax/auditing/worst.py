"""The images that leak most: of those audited, and of those that were picked out of a larger set without an attack. Pure NumPy.

Averages are of the images audited alone. Images that were picked because they leak much are in none of them.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from gdiff_jax.auditing.record import PRIOR_ONLY, AuditRecord, Row
from gdiff_jax.auditing.summary import EXACT, attacker_picks, crossing
from gdiff_jax.intervals import more_for_worse, share_of_worse

SHOWN = 3  # images of the sheet, and lines of the table


@dataclasses.dataclass(frozen=True)
class Leaking:
    """How much of one image came back, over the noise.

    Attributes:
      image: its number; those that were picked come after those audited.
      name: of its file, or its number.
      picked: whether it was attacked because it seemed to leak much.
      noise: from which on it stays below the threshold, by `summary.crossing` of its medians over seeds.
      psnr: of the attacker's choice at each noise level, ascending, dB, medians over seeds; -inf where every trial failed.
    """

    image: int
    name: str
    picked: bool
    noise: float
    psnr: tuple[float, ...]


def picked_trials(record: AuditRecord) -> list[Row]:
    """Attacks on the images that were picked; [] where there are none."""
    return [row for row in (record.worst or {}).get("trials", []) if row["method"] != PRIOR_ONLY]


def ranked(record: AuditRecord) -> list[Leaking]:
    """All images that were attacked, the one that leaks most first: that needs most noise, and of equal ones most PSNR.

    [] where the images are not known, and of groups: their images leak together.
    """
    if not record.has_truth or record.about["group"] > 1:
        return []
    picked = _leaking(record, picked_trials(record), True)
    return sorted([*_leaking(record, record.attacks, False), *picked], key=_order, reverse=True)


def _order(leaking: Leaking) -> tuple[float, float]:
    return leaking.noise, float(np.mean(np.clip(leaking.psnr, 0, EXACT)))


def _leaking(record: AuditRecord, rows: Iterable[Row], picked: bool) -> list[Leaking]:
    by_image: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    names = {row["image"]: str(row.get("name", row["image"])) for row in rows}
    for sigma in record.sigmas:
        for row in attacker_picks([row for row in rows if row["sigma"] == sigma]):
            if row["psnr"] is not None:
                by_image[row["image"]][sigma].append(row["psnr"])
    found = []
    for image, name in names.items():
        psnr = tuple(float(np.median(by_image[image][s])) if by_image[image][s] else -math.inf for s in record.sigmas)
        found.append(Leaking(image, name, picked, crossing(record.sigmas, psnr, record.about["threshold"]), psnr))
    return found


def sentences(record: AuditRecord) -> list[str]:
    """The worst case in words, and how likely a worse one is; [] where `ranked` is."""
    every = ranked(record)
    audited = [leaking for leaking in every if not leaking.picked]
    if not audited:
        return []
    worst, n, others = every[0], len(audited), len(every) - len(audited)
    picked = f"picked out of {(record.worst or {}).get('measured')}"
    if worst.picked:
        first = f"The image that leaks most ({worst.name}, {picked}) is recovered {up_to(record, worst)}"
    else:
        also = "the one" if others == 1 else f"all {others}"
        rest = [leaking for leaking in every if leaking.picked]
        degree = "as much" if others and _order(rest[0]) == _order(worst) else "less"
        less = f", {also} {picked} leak{'s' * (others == 1)} {degree}" if others else ""
        alike = sum(_order(leaking) == _order(worst) for leaking in audited)
        which = f"The images that leak most of the {n} audited ({alike}) are" if alike > 1 else _the_worst(worst, n)
        first = f"{which} recovered {up_to(record, worst)}{less}"
    another = f"like the {n} leaks more than all of them" if n > 1 else "like it leaks more"
    return [f"{first}; another {another} with a probability of 1/{n + 1}."]


def _the_worst(worst: Leaking, n: int) -> str:
    return f"The image {f'that leaks most of the {n} audited' if n > 1 else 'audited'} ({worst.name}) is"


def note(record: AuditRecord) -> str:
    """How many more images may leak more, how images were picked beside those audited, and how far that is to be trusted."""
    every = ranked(record)
    audited = [leaking for leaking in every if not leaking.picked]
    if not audited:
        return ""
    n = len(audited)
    more = (
        f"{more_for_worse(n)} more images like the {n} audited hold one that leaks more as likely as not, and at most "
        f"{share_of_worse(n):.0%} of such images do (95 %)."
    )
    return " ".join(part for part in (more, _how_picked(record, audited)) if part)


def _how_picked(record: AuditRecord, audited: list[Leaking]) -> str:
    data = record.worst
    if not data or not data["expected"]:
        return ""
    of = f"{data['measured']} images" + (f", the first of {data['total']}" if data["measured"] < data["total"] else "")
    least = "those of the highest PSNR that may be expected from the gradient's derivative and the prior, without an attack"
    said = f"Picked are, of {of}, {least}; they are in no average."
    if not data["places"]:
        said = f"Of {of}, {least}, are among those audited: none was picked besides."
    expected = [np.mean(np.minimum(np.array(data["expected"][v.image], float), EXACT)) for v in audited]
    if len(audited) < 4 or np.ptp(expected) == 0:
        return said
    from scipy.stats import spearmanr  # not at the start, which need not wait for it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what does not vary has no correlation
        rho = float(spearmanr(expected, [_order(v)[1] for v in audited]).statistic)
    known = f" Of the {len(audited)} audited it has a rank correlation of {rho:.2f} with what came back." if rho == rho else ""
    return said + known


def up_to(record: AuditRecord, leaking: Leaking) -> str:
    """Up to which noise an image is recovered, in words."""
    if leaking.noise == 0:
        return "at no noise level tried"
    if record.sigmas[-1] == 0:
        return "without noise"
    if math.isinf(leaking.noise):
        return f"even at sigma {record.sigmas[-1]:.3g}, the most that was tried"
    return f"up to sigma {leaking.noise:.2g}"
