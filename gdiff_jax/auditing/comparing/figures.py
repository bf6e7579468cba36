"""The figures of a comparison: quality and its paired differences over the noise, and what came back side by side."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gdiff_jax.auditing import figures, sheets, summary
from gdiff_jax.auditing.comparing.pairs import Paired, reconstruction
from gdiff_jax.auditing.figures import BLACK, CYCLE, STYLE
from gdiff_jax.auditing.record import SHOWN
from gdiff_jax.sweeping.drawing import Drawing, house_style

MARKS = "osD^vP"
SIDE_BY_SIDE = 2  # levels of noise whose pictures are shown
IMAGES = 3  # at each


def quality(paired: Paired) -> Figure:
    """PSNR of the attacker's choice over the noise of each audit, and below the paired differences to the first, in dB."""
    sigmas = sorted({sigma for audit in paired.shared for sigma in audit.sigmas})
    figure = Drawing(figsize=(7.4, 6.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for k, (name, audit) in enumerate(zip(paired.names, paired.shared, strict=True)):
        levels = summary.levels(audit)
        x = [sigmas.index(level.sigma) for level in levels]
        values = np.minimum(np.array([level.psnr for level in levels]), summary.EXACT)
        style: Any = dict(color=CYCLE[k % len(CYCLE)], marker=MARKS[k % len(MARKS)])
        above.plot(x, values[:, 0], label=name, ms=5, lw=1.8, **style)
        above.fill_between(x, values[:, 1], values[:, 2], color=style["color"], alpha=0.16, lw=0)
    threshold = paired.shared[0].about["threshold"]
    above.axhline(threshold, color=BLACK, lw=0.8)
    above.annotate(f"recovered: {threshold:g} dB", (0, threshold), fontsize=8, ha="left", va="bottom")
    cut = any(level.psnr.value > summary.EXACT for audit in paired.shared for level in summary.levels(audit))
    above.set_ylabel("PSNR, dB" + f", cut at {summary.EXACT:g}" * cut)
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    _differences(below, paired, sigmas)
    below.set_xticks(range(len(sigmas)), [f"{sigma:.3g}" for sigma in sigmas])
    below.set_xlabel("σ, standard deviation of the noise on the gradient")
    return figure


def _differences(ax: Axes, paired: Paired, sigmas: list[float]) -> None:
    """Of the levels of the same sigma; where audits are several their bars stand beside each other."""
    others = len(paired.names) - 1
    for k in range(1, others + 1):
        found = [d for d in paired.of(k) if d.at == "sigma"]
        x = np.array([sigmas.index(d.sigma) for d in found]) + 0.16 * (k - (others + 1) / 2)
        middle, low, high = np.array([d.psnr for d in found]).reshape(-1, 3).T
        without = np.isnan(low)  # of too few images: a mark without a bar
        ends = np.where(without, 0, np.stack([middle - low, high - middle]))
        style: Any = dict(color=CYCLE[k % len(CYCLE)], marker=MARKS[k % len(MARKS)])
        ax.errorbar(x, middle, np.maximum(ends, 0), ls="", ms=5, lw=1.6, capsize=3, **style)
    ax.axhline(0, color=CYCLE[0], lw=1.2)
    ax.set_ylabel(f"paired difference to\n{paired.names[0]}, dB [95 %]")


def shown_sigmas(paired: Paired) -> list[tuple[float, ...]]:
    """The noise of each audit at the levels whose pictures are shown: the least that all have, and where the first's PSNR is
    closest to the threshold; () where no level is in all.
    """
    common = []
    for level in summary.levels(paired.shared[0]):
        rest = [_matching(paired, k, level.sigma) for k in range(1, len(paired.names))]
        if not any(math.isnan(sigma) for sigma in rest):
            common.append((level.psnr.value, (level.sigma, *rest)))
    if not common:
        return []
    distance = lambda entry: abs(entry[0] - paired.shared[0].about["threshold"])
    measured = [entry for entry in common if math.isfinite(entry[0])]
    chosen = [common[0][1], *[min(measured, key=distance)[1]] * bool(measured)]
    return sorted(set(chosen))[:SIDE_BY_SIDE]


def _matching(paired: Paired, audit: int, first_sigma: float) -> float:
    """The noise of another audit that is the same as the first's; nan where it has none."""
    found = (d.sigma for d in paired.of(audit) if d.at == "sigma" and d.first_sigma == first_sigma)
    return next(found, math.nan)


def _shown_images(paired: Paired) -> list[tuple[int, ...]]:
    """Places of the first images in common of which each audit keeps pictures."""
    first = paired.shared[0].pictures
    kept = lambda places: max(places) < SHOWN and f"truth/{places[0]}" in first
    return [places for places in paired.places if kept(places)][:IMAGES]


def reconstructions(paired: Paired) -> Figure:
    """The truth, and beside it what the attacker chose in each audit, seed 0, not selected; numbers are PSNR in dB."""
    lines = [(sigmas, places) for sigmas in shown_sigmas(paired) for places in _shown_images(paired)]
    audits = range(len(paired.names))
    figure = Drawing(figsize=(1.25 * (1 + len(audits)) + 0.3, 1.42 * len(lines) + 0.3), layout=sheets.tight(0.02))
    axes = figure.subplots(len(lines), 1 + len(audits), squeeze=False)
    for line, (sigmas, places) in zip(axes, lines, strict=True):
        sheets.show(line[0], paired.shared[0].pictures[f"truth/{places[0]}"], "")
        line[0].set_ylabel(f"σ = {sigmas[0]:.3g}", fontsize=8)
        for k in audits:
            row, picture = reconstruction(paired.shared[k], sigmas[k], places[k])
            sheets.show(line[1 + k], picture, f"{row['psnr']:.1f}" if row and row["psnr"] is not None else "failed")
    for ax, name in zip(axes[0], ["truth", *paired.names], strict=True):
        ax.set_title(name if len(name) <= 18 else f"{name[:17]}…", fontsize=9)
    return figure


def overview(paired: Paired) -> Figure:
    """`quality` in the house's style, for a notebook."""
    with house_style(STYLE):
        return quality(paired)


def files(paired: Paired) -> dict[str, bytes]:
    """Every figure as NAME.png and NAME.svg."""
    draws = {"compare_quality": functools.partial(quality, paired)}
    if shown_sigmas(paired) and _shown_images(paired):
        draws["compare_reconstructions"] = functools.partial(reconstructions, paired)
    return figures.saved(draws)
