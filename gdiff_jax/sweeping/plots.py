"""A sweep's pictures: quality over sigma, a contact sheet, inferred labels. Reads records, computes no reconstruction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gdiff_jax.files import write_atomic
from gdiff_jax.images import to_unit
from gdiff_jax.sweeping import comparison
from gdiff_jax.sweeping.plan import PRIOR_ONLY
from gdiff_jax.sweeping.records import MemoryStore, Row, Store
from gdiff_jax.sweeping.tables import Panel, by_cell, panels, quartiles, title

Epsilon = Callable[[str, str, float], float]  # of victim, mechanism and sigma

EXACT = 60  # dB, where plots end: what is above is the truth to rounding
MOST_COLUMNS = 6
COLOURS = {
    "dsg": "#0b6e99",
    "calibrated-dsg": "#56b4e9",
    "dsg-mean": "#e69f00",
    "calibrated-mean": "#009e73",
    "dps": "#d1601f",
    "red-diff": "#8c6d31",
    "dlg": "#7b3294",
    "inverting": "#2e8b57",
    "analytic": "0.15",
    "analytic-dsg": "#e377c2",
    "analytic-mean": "#7f7f00",
    "auto": "#d62728",
}


def _save(figure: Figure, path: Path) -> None:
    write_atomic(path, lambda p: figure.savefig(p, dpi=130))


def _tick(sigma: float, epsilon: float) -> str:
    return f"{sigma:.3g}" if np.isinf(epsilon) else f"{sigma:.3g}\n(ε {epsilon:.3g})"


def plot_quality(rows: list[Row], mean_rows: list[Row], epsilon: Epsilon, path: Path) -> None:
    """PSNR and SSIM over sigma: median and interquartile band a method, beside prior-only and the mean image.

    `epsilon` is written under sigma where it is finite.
    """
    shown = panels(rows)
    metrics = [name for name in ("psnr", "ssim") if name in rows[0]]
    columns = min(len(shown), MOST_COLUMNS)
    bands = -(-len(shown) // columns)  # more panels than fit side by side go below
    size = (max(3.4 * columns, 5), 2.9 * len(metrics) * bands + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(metrics) * bands, columns, squeeze=False)
    for ax in axes[-len(metrics) :].ravel():  # the last band may not be full
        ax.set_visible(False)
    for i, metric in enumerate(metrics):
        for j, panel in enumerate(shown):
            ax = axes[i + len(metrics) * (j // columns), j % columns]
            ax.set_visible(True)
            if ax is not axes[i, 0]:
                ax.sharey(axes[i, 0])
            _quality_panel(ax, rows, mean_rows, metric, panel, epsilon)
            if i == 0:
                ax.set_title(title(*panel), fontsize=10)
        cut = metric == "psnr" and axes[i, 0].get_ylim()[1] > EXACT
        if cut:
            for line in [line for ax in axes.ravel() if ax.get_visible() for line in ax.lines]:
                line.set_ydata(np.minimum(np.asarray(line.get_ydata(), float), EXACT))  # at the edge, not left out
            axes[i, 0].set_ylim(0, EXACT + 1)
        for band in range(bands):
            unit = {"psnr": f"PSNR (dB{f', cut at {EXACT}' if cut else ''})", "ssim": "SSIM"}[metric]
            axes[i + len(metrics) * band, 0].set_ylabel(unit)
    figure.supxlabel("sigma: standard deviation of the noise on the gradient", fontsize=10)
    legends = [ax.get_legend_handles_labels() for ax in axes.ravel()]
    lines = {label: handle for handles, labels in legends for handle, label in zip(handles, labels, strict=True)}
    columns = min(5, int(size[0] / 1.6))
    figure.legend(list(lines.values()), list(lines), loc="outside upper center", ncols=columns, frameon=False)
    _save(figure, path)


def _quality_panel(ax: Axes, rows: list[Row], mean_rows: list[Row], metric: str, panel: Panel, epsilon: Epsilon) -> None:
    cells = by_cell(rows)
    here = [cell[3:] for cell in cells if cell[:3] == panel]
    sigmas = sorted({sigma for _, sigma in here})
    x = np.arange(len(sigmas))  # even spacing: the grid is logarithmic and begins with 0
    for method in sorted({method for method, _ in here}):
        middle, low, high = np.array([quartiles(cells.get((*panel, method, s), []), metric) for s in sigmas]).T
        ax.plot(x, middle, "o-", color=COLOURS.get(method), label=method.upper(), ms=4)
        ax.fill_between(x, low, high, color=COLOURS.get(method), alpha=0.18, lw=0)
    prior_rows = [r for r in rows if r["method"] == PRIOR_ONLY]
    for base, label, style in ((prior_rows, "prior only", "--"), (mean_rows, "mean image", ":")):
        if base:
            ax.axhline(quartiles(base, metric)[0], ls=style, color="0.35", lw=1.2, label=label)
    ax.set_xticks(x, [_tick(s, epsilon(panel[0], panel[2], s)) for s in sigmas], rotation=45)
    ax.grid(alpha=0.25)


def contact_sheet(rows: list[Row], truth: np.ndarray, store: Store | MemoryStore, path: Path) -> None:
    """Truth, then seed 0's reconstruction at every sigma: a block a victim and method, a line an image, about a page in all."""
    cells = by_cell(rows)
    blocks = sorted({cell[:4] for cell in cells})
    sigmas = sorted({cell[4] for cell in cells})
    shown = min(4, max(1, 12 // len(blocks)), len(truth))
    arrays = functools.cache(store.arrays)
    picture = lambda row: to_unit(arrays(row["chunk"])["images"][row["row"]])
    prior = {r["image"]: r for r in rows if r["method"] == PRIOR_ONLY and r["seed"] == 0}
    columns, lines = 2 + len(sigmas), len(blocks) * shown
    figure = Figure(figsize=(columns * 0.95 + 0.6, lines * 1.08 + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    for b, block in enumerate(blocks):
        for i in range(shown):
            at = {r["sigma"]: r for s in sigmas for r in cells.get((*block, s), []) if (r["image"], r["seed"]) == (i, 0)}
            shots = [to_unit(truth[i]), *[picture(at[s]) if s in at else None for s in sigmas], picture(prior[i])]
            notes = ["", *[f"{at[s]['psnr']:.1f}" if s in at and not at[s]["failed"] else "failed" for s in sigmas], ""]
            for ax, shot, note in zip(axes[b * shown + i], shots, notes, strict=True):
                _picture(ax, shot, note)
        label = f"{block[3].upper()}\n{title(*block[:3])}"
        axes[b * shown + (shown - 1) // 2, 0].set_ylabel(label.replace(", ", "\n"), fontsize=8)
    for ax, head in zip(axes[0], ["truth", *[f"σ = {s:.3g}" for s in sigmas], "prior only"], strict=True):
        ax.set_title(head, fontsize=8)
    figure.suptitle("Seed 0 of every cell, not chosen; numbers are PSNR in dB", fontsize=9)
    _save(figure, path)


def _picture(ax: Axes, image: Any, note: str) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_frame_on(False)
    if image is not None:
        ax.imshow(np.nan_to_num(image).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xlabel(note, fontsize=7, labelpad=1)


def plot_labels(rows: list[Row], path: Path) -> None:
    """Share of labels that were inferred right over sigma, a line a victim and mechanism; of inferred labels only."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.subplots()
    by_panel = comparison.by_panel(rows)
    sigmas = sorted({sigma for cells in by_panel.values() for sigma, _ in cells})
    # Lines may lie on each other (all at 1 without noise): markers of growing emptiness keep each visible.
    for i, (panel, cells) in enumerate(by_panel.items()):
        shares = []
        for sigma in sigmas:
            seen = {(r["image"], r["seed"]): r["label_accuracy"] for (s, _), cell in cells.items() if s == sigma for r in cell}
            shares.append(np.mean(list(seen.values())) if seen else np.nan)
        marker = "os^Dv*P"[i % 7]
        ax.plot(range(len(sigmas)), shares, marker=marker, label=title(*panel), ms=8 - i % 4, mfc="none", lw=1.2)
    ax.set_xticks(range(len(sigmas)), [f"{s:.3g}" for s in sigmas])
    ax.set_ylim(-0.03, 1.05)
    ax.set_xlabel("sigma: standard deviation of the noise on the gradient")
    ax.set_ylabel("share of labels inferred right")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, frameon=False)
    _save(figure, path)
