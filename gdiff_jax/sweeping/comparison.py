"""Which attack is the strongest, at which noise, and what it costs: a table and the words under it. Reads records."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from gdiff_jax.intervals import Interval, median_interval
from gdiff_jax.methods import METHODS
from gdiff_jax.sweeping import tables
from gdiff_jax.sweeping.records import Row
from gdiff_jax.sweeping.tables import Panel

Cells = dict[tuple[float, str], list[Row]]  # by sigma and method


def by_panel(rows: list[Row]) -> dict[Panel, Cells]:
    """By sigma, then in the order of METHODS."""
    found: dict[Panel, Cells] = defaultdict(dict)
    order = lambda item: (*item[0][:3], item[0][4], list(METHODS).index(item[0][3]))
    for (victim, steps, mechanism, method, sigma), cell in sorted(tables.by_cell(rows).items(), key=order):
        found[victim, steps, mechanism][sigma, method] = cell
    return dict(found)


def psnr_interval(rows: list[Row], name: str = "psnr") -> Interval:
    """Median over trials and its 95 % interval, by bootstrap over the images, a leak's images and their seeds together."""
    by_leak: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if not row["failed"] and row.get(name) is not None:
            by_leak[row["image"] - row["row"] % _group(rows)].append(row[name])
    return median_interval(by_leak.values())


def _group(rows: list[Row]) -> int:
    """Images a leak."""
    trials = len({(row["image"], row["seed"]) for row in rows})
    leaks = len({(row["chunk"], row["trial"]) for row in rows})
    return trials // leaks


def wins(cells: Cells, sigma: float) -> dict[str, int]:
    """By method, of how many (image, seed) its PSNR is the highest of all methods; a failed trial wins nothing, ties all."""
    best: dict[tuple[int, int], list[tuple[float, str]]] = defaultdict(list)
    for (at, method), cell in cells.items():
        if at == sigma:
            for row in cell:
                if not row["failed"] and row["psnr"] is not None:
                    best[row["image"], row["seed"]].append((row["psnr"], method))
    count = {method: 0 for at, method in cells if at == sigma}
    for scores in best.values():
        for score, method in scores:
            count[method] += score == max(scores)[0]
    return count


def _psnr(row_values: tuple[float, float, float]) -> str:
    median, low, high = row_values
    if np.isnan(median):
        return "failed"
    return f"{median:.1f}" + ("" if np.isnan(low) else f" [{low:.1f}, {high:.1f}]")


def table(rows: list[Row]) -> str:
    """A line a victim, mechanism, sigma and method: median PSNR with its interval, wins, label accuracy, time and memory."""
    head = ["victim", "trained", "mechanism", "sigma", "method", "PSNR dB [95 %]", "wins", "labels", "s a trial", "MiB a trial"]
    body = []
    for (victim, steps, mechanism), cells in by_panel(rows).items():
        for (sigma, method), cell in cells.items():
            inferred = cell[0]["labels"] != "known"
            accuracy = f"{np.mean([r['label_accuracy'] for r in cell]):.0%}" if inferred else "known"
            trials = list({(r["chunk"], r["trial"]): r for r in cell}.values())
            cost = [f"{np.median([r[name] for r in trials]):.3g}" for name in ("seconds", "memory_mib")]
            won = f"{wins(cells, sigma)[method]}/{len(cell)}"
            line = [victim, str(steps) if steps else "no", mechanism, f"{sigma:.4g}", method, _psnr(psnr_interval(cell))]
            body.append([*line, won, accuracy, *cost])
    return tables.markdown(head, body)


def strongest(cells: Cells) -> list[tuple[float, str, float]]:
    """(sigma, method, median PSNR) of the method with the highest median, at each sigma."""
    found = []
    for sigma in sorted({sigma for sigma, _ in cells}):
        medians = {m: tables.quartiles(cell, "psnr")[0] for (s, m), cell in cells.items() if s == sigma}
        alive = {m: v for m, v in medians.items() if not np.isnan(v)}
        if alive:
            method = max(alive, key=lambda m: alive[m])
            found.append((sigma, method, alive[method]))
    return found


def verdicts(rows: list[Row]) -> list[str]:
    """A sentence a victim and mechanism: which method is the strongest by median, and from which sigma another."""
    lines = []
    for panel, cells in by_panel(rows).items():
        spans: list[tuple[str, list[tuple[float, float]]]] = []
        for sigma, method, median in strongest(cells):
            if not spans or spans[-1][0] != method:
                spans.append((method, []))
            spans[-1][1].append((sigma, median))
        parts = []
        for method, points in spans:
            (low, first), (high, last) = points[0], points[-1]
            where = f"sigma {low:.4g}" if len(points) == 1 else f"sigma {low:.4g} to {high:.4g}"
            parts.append(f"{method} at {where} ({first:.1f}{f' to {last:.1f}' if len(points) > 1 else ''} dB)")
        lines.append(f"Strongest by median against {tables.title(*panel)}: {', then '.join(parts) or 'every trial failed'}.")
    return lines
