"""The figures of an audit, each a function of its record. Colours: Okabe and Ito, told apart by the colour-blind."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gdiff_jax import intervals
from gdiff_jax.auditing import bound_figure, sheets, summary
from gdiff_jax.auditing.record import AuditRecord, curve_key
from gdiff_jax.intervals import Interval
from gdiff_jax.sweeping.drawing import Drawing, house_style, logarithmic

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK)

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "gdiff_jax",  # the same figure is the same file
    "svg.fonttype": "path",
}


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Drawing(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _levels_axis(ax: Axes, record: AuditRecord) -> np.ndarray:
    """Even places for the noise levels, which are about logarithmic and may begin with 0."""
    x = np.arange(len(record.sigmas))
    epsilon = {g["sigma"]: g["epsilon"] for g in record.guarantees}
    tick = lambda s: f"{s:.3g}" + (f"\n(ε {epsilon[s]:.5g})" if epsilon.get(s) is not None else "")
    ax.set_xticks(x, [tick(s) for s in record.sigmas])
    ax.set_xlabel("σ, standard deviation of the noise on the gradient")
    return x


def _line(ax: Axes, x: np.ndarray, values: list[Interval], colour: str, label: str, style: str = "o-") -> None:
    middle, low, high = (np.array([v[k] for v in values]) for k in range(3))
    ax.plot(x, middle, style, color=colour, label=label, ms=5, lw=1.8)
    ax.fill_between(x, low, high, color=colour, alpha=0.16, lw=0)


def _quality(ax: Axes, record: AuditRecord, name: str) -> None:
    levels, x = summary.levels(record), _levels_axis(ax, record)
    for i, method in enumerate(record.methods):
        own = [[r for r in record.at(s) if r["method"] == method and not r["failed"]] for s in record.sigmas]
        values = [intervals.median_interval(summary.by_leak(rows, lambda r: r.get(name))).value for rows in own]
        ax.plot(x, values, "--", color=CYCLE[1 + i % 6], lw=1.2, label=method.upper())
    _line(ax, x, [getattr(v, name) for v in levels], BLUE, "attacker's choice [95 %]")
    if name == "psnr":
        ax.plot(x, [v.oracle.value for v in levels], "^:", color="0.25", ms=4, lw=1, label="oracle's choice")
        ax.axhline(record.about["threshold"], color=BLACK, lw=0.8)
        note = f"recovered: {record.about['threshold']:g} dB"
        ax.annotate(note, (x[-1], record.about["threshold"]), fontsize=8, ha="right", va="bottom")
    for rows, label, style in ((record.prior_only, "prior only", "-."), (record.mean_image, "mean image", ":")):
        base = [r[name] for r in rows if r.get(name) is not None]
        if base:
            ax.axhline(float(np.median(base)), ls=style, color="0.5", lw=1.2, label=label)
    unit = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS (small is alike)"}
    ax.set_ylabel(unit[name])
    if name == "psnr" and ax.get_ylim()[1] > summary.EXACT:
        for line in ax.lines:  # what is solved exactly is shown at the edge, not left out
            line.set_ydata(np.minimum(np.asarray(line.get_ydata(), float), summary.EXACT))
        ax.set_ylim(top=summary.EXACT + 1)
        ax.set_ylabel(f"PSNR, dB, cut at {summary.EXACT:g}")


def quality(record: AuditRecord) -> Figure:
    """Image metrics over the noise: the attacker's and the oracle's choice, each method, and two who ignore the gradient."""
    names = ["psnr", *[n for n in ("ssim", "lpips") if any(r.get(n) is not None for r in record.attacks)]]
    figure, axes = _axes(4.6 * len(names), 3.9, len(names))
    for ax, name in zip(axes, names, strict=True):
        _quality(ax, record, name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    return figure


def _recovered(ax: Axes, record: AuditRecord) -> None:
    levels, x = summary.levels(record), _levels_axis(ax, record)
    threshold = record.about["threshold"]
    _line(ax, x, [v.recovered for v in levels], BLUE, f"recovered, {threshold:g} dB or better")
    ax.plot(x, [v.recovered_oracle.value for v in levels], "^:", color="0.25", ms=4, lw=1, label="the same, oracle's choice")
    if record.can_recognise:
        _recognised(ax, x, record)
    ax.axhline(record.about["share"], color=BLACK, lw=0.8)
    ax.set_ylim(-0.03, 1.05)
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    ax.set_ylabel("share of images [95 %]")


def _recognised(ax: Axes, x: np.ndarray, record: AuditRecord) -> None:
    levels, kappa = summary.levels(record), 1 / record.candidates
    _line(ax, x, [v.identified for v in levels], RED, f"recognised among {record.candidates}", "s-")
    if np.isfinite(by_distance := [v.identified_in_pixels.value for v in levels]).all():
        ax.plot(x, by_distance, "x:", color=RED, ms=5, lw=1, label="recognised, by distance")
    ax.axhline(kappa, color="0.5", ls="-.", lw=1.2, label=f"blind guess, κ = {kappa:.3g}")
    bounds = [g["gamma"] for g in record.guarantees]
    if any(b is not None and b < 1 for b in bounds):
        ax.plot(x, [1.0 if b is None else b for b in bounds], "d--", color=GREEN, ms=4, label="γ(κ): most, if drawn from these")


def recovered(record: AuditRecord) -> Figure:
    """Share of images that came back above the threshold, and that are recognised among candidates, over the noise."""
    figure, (ax,) = _axes(6.4, 4.0)
    _recovered(ax, record)
    figure.legend(loc="outside upper center", ncols=2, fontsize=9)
    return figure


def overview(record: AuditRecord) -> Figure:
    """PSNR, and the shares recovered and recognised, side by side; for a gradient of unknown images, its distance."""
    if not record.has_truth:
        return steps(record)
    figure, axes = _axes(11.5, 4.2, 2)
    for ax, draw in zip(axes, (lambda ax: _quality(ax, record, "psnr"), lambda ax: _recovered(ax, record)), strict=True):
        draw(ax)
        ax.legend(fontsize=8)
    return figure


def epsilon(record: AuditRecord) -> Figure:
    """PSNR, and the share that is recognised, over epsilon; each under its bound where there is one."""
    by_sigma = {g["sigma"]: g for g in record.guarantees if g["epsilon"] is not None}
    levels = sorted((v for v in summary.levels(record) if v.sigma in by_sigma), key=lambda v: v.epsilon)
    figure, axes = _axes(9.2, 3.7, 2)
    x = np.array([v.epsilon for v in levels])
    _line(axes[0], x, [v.psnr for v in levels], BLUE, "attacker's choice [95 %]")
    axes[0].axhline(record.about["threshold"], color=BLACK, lw=0.8)
    axes[0].set_ylabel("PSNR, dB")
    _line(axes[1], x, [v.identified for v in levels], RED, f"recognised among {record.candidates}", "s-")
    axes[1].plot(
        x, [by_sigma[v.sigma]["gamma"] for v in levels], "d--", color=GREEN, ms=4, label="γ(κ): most, if drawn from these"
    )
    axes[1].axhline(1 / record.candidates, color="0.5", ls="-.", lw=1.2, label="blind guess, κ")
    axes[1].set_ylim(-0.03, 1.05)
    axes[1].set_ylabel("share of images")
    for ax in axes:
        logarithmic(ax, "x")
        ax.set_xlabel(f"ε at δ = {record.about['delta']:g}, one release")
        ax.legend(fontsize=8)
    return figure


def _over_steps(ax: Axes, record: AuditRecord, method: str, name: str) -> None:
    """A curve of `AuditRecord.curve` a noise level, its median over the trials of a method."""
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(record.sigmas)))
    for sigma, colour in zip(record.sigmas, colours, strict=True):
        rows = [r for r in record.at(sigma) if r["method"] == method and not r["failed"]]
        curves = np.array([record.curve(r)[name] for r in rows])
        if curves.size and np.isfinite(curves).any():
            median = np.array([np.median(c[np.isfinite(c)]) if np.isfinite(c).any() else math.nan for c in curves.T])
            ax.plot(np.arange(len(median)), median, color=colour, lw=1.6, label=f"σ = {sigma:.3g}")
        floor = np.median([r["noise_norm"] for r in rows if r["noise_norm"] is not None] or [0])
        if name == "distance" and floor > 0:
            ax.axhline(floor, color=colour, ls=":", lw=1)
    ax.set_xlabel("reverse step")


def _legend(axes: list[Axes]) -> None:
    """Beside the last axes that show anything."""
    labelled = [ax for ax in axes if ax.get_legend_handles_labels()[0]]
    if labelled:
        labelled[-1].legend(fontsize=8)


def steps(record: AuditRecord) -> Figure:
    """Per reverse step: distance of the gradient over the distance that noise alone leaves, and PSNR of x0hat; medians."""
    method = record.methods[0]
    figure, axes = _axes(9.2 if record.has_truth else 5.2, 3.6, 2 if record.has_truth else 1)
    for ax, name in zip(axes, ("distance", "psnr"), strict=False):
        _over_steps(ax, record, method, name)
    logarithmic(axes[0], "y")
    axes[0].set_ylabel(f"{method}: distance of gradients\n(dotted: norm of the noise)")
    if record.has_truth:
        axes[1].set_ylabel("PSNR of x0hat, dB")
    _legend(axes)
    return figure


def calibrated(record: AuditRecord) -> list[str]:
    """The methods that measured the share of signal in their guidance."""
    measured = lambda row: "signal" in record.curves[curve_key(row)]
    return [m for m in record.methods if any(measured(row) for row in record.attacks if row["method"] == m)]


def signal(record: AuditRecord) -> Figure:
    """Share of signal that is left in the guidance at each reverse step, of the methods that measure it; medians."""
    methods = calibrated(record)
    figure, axes = _axes(4.6 * len(methods), 3.4, len(methods))
    for ax, method in zip(axes, methods, strict=True):
        _over_steps(ax, record, method, "signal")
        ax.set_ylim(-0.03, 1.03)
        ax.set_ylabel(f"{method}:\nshare of signal in the guidance")
    _legend(axes)
    return figure


def layers(record: AuditRecord) -> Figure:
    """Which arrays of the parameters answer to the pixels (share of ||J||_F^2), and which hold the gradient's norm."""
    theory = record.theory or {}
    names = sorted(theory["shares"], key=theory["shares"].__getitem__, reverse=True)[:16][::-1]
    figure, (ax,) = _axes(6.4, 0.7 + 0.34 * len(names))
    y = np.arange(len(names))
    ax.barh(y + 0.2, [theory["shares"][n] for n in names], 0.38, color=BLUE, label="share of ||J||² (what answers to pixels)")
    ax.barh(y - 0.2, [theory["gradient_shares"][n] for n in names], 0.38, color=ORANGE, label="share of the gradient's ||g||²")
    ax.set_yticks(y, names)
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


def spectrum(record: AuditRecord) -> Figure:
    """Eigenvalues of J^T J beside the noise: a direction of the image is hidden where lambda < sigma^2 / its variance."""
    theory = record.theory or {}
    figure, (ax,) = _axes(6.4, 3.6)
    for k, row in enumerate(theory["spectra"]):
        values = np.maximum(np.array(row["eigenvalues"]), 1e-20)
        x = np.linspace(0, 1, len(values))
        ax.plot(x, values, color=CYCLE[k % 7], lw=1.8, label=f"image {k}: rank {row['rank']} of {row['dimensions']}")
    for sigma in [s for s in record.sigmas if s > 0]:
        ax.axhline(sigma**2, color="0.6", lw=0.8, ls=":")
        ax.annotate(f"σ² at σ = {sigma:.3g}", (1, sigma**2), fontsize=7, ha="right", va="bottom", color="0.35")
    top = max(row["lambda_max"] for row in theory["spectra"])
    low = min(min(row["eigenvalues"]) for row in theory["spectra"])
    logarithmic(ax, "y")
    ax.set_ylim(max(top * 1e-14, 0.1 * low, 1e-20), top * 5)
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    ax.set_xlabel("directions of the image, from the best seen to the worst")
    ax.set_ylabel("eigenvalue of JᵀJ")
    ax.legend(fontsize=8, loc="lower left")
    return figure


def drawings(record: AuditRecord) -> dict[str, Callable[[AuditRecord], Figure]]:
    """The figures that this audit has something to show in, by name, in the report's order."""
    theory = record.theory or {}
    has = {
        "worst": any(n.startswith("worst/") for n in record.pictures),
        "reconstructions": record.has_truth,
        "recognised": record.can_recognise and any(n.startswith("recognised/") for n in record.pictures),
        "deviation": record.has_truth and any(n.startswith("deviation/") for n in record.pictures),
        "attempts": not record.has_truth and any(n.startswith("found/") for n in record.pictures),
        "quality": record.has_truth,
        "recovered": record.has_truth,
        "epsilon": record.can_recognise and sum(g["epsilon"] is not None for g in record.guarantees) > 1,
        "identification": bool((record.identification or {}).get("levels")),
        "steps": True,
        "signal": bool(calibrated(record)),
        "film": any(n.startswith("film/") for n in record.pictures),
        "layers": bool(theory.get("shares")),
        "spectrum": bool(theory.get("spectra")) and bool(theory.get("spectrum_is_exact")),
    }
    every: dict[str, Callable[[AuditRecord], Figure]] = dict(
        worst=sheets.most_leaking,
        reconstructions=sheets.reconstructions, recognised=sheets.recognised, deviation=sheets.deviation,
        attempts=sheets.attempts, quality=quality, recovered=recovered, epsilon=epsilon,
        identification=bound_figure.identification, steps=steps, signal=signal, film=sheets.film, layers=layers,
        spectrum=spectrum,
    )  # fmt: skip
    return {name: draw for name, draw in every.items() if has[name]}


def files(record: AuditRecord) -> dict[str, bytes]:
    """Every figure as NAME.png and NAME.svg; the same audit gives the same bytes."""
    return saved({name: functools.partial(draw, record) for name, draw in drawings(record).items()})


def saved(draws: Mapping[str, Callable[[], Figure]]) -> dict[str, bytes]:
    """What is drawn, in the house's style, as NAME.png and NAME.svg."""
    drawn = {}
    with house_style(STYLE):
        for name, draw in draws.items():
            figure = draw()
            for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                file = io.BytesIO()
                figure.savefig(file, format=kind, dpi=150, metadata=metadata)
                drawn[f"{name}.{kind}"] = file.getvalue()
    return drawn
