"""Where an audit tries more noise: between the levels at which what it asks for crosses its share, as roots are bracketed."""

from __future__ import annotations

import math

from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.auditing.summary import levels, smallest_noise, smallest_noise_to_hide
from gdiff_jax.intervals import Interval

DECADE = 10.0  # how far below the least noise is looked, where without any more comes back


def bracket(record: AuditRecord, noise: Interval) -> tuple[float, float] | None:
    """The neighbouring levels that an Interval of `smallest_noise` lies between; None where it is an end of the grid."""
    below, above = [s for s in record.sigmas if s < noise.value], [s for s in record.sigmas if s >= noise.value]
    return (below[-1], above[0]) if below and above else None


def next_level(record: AuditRecord) -> float | None:
    """The noise to try next, of a record whose private images are known; None where nothing is gained by more.

    It halves, in log sigma, the gap between two levels in which the noise lies from which on fewer than the share of images is
    recovered; then that of images recognised. A gap that is narrower than the interval over images tells no more: another
    sample of images would give another noise.
    """
    sought = [smallest_noise(record), *[smallest_noise_to_hide(record)] * record.can_recognise]
    for noise in sought:
        between = bracket(record, noise)
        if between is None:
            continue
        low, high = between
        low = low or high / DECADE
        wide = noise.high / noise.low if noise.low != 0 else math.inf
        middle = float(f"{math.sqrt(low * high):.3g}")
        if not wide >= high / low and low < middle < high:  # nan of few images: it has no interval
            return middle
    return None


def warnings(record: AuditRecord) -> list[str]:
    """Where more noise gives away again what less had hidden, by an attack that changes with the noise, or by chance."""
    signs, tried, share = list[str](), levels(record), record.about["share"]
    shares = {"recovered": lambda level: level.recovered, "recognised": lambda level: level.identified}
    for what, of in list(shares.items())[: 1 + record.can_recognise]:
        hidden = next((level for level in tried if of(level).value < share), None)
        again = [level for level in tried if hidden and level.sigma > hidden.sigma and of(level).value >= share]
        if hidden and again:
            signs.append(
                f"More noise is not always safer here: fewer than {share:.0%} are {what} at sigma {hidden.sigma:.3g}, and "
                f"{of(again[-1]).percent()} again at {again[-1].sigma:.3g}. The noise that is told as enough comes after the "
                "last such level."
            )
    return signs
