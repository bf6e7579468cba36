"""The tables and the figure of `calibration_study`, from the scores of its trials alone."""

from __future__ import annotations

import csv
import functools
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gdiff_jax.errors import ConfigError, need
from gdiff_jax.intervals import Interval, paired_difference
from gdiff_jax.sweeping.config import Attacks
from gdiff_jax.sweeping.plots import COLOURS
from gdiff_jax.sweeping.tables import markdown

STRENGTHS = {"dsg": "guidance_rate", "dps": "zeta"}  # the flag that is tuned for the oracle
MEAN_IMAGE = "mean image"


class Setting(NamedTuple):
    method: str
    strength: float | None = None  # None: its default

    @property
    def title(self) -> str:
        return self.method if self.strength is None else f"{self.method}-{self.strength:g}"


class Score(NamedTuple):
    """One trial; a line of trials.csv."""

    prior: str
    victim: str
    method: str
    strength: float | None
    sigma: float
    image: int
    psnr: float
    ssim: float
    seconds: float


DEFAULT = Setting("dsg", Attacks().guidance_rate)
Cells = dict[Setting, dict[float, np.ndarray]]  # of one victim: PSNR by image, at each sigma


def write_csv(scores: Sequence[Score]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(Score._fields)
    lines.writerows(["" if v is None or v != v else v for v in score] for score in scores)
    return text.getvalue()


def read_csv(path: Path) -> list[Score]:
    """The scores of a trials.csv; ConfigError where it is none."""
    number = lambda text: float(text) if text else float("nan")
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        return [
            Score(r["prior"], r["victim"], r["method"], float(r["strength"]) if r["strength"] else None, float(r["sigma"]),
                  int(r["image"]), *(number(r[k]) for k in ("psnr", "ssim", "seconds")))
            for r in lines
        ]  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--trials {path} is no trials.csv of this study: {error!r}") from None


def check_complete(scores: Sequence[Score]) -> None:
    """ConfigError unless each victim has every untuned attack and the default of DSG, on the same images and noise levels."""
    trials: dict[str, dict[Setting, list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
    for s in scores:
        trials[_title(s)][Setting(s.method, s.strength)].append((s.sigma, s.image))
    untuned = {setting for own in trials.values() for setting in own if setting.strength is None}
    needed = {setting for setting in untuned if setting.method != MEAN_IMAGE}
    need(needed, "--trials hold no attack with one setting, which the tables are about")
    for victim, own in trials.items():
        missing = sorted(setting.title for setting in needed | {DEFAULT} if setting not in own)
        need(not missing, f"--trials: {victim} lacks {', '.join(missing)}, which the table compares")
        odd = sorted(setting.title for setting, where in own.items() if sorted(where) != sorted(set(own[DEFAULT])))
        need(not odd, f"--trials: {victim} has other noise levels or images for {', '.join(odd)}, or has them twice")


def _title(score: Score) -> str:
    return f"{score.victim}, {score.prior}"


def by_victim(scores: Sequence[Score]) -> dict[str, Cells]:
    """By victim and prior. A failed trial counts as 0 dB, less than noise: it recovered nothing."""
    victims: dict[str, dict[Setting, dict[float, dict[int, float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for s in scores:
        victims[_title(s)][Setting(s.method, s.strength)][s.sigma][s.image] = 0.0 if np.isnan(s.psnr) else s.psnr
    in_order = lambda images: np.array([images[i] for i in sorted(images)])
    levels = lambda at: {sigma: in_order(images) for sigma, images in sorted(at.items())}
    return {victim: {setting: levels(at) for setting, at in cells.items()} for victim, cells in victims.items()}


def oracle(cells: Cells, sigma: float, method: str = "") -> Setting:
    """The tuned setting with the highest median at this noise level, of one method or of all."""
    tuned = [setting for setting in cells if setting.strength is not None and method in ("", setting.method)]
    return max(tuned, key=lambda setting: float(np.median(cells[setting][sigma])))


class Gap(NamedTuple):
    """How far an attack's median lies above another's, with its interval over images."""

    victim: str
    sigma: float
    above: Interval


def gaps(victims: dict[str, Cells], method: str) -> dict[str, list[Gap]]:
    """Of an untuned attack to the oracle, to DSG's default, and to the mean image where the prior has one."""
    to: dict[str, list[Gap]] = {"the oracle": [], "dsg": [], MEAN_IMAGE: []}
    for victim, cells in victims.items():
        for sigma, own in cells[Setting(method)].items():
            others = {"the oracle": cells[oracle(cells, sigma)], "dsg": cells[DEFAULT]}
            if Setting(MEAN_IMAGE) in cells:
                others[MEAN_IMAGE] = cells[Setting(MEAN_IMAGE)]
            for name, other in others.items():
                to[name].append(Gap(victim, sigma, paired_difference(own, other[sigma])))
    return to


def table(victims: dict[str, Cells], untuned: Sequence[str]) -> str:
    """Median PSNR, a line a victim and noise level."""
    means = any(Setting(MEAN_IMAGE) in cells for cells in victims.values())
    shown = [*untuned, *([MEAN_IMAGE] if means else [])]
    body = []
    for victim, cells in victims.items():
        for sigma in sorted(cells[DEFAULT]):
            best = [oracle(cells, sigma, method) for method in STRENGTHS]
            chosen = [f"{np.median(cells[setting][sigma]):.1f} ({setting.strength:g})" for setting in best]
            plain = [f"{np.median(at[sigma]):.1f}" for at in (cells[DEFAULT], *(cells[Setting(m)] for m in shown))]
            body.append([victim, f"{sigma:g}", *chosen, *plain])
    return markdown(["victim", "sigma", "DSG tuned (rate)", "DPS tuned (zeta)", f"DSG {DEFAULT.strength:g}", *shown], body)


def gap_table(victims: dict[str, Cells], untuned: Sequence[str]) -> str:
    """Medians' differences in dB with 95 % intervals, a line a victim and noise level."""
    columns = {(m, other): column for m in untuned for other, column in gaps(victims, m).items() if column}
    first = next(iter(columns.values()))
    body = [
        [gap.victim, f"{gap.sigma:g}", *(column[i].above.text() for column in columns.values())] for i, gap in enumerate(first)
    ]
    return markdown(["victim", "sigma", *(f"{m} - {other}" for m, other in columns)], body)


def verdict(victims: dict[str, Cells], untuned: Sequence[str]) -> list[str]:
    """The worst of each attack: how far below the oracle, DSG's default and the mean image it falls, and where."""
    lines = []
    for method in untuned:
        worst = {name: min(column, key=lambda g: g.above.value) for name, column in gaps(victims, method).items() if column}
        parts = [f"{g.above.text()} dB of {name} ({g.victim}, sigma {g.sigma:g})" for name, g in worst.items()]
        lines.append(f"{method} at its worst is within {', '.join(parts)}.")
    return lines


def plot(victims: dict[str, Cells], untuned: Sequence[str], path: Path) -> None:
    """A panel a victim: PSNR over sigma of each tuned setting, thin, and of the untuned attacks."""
    columns = 2 if len(victims) in (2, 4) else min(3, len(victims))
    rows = -(-len(victims) // columns)
    figure = Figure(figsize=(4.4 * columns + 1.6, 3.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    strengths = {m: sorted({s.strength or 0 for c in victims.values() for s in c if s.method == m}) for m in STRENGTHS}
    shown: dict[str, Line2D] = {}
    for ax, (victim, cells) in zip(axes.flat, victims.items(), strict=False):
        shown |= _panel(ax, cells, untuned, strengths)
        ax.set_title(victim, fontsize=10)
        ax.grid(alpha=0.25)
    for ax in axes.flat[len(victims) :]:
        ax.set_visible(False)
    figure.supxlabel("sigma: standard deviation of the noise", fontsize=10)
    figure.supylabel("PSNR (dB), median over images", fontsize=10)
    figure.legend(handles=list(shown.values()), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _panel(ax: Axes, cells: Cells, untuned: Sequence[str], strengths: dict[str, list[float]]) -> dict[str, Line2D]:
    """Draws a victim's lines; returns them by title. A tuned setting is the darker the stronger it is, alike in all panels."""
    styles, shown = {"dsg": ("Blues", "-"), "dps": ("Oranges", ":")}, {}
    for setting, at in sorted(cells.items(), key=lambda cell: (cell[0].strength is None, *cell[0])):
        sigmas = sorted(at)
        draw = functools.partial(ax.plot, range(len(sigmas)), [np.median(at[s]) for s in sigmas], label=setting.title)
        if setting.strength is not None:
            name, dashes = styles[setting.method]
            alike = strengths[setting.method]
            colour = matplotlib.colormaps[name](0.35 + 0.6 * alike.index(setting.strength) / len(alike))
            (shown[setting.title],) = draw(ls=dashes, color=colour, lw=1.2)
        elif setting.method == MEAN_IMAGE:
            (shown[setting.title],) = draw(ls="--", color="0.35", lw=1)
        elif setting.method in untuned:
            (shown[setting.title],) = draw(marker="o", color=COLOURS[setting.method], lw=2, ms=5)
        ax.set_xticks(range(len(sigmas)), [f"{s:g}" for s in sigmas])
    return shown


def summary(victims: dict[str, Cells], untuned: Sequence[str]) -> str:
    """The two tables and what they come to, from the scores alone."""
    return "\n\n".join(
        [
            "Median PSNR in dB over images; each untuned attack has one setting over all of it:",
            table(victims, untuned),
            "How far the medians lie above the best tuned setting of DSG and DPS at that noise (chosen by the truth), above "
            "DSG with its default rate, and above the mean image; paired bootstrap over images, 95 %:",
            gap_table(victims, untuned),
            *verdict(victims, untuned),
        ]
    )
