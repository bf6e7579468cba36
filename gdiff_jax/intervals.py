"""Estimates over images and their intervals, of 95 %.

Of medians by bootstrap over the images, an image's seeds kept together; of shares by Clopper and Pearson (1934) with as many
draws as images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, betaincinv

RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate and its 95 % interval; the ends are nan where there is too little to tell."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 1, kind: str = "f") -> str:
        if math.isnan(self.value):
            return "-"
        bounds = "" if math.isnan(self.low) else f" [{self.low:.{digits}{kind}}, {self.high:.{digits}{kind}}]"
        return f"{self.value:.{digits}{kind}}{bounds}"

    def percent(self, digits: int = 0) -> str:
        """Shares in per cent; what is not all or nothing has up to two digits more, so that it is not rounded to it."""
        if math.isnan(self.value):
            return "-"

        def one(share: float) -> str:
            shown = next((n for n in (digits, digits + 1, digits + 2) if 0 < round(100 * share, n) < 100), digits)
            return f"{100 * share:.{digits if share in (0, 1) else shown}f}"

        return f"{one(self.value)}% [{one(self.low)}, {one(self.high)}]"


def _draws(groups: int) -> np.ndarray:
    """(RESAMPLES, groups): which groups are in each bootstrap sample."""
    return np.random.default_rng(0).integers(0, groups, (RESAMPLES, groups))


def resampled(groups: Sequence[np.ndarray]) -> Iterable[np.ndarray]:
    """The values of bootstrap samples of the groups, each group whole."""
    for draw in _draws(len(groups)):
        yield np.concatenate([groups[i] for i in draw])


def _resampled_medians(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Of each of the samples; of groups of one size at once, in a tenth of the time."""
    if len({len(group) for group in groups}) > 1:
        return np.array([np.median(sample) for sample in resampled(groups)])
    return np.median(np.stack(groups)[_draws(len(groups))].reshape(RESAMPLES, -1), axis=1)


def median_interval(groups: Iterable[Iterable[float]]) -> Interval:
    """Median of all values, and its interval by bootstrap over the groups; without one for fewer than three groups."""
    arrays = [np.asarray(list(g), np.float64) for g in groups]
    arrays = [a for a in arrays if a.size]
    if not arrays:
        return Interval(math.nan, math.nan, math.nan)
    median = float(np.median(np.concatenate(arrays)))
    if len(arrays) < 3:
        return Interval(median, math.nan, math.nan)
    low, high = np.percentile(_resampled_medians(arrays), [2.5, 97.5])
    return Interval(median, float(low), float(high))


def mean_interval(groups: Iterable[Iterable[float]]) -> Interval:
    """Mean over groups of their means, and its interval by bootstrap over them; without one for fewer than three groups."""
    means = [np.array([np.mean(list(g))]) for g in groups]
    if not means:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(np.mean(means))
    if len(means) < 3:
        return Interval(mean, math.nan, math.nan)
    low, high = np.percentile([sample.mean() for sample in resampled(means)], [2.5, 97.5])
    return Interval(mean, float(low), float(high))


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """How far the median of `ours` lies above that of `theirs`, of the same groups (N,); interval by bootstrap over them."""
    pairs = np.stack([ours, theirs], 1).astype(np.float64)
    above = lambda sample: float(np.median(sample[:, 0]) - np.median(sample[:, 1]))
    if len(pairs) < 3:
        return Interval(above(pairs), math.nan, math.nan)
    low, high = np.percentile([above(sample) for sample in resampled(list(pairs[:, None]))], [2.5, 97.5])
    return Interval(above(pairs), float(low), float(high))


def share_interval(groups: Iterable[Iterable[float]]) -> Interval:
    """Share of ones among zeros and ones, with Clopper and Pearson's interval for as many draws as there are groups.

    An image's seeds are no draws of their own, so the interval is rather too wide than too narrow.
    """
    arrays = [np.asarray(list(g), np.float64) for g in groups]
    arrays = [a for a in arrays if a.size]
    if not arrays:
        return Interval(math.nan, math.nan, math.nan)
    n, share = len(arrays), float(np.mean([a.mean() for a in arrays]))
    return clopper_pearson(share * n, n)


def clopper_pearson(hits: float, draws: int, error: float = 0.05) -> Interval:
    """Of a probability by independent draws: its interval leaves the true one out in `error` of cases at most, half a side."""
    low = float(betaincinv(hits, draws - hits + 1, error / 2)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, draws - hits, 1 - error / 2)) if hits < draws else 1.0
    return Interval(hits / draws, low, high)


def upper_quantile(values: np.ndarray, share: float) -> Interval:
    """What fewer than a share of independent draws lie above, or at; its interval is that of order statistics.

    As many draws are at least the true one as a binomial says, so it lies between two of them, whatever their distribution. An
    end is 0 or inf where there are too few to tell it.

    Args:
      values: (N,) >= 0, inf among them.
      share: in (0, 1).
    """
    falling, n = np.sort(values)[::-1], len(values)
    at_most = bdtr(np.arange(n + 1), n, share)  # so many of them above the true one
    above, below = np.searchsorted(at_most, 0.025, side="right"), np.searchsorted(at_most, 0.975)
    return Interval(
        float(falling[math.ceil(share * n) - 1]),
        float(falling[below]) if below < n else 0.0,
        float(falling[above - 1]) if above > 0 else math.inf,
    )


def more_for_worse(seen: int, chance: float = 0.5) -> int:
    """How many more exchangeable draws it takes to exceed all `seen` with a probability of at least `chance`, in (0, 1).

    Each of seen + m draws is as likely the largest, so it is among the m with probability m / (seen + m), where none are equal,
    and less often where some are: the next exceeds all with 1 / (seen + 1), an even chance takes as many again, 95 % nineteen
    times as many, and the expected number is infinite [derived]. Laplace's rule of succession, of an event that was never
    seen, gives 1 / (seen + 2), of a uniform prior; this holds for whatever is drawn from.
    """
    return math.ceil(seen * chance / (1 - chance) - 1e-9)  # 0.9 / 0.1 is above 9 by rounding


def share_of_worse(seen: int, error: float = 0.05) -> float:
    """The share of what is drawn from that exceeds all `seen` independent draws: at most this, but for `error` of cases.

    Where a share s exceeds a value, `seen` draws all stay below it with probability (1 - s)^seen (Wilks 1941, tolerance
    limits).
    """
    return 1 - error ** (1 / seen)
