"""The figure of what is measured against its bound."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from gdiff_jax.auditing.against_bound import identified
from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.sweeping.drawing import Drawing, logarithmic


def identification(record: AuditRecord) -> Figure:
    """Share of releases in which the best attacker names the record, over K; beside gamma(1/K), if there is one."""
    rows = identified(record)
    sigmas, counts = sorted({r.sigma for r in rows}), np.array(sorted({r.count for r in rows}), float)
    bounded = all(r.bound is not None for r in rows)
    figure = Drawing(figsize=(6.4, 4.4), layout="constrained")
    ax = figure.subplots()
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(sigmas)))
    for i, (sigma, colour) in enumerate(zip(sigmas, colours, strict=True)):
        own = [r for r in rows if r.sigma == sigma]
        value, low, high = (np.array([r.success[k] for r in own]) for k in range(3))
        x = counts * 1.06 ** (i - (len(sigmas) - 1) / 2)  # beside each other, where they would hide each other
        ax.errorbar(
            x, value, [value - low, high - value], fmt="o", color=colour, ms=5, capsize=3, lw=1.4,
            label=f"measured, σ = {sigma:.3g}" + ("" if own[0].epsilon is None else f" (ε {own[0].epsilon:.3g})"),
        )  # fmt: skip
        if bounded:
            ax.plot(counts, np.array([r.bound for r in own]), "_--", color=colour, lw=1.4, ms=14, mew=1.6)
    if bounded:
        ax.plot([], [], "_--", color="0.3", lw=1.4, ms=14, label="γ(1/K): no attack names more")
    ax.plot(counts, 1 / counts, "x-.", color="0.5", lw=1.2, label="blind guess, 1/K")
    logarithmic(ax, "x")
    logarithmic(ax, "y")
    ax.set_xticks(counts, [f"{c:.0f}" for c in counts])
    ax.set_xticks([], minor=True)
    ax.set_xlim(counts.min() / 1.6, counts.max() * 1.6)
    ax.set_ylim(0.5 / counts.max(), 1.3)
    ax.yaxis.set_major_formatter(lambda v, _: f"{100 * v:g} %")
    ax.yaxis.set_minor_formatter(lambda v, _: "")
    ax.set_xlabel("K, candidates")
    ax.set_ylabel("share of releases whose record is named [95 %]")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure
