"""What an audit's identification says: beside its bound, and whether the release is what its mechanism is said to be.

Pure NumPy. A finding is an error of the mechanism that is audited, or of this audit, and not a risk that was weighed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.intervals import Interval, clopper_pearson

ERROR = 1e-4  # at most, of a comparison that makes a finding of what is none; there are a few dozen at most


@dataclasses.dataclass(frozen=True)
class Identified:
    """What came of one noise level and one number of candidates.

    Attributes:
      sigma: standard deviation of the noise.
      epsilon: at the audit's delta; None without clipping, of which nothing is guaranteed.
      count: K, candidates.
      success: share of releases in which the best attacker named the record, and its interval of 95 %.
      expected: the same of the mechanism as it is said to be, at these gradients; None where it was left out.
      bound: gamma(1/K), which no attack passes; None without clipping.
      worst: what the most telling gradients that are known would give; None without clipping.
      above_bound, above_expected, below_expected: whether chance does not explain where `success` lies, by `ERROR`.
    """

    sigma: float
    epsilon: float | None
    count: int
    success: Interval
    expected: float | None
    bound: float | None
    worst: float | None
    above_bound: bool
    above_expected: bool
    below_expected: bool


def identified(record: AuditRecord) -> list[Identified]:
    """By noise level, then by K, both ascending; empty where nothing was measured."""
    data = record.identification or {}
    releases, draws = data.get("repetitions", 0), data.get("draws", 0)
    found = []
    for level in data.get("levels", []):
        for row in level["counts"]:
            sure = clopper_pearson(row["hits"], releases, 2 * ERROR)  # each side errs by ERROR
            expected = None if row["expected"] is None else clopper_pearson(row["expected"], draws, 2 * ERROR)
            found.append(
                Identified(
                    sigma=level["sigma"],
                    epsilon=level["epsilon"],
                    count=row["count"],
                    success=clopper_pearson(row["hits"], releases),
                    expected=expected and expected.value,
                    bound=row["bound"],
                    worst=row["worst"],
                    above_bound=row["bound"] is not None and sure.low > row["bound"],
                    above_expected=expected is not None and sure.low > expected.high,
                    below_expected=expected is not None and sure.high < expected.low,
                )
            )
    return found


class SeldomNamed(NamedTuple):
    """From which noise on the best attacker names the record, drawn from so many candidates, in fewer than a share of cases."""

    candidates: int
    share: float
    noise: Interval  # of 95 %, over draws


def seldom_named(record: AuditRecord) -> SeldomNamed | None:
    """None where it was not found."""
    found = (record.identification or {}).get("enough")
    if not found:
        return None
    return SeldomNamed(found["count"], found["share"], Interval(*(math.inf if end is None else end for end in found["sigma"])))


def findings(record: AuditRecord) -> list[str]:
    """What must not be: a release that gives away more than its mechanism can; [] where there is nothing of the kind."""
    rows, data = identified(record), record.identification or {}
    above = [r for r in rows if r.above_bound]
    more = [r for r in rows if r.above_expected]
    if not above and not more:
        return []
    cause = "is noise forgotten or too small, or the gradient not clipped?" if data["clip_norm"] else "is noise too small?"
    if above:
        worst = max(above, key=lambda r: r.success.low - (r.bound or 0))
        allowed = f"above gamma(1/{worst.count}) = {share(worst.bound)}, which no attack on such a release can pass"
    else:
        worst = max(more, key=lambda r: r.success.low - (r.expected or 0))
        clipping = f"clipping to {data['clip_norm']:g} and " if data["clip_norm"] else ""
        allowed = f"where {clipping}noise of sigma {worst.sigma:.3g} leave{'' if clipping else 's'} {share(worst.expected)}"
    return [
        f"FINDING: among {worst.count} candidates the record was named in {worst.success.percent()} of {data['repetitions']} "
        f"releases at sigma {worst.sigma:.3g}, {allowed}. The release is not what its mechanism says: {cause} What is told "
        "here of a guarantee, and of noise that is enough, does not hold for it."
    ]


def warnings(record: AuditRecord) -> list[str]:
    """Where less is named than the mechanism leaves: it is another, or the attack errs, and its figures reassure wrongly."""
    less = [r for r in identified(record) if r.below_expected]
    if not less:
        return []
    r = max(less, key=lambda r: (r.expected or 0) - r.success.high)
    return [
        f"Among {r.count} candidates the record was named in {r.success.percent()} of releases at sigma {r.sigma:.3g}, where "
        f"{share(r.expected)} are to be expected: the mechanism is not the clipping and noise that it is taken for. Do not "
        "rely on what is measured against the bound."
    ]


def sentences(record: AuditRecord) -> list[str]:
    """Measured against bound in words: at the noise level that tells most, among the most candidates."""
    r, data = _most_telling(record), record.identification or {}
    if r is None:
        return []
    enough = seldom_named(record)
    less = f"; fewer than {enough.share:.0%} take noise of sigma {enough.noise.text(3, 'g')} or more" if enough else ""
    return [
        f"Told which {r.count} images it may be of, the best attacker names the right one in {r.success.percent()} of "
        f"{data['repetitions']} releases at sigma {r.sigma:.3g}{_beside(r)}{less}."
    ]


def why_below(record: AuditRecord) -> str:
    """What the bound would need, where what was measured is far below it; "" where it is not."""
    r, data = _most_telling(record), record.identification or {}
    if r is None or r.worst is None or r.success.high >= r.worst or r.above_expected:
        return ""
    apart = math.sqrt(2 * r.count / (r.count - 1)) * data["clip_norm"]
    return (
        f"The bound is for the worst gradients: {r.count} of norm {data['clip_norm']:g}, each {apart:.3g} from the others, "
        f"would give {share(r.worst)} at sigma {r.sigma:.3g}. Those of these images have a median norm of {data['norm']:.3g} "
        f"once clipped, and the nearest other is {data['nearest']:.3g} away, in the median."
    )


def _most_telling(record: AuditRecord) -> Identified | None:
    rows = identified(record)
    if not rows:
        return None
    most, enough = max(r.count for r in rows), seldom_named(record)
    among_most = [r for r in rows if r.count == most]
    tried = [r for r in among_most if not enough or r.sigma != enough.noise.value] or among_most
    return min(tried, key=lambda r: abs((r.success.value if r.bound is None else r.bound) - 0.5))


def _beside(r: Identified) -> str:
    if r.bound is None:
        return ""
    return f" (epsilon {r.epsilon:.4g}), where no attack can in more than gamma(1/{r.count}) = {share(r.bound)}"


def share(value: float | None) -> str:
    """A probability in per cent, with two digits where it is small."""
    if value is None:
        return "-"
    if 0.99 < value < 1:
        return ">99%"
    return f"{value:.0%}" if value == 0 or value >= 0.1 else f"{100 * value:#.2g}%"
