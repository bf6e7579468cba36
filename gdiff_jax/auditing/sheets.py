"""Sheets of pictures: what came back of private images, beside each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from gdiff_jax.auditing import pictures, summary, worst
from gdiff_jax.auditing.record import SHOWN, AuditRecord, Row
from gdiff_jax.sweeping.drawing import Drawing


def tight(pad: float) -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=pad, h_pad=pad, wspace=0, hspace=0)


def reconstructions(record: AuditRecord) -> Figure:
    """The truth, and what the attacker chose at each noise level, seed 0, not selected; numbers are PSNR in dB."""
    return _sheet(record, "found", lambda r: f"{r['psnr']:.1f}", ends=("truth", "prior only"))


def recognised(record: AuditRecord) -> Figure:
    """The same of what the attacker chose to recognise the image by; numbers are its place among the candidates."""
    note = lambda r: "recognised" if r["rank"] == 0 else f"place {r['rank'] + 1}"
    return _sheet(record, "recognised", note, ends=("truth", "prior only"), recognise=True)


def deviation(record: AuditRecord) -> Figure:
    """What each pixel of the chosen ones is expected to err by, without the truth; numbers are the PSNR that is expected."""
    return _sheet(record, "deviation", _expected, ends=("truth",))


def _expected(row: Row) -> str:
    return f"{row['expected_psnr']:.1f}" if "expected_psnr" in row else "not told"


def _sheet(
    record: AuditRecord, kind: str, note: Callable[[Row], str], *, ends: tuple[str, ...], recognise: bool = False
) -> Figure:
    """Pictures of a kind over the noise, between those of the first and, where there are two, the last end."""
    shown = [i for i in range(SHOWN) if f"truth/{i}" in record.pictures]
    first, *last = ends
    heads = [first, *[f"σ = {s:.3g}" for s in record.sigmas], *last]
    keys = lambda i: [f"truth/{i}", *[f"{kind}/{s!r}/{i}" for s in record.sigmas], *([f"prior/{i}"] if last else [])]
    picks = {s: summary.attacker_picks(record.at(s), recognise) for s in record.sigmas}
    note_at = {(s, r["image"]): note(r) for s, rows in picks.items() for r in rows if r["seed"] == 0}
    figure = Drawing(
        figsize=(1.05 * len(heads) + 0.2, 1.22 * len(shown) + 0.3),
        layout=tight(0.02),
    )
    axes = figure.subplots(len(shown), len(heads), squeeze=False)
    for line, i in zip(axes, shown, strict=True):
        notes = ["", *[note_at.get((s, i), "failed") for s in record.sigmas], *[""] * len(last)]
        for ax, key, text in zip(line, keys(i), notes, strict=True):
            show(ax, record.pictures.get(key), text)
    for ax, head in zip(axes[0], heads, strict=True):
        ax.set_title(head, fontsize=9)
    return figure


def most_leaking(record: AuditRecord) -> Figure:
    """The images that leak most, the worst first, and what the attacker chose at each noise level, seed 0; numbers are PSNR."""
    rows = [*record.attacks, *worst.picked_trials(record)]
    shown = worst.ranked(record)[: worst.SHOWN]
    figure = Figure(figsize=(1.05 * (len(record.sigmas) + 1) + 0.2, 1.3 * len(shown) + 0.3), layout=tight(0.02))
    axes = figure.subplots(len(shown), len(record.sigmas) + 1, squeeze=False)
    for line, leaking in zip(axes, shown, strict=True):
        show(line[0], record.pictures.get(f"worst/truth/{leaking.image}"), "picked" if leaking.picked else "audited")
        for ax, sigma in zip(line[1:], record.sigmas, strict=True):
            picks = summary.attacker_picks(
                [r for r in rows if (r["sigma"], r["image"], r["seed"]) == (sigma, leaking.image, 0)]
            )
            note = f"{picks[0]['psnr']:.1f}" if picks else "failed"
            show(ax, record.pictures.get(f"worst/{sigma!r}/{leaking.image}"), note)
    for ax, head in zip(axes[0], ["truth", *[f"σ = {s:.3g}" for s in record.sigmas]], strict=True):
        ax.set_title(head, fontsize=9)
    return figure


def show(ax: Axes, picture: str | None, note: str) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_frame_on(False)
    ax.grid(False)
    ax.set_xlabel(note, fontsize=8, labelpad=1)
    if picture is None:
        ax.set_box_aspect(1)  # as wide as the others of its column
    else:
        ax.imshow(pictures.decode(picture), cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def attempts(record: AuditRecord) -> Figure:
    """What was made of a gradient whose image is not known, the closest in gradient first."""
    rows = sorted(summary.attacker_picks(record.attacks), key=lambda r: r["distance"])
    seeds = [int(name.rsplit("/", 1)[1]) for name in record.pictures if name.startswith("found/")]
    best = {r["seed"]: r for r in reversed(rows)}
    seeds.sort(key=lambda seed: best[seed]["distance"])
    maps = [record.pictures.get(f"deviation/{record.sigmas[0]!r}/{seed}") for seed in seeds]
    lines = 2 if any(maps) else 1
    figure = Drawing(figsize=(1.6 * max(len(seeds), 2), 2.0 * lines), layout="constrained")
    axes = figure.subplots(lines, len(seeds), squeeze=False)
    for k, (seed, errors) in enumerate(zip(seeds, maps, strict=True)):
        row = best[seed]
        relative = row["distance"] / row["gradient_norm"]
        note = f"{row['method']}, seed {seed}\n{relative:.1%} unexplained"
        show(axes[0, k], record.pictures[f"found/{record.sigmas[0]!r}/{seed}"], note)
        if lines == 2:
            show(axes[1, k], errors, f"expects {_expected(row)} dB" if errors else "not told")
    return figure


def film(record: AuditRecord) -> Figure:
    """One reconstruction over the reverse steps, from noise to image."""
    names = [n for n in record.pictures if n.startswith("film/")]
    some = [names[round(k)] for k in np.linspace(0, len(names) - 1, min(10, len(names)))]
    figure = Drawing(figsize=(1.02 * len(some), 1.25), layout=tight(0.01))
    times = record.about["film_steps"]
    for ax, name in zip(figure.subplots(1, len(some), squeeze=False)[0], some, strict=True):
        show(ax, record.pictures[name], f"t = {times[int(name[5:])]}")
    return figure
