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

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments import report
from experiments.cli import ConfigError
from experiments.inputs import SweepConfig
from experiments.methods import METHODS
from gdiff_jax.auditing.intervals import Interval, paired_difference

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


DEFAULT = Setting("dsg", SweepConfig().guidance_rate)
Cells = dict[Setting, dict[float, np.ndarray]]  # of one victim: PSNR by image, at each sigma


def write_csv(found: Sequence[Score]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(Score._fields)
    lines.writerows(["" if v is None or v != v else v for v in score] for score in found)
    return text.getvalue()


def read_csv(path: Path) -> list[Score]:
    """The scores of a trials.csv; ConfigError where it is none."""
    number = lambda text: float(text) if text else float("nan")
    try:
        with path.open() as file:
            lines = list(csv.DictReader(file))
        return [
            Score(r["prior"], r["victim"], r["method"], float(r["strength"]) if r["strength"] else None, float(r["sigma"]),
                  int(r["image"]), *(number(r[k]) for k in ("psnr", "ssim", "seconds")))
            for r in lines
        ]  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--trials {path} is no trials.csv of this study: {error!r}") from None


def check_complete(found: Sequence[Score]) -> None:
    """ConfigError unless each victim has every untuned attack and the default of DSG, on the same images and noise levels."""
    trials: dict[str, dict[Setting, list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
    for s in found:
        trials[_title(s)][Setting(s.method, s.strength)].append((s.sigma, s.image))
    needed = {of for own in trials.values() for of in own if of.strength is None and of.method != MEAN_IMAGE}
    if not needed:
        raise ConfigError("--trials hold no attack with one setting, which the tables are about")
    for victim, own in trials.items():
        if missing := sorted(of.title for of in needed | {DEFAULT} if of not in own):
            raise ConfigError(f"--trials: {victim} lacks {', '.join(missing)}, which the table compares")
        if odd := sorted(of.title for of, where in own.items() if sorted(where) != sorted(set(own[DEFAULT]))):
            raise ConfigError(f"--trials: {victim} has other noise levels or images for {', '.join(odd)}, or has them twice")


def _title(s: Score) -> str:
    return f"{s.victim}, {s.prior}"


def by_victim(found: Sequence[Score]) -> dict[str, Cells]:
    """By victim and prior. A failed trial counts as 0 dB, less than noise: it recovered nothing."""
    cells: dict[str, dict[Setting, dict[float, dict[int, float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for s in found:
        cells[_title(s)][Setting(s.method, s.strength)][s.sigma][s.image] = 0.0 if np.isnan(s.psnr) else s.psnr
    in_order = lambda images: np.array([images[i] for i in sorted(images)])
    return {v: {of: {s: in_order(i) for s, i in sorted(at.items())} for of, at in c.items()} for v, c in cells.items()}


def oracle(cells: Cells, sigma: float, method: str = "") -> Setting:
    """The tuned setting with the highest median at this noise level, of one method or of all."""
    tuned = [of for of in cells if of.strength is not None and method in ("", of.method)]
    return max(tuned, key=lambda of: float(np.median(cells[of][sigma])))


class Gap(NamedTuple):
    """How far an attack's median lies above another's, with its interval over images."""

    victim: str
    sigma: float
    above: Interval


def gaps(victims: dict[str, Cells], method: str) -> dict[str, list[Gap]]:
    """Of an untuned attack to the oracle, to DSG's default, and to the mean image where the prior has one."""
    found: dict[str, list[Gap]] = {"the oracle": [], "dsg": [], MEAN_IMAGE: []}
    for victim, cells in victims.items():
        for sigma, own in cells[Setting(method)].items():
            others = {"the oracle": cells[oracle(cells, sigma)], "dsg": cells[DEFAULT]}
            if Setting(MEAN_IMAGE) in cells:
                others[MEAN_IMAGE] = cells[Setting(MEAN_IMAGE)]
            for name, other in others.items():
                found[name].append(Gap(victim, sigma, paired_difference(own, other[sigma])))
    return found


def table(victims: dict[str, Cells], untuned: Sequence[str]) -> str:
    """Median PSNR, a line a victim and noise level."""
    means = any(Setting(MEAN_IMAGE) in cells for cells in victims.values())
    shown = [*untuned, *([MEAN_IMAGE] if means else [])]
    body = []
    for victim, cells in victims.items():
        for sigma in sorted(cells[DEFAULT]):
            best = [oracle(cells, sigma, method) for method in STRENGTHS]
            chosen = [f"{np.median(cells[of][sigma]):.1f} ({of.strength:g})" for of in best]
            plain = [f"{np.median(at[sigma]):.1f}" for at in (cells[DEFAULT], *(cells[Setting(m)] for m in shown))]
            body.append([victim, f"{sigma:g}", *chosen, *plain])
    return report.markdown(
        ["victim", "sigma", "DSG tuned (rate)", "DPS tuned (zeta)", f"DSG {DEFAULT.strength:g}", *shown], body
    )


def gap_table(victims: dict[str, Cells], untuned: Sequence[str]) -> str:
    """Medians' differences in dB with 95 % intervals, a line a victim and noise level."""
    columns = {(m, other): g for m in untuned for other, g in gaps(victims, m).items() if g}
    first = next(iter(columns.values()))
    body = [[gap.victim, f"{gap.sigma:g}", *(g[i].above.text() for g in columns.values())] for i, gap in enumerate(first)]
    return report.markdown(["victim", "sigma", *(f"{m} - {other}" for m, other in columns)], body)


def verdict(victims: dict[str, Cells], untuned: Sequence[str]) -> list[str]:
    """The worst of each attack: how far below the oracle, DSG's default and the mean image it falls, and where."""
    lines = []
    for method in untuned:
        worst = {name: min(found, key=lambda g: g.above.value) for name, found in gaps(victims, method).items() if found}
        parts = [f"{g.above.text()} dB of {name} ({g.victim}, sigma {g.sigma:g})" for name, g in worst.items()]
        lines.append(f"{method} at its worst is within {', '.join(parts)}.")
    return lines


def plot(victims: dict[str, Cells], untuned: Sequence[str], path: Path) -> None:
    """A panel a victim: PSNR over sigma of each tuned setting, thin, and of the untuned attacks."""
    columns = 2 if len(victims) in (2, 4) else min(3, len(victims))
    rows = -(-len(victims) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(4.4 * columns + 1.6, 3.8 * rows), squeeze=False, layout="constrained")
    styles = {"dsg": ("Blues", "-"), "dps": ("Oranges", ":")}  # the stronger, the darker, alike in all panels
    strengths = {m: sorted({of.strength or 0 for c in victims.values() for of in c if of.method == m}) for m in styles}
    shown = {}
    for ax, (victim, cells) in zip(axes.flat, victims.items(), strict=False):
        for of, at in sorted(cells.items(), key=lambda cell: (cell[0].strength is None, *cell[0])):
            sigmas = sorted(at)
            medians = [np.median(at[s]) for s in sigmas]
            draw = functools.partial(ax.plot, range(len(sigmas)), medians, label=of.title)
            if of.strength is not None:
                name, line = styles[of.method]
                alike = strengths[of.method]
                colour = matplotlib.colormaps[name](0.35 + 0.6 * alike.index(of.strength) / len(alike))
                (shown[of.title],) = draw(ls=line, color=colour, lw=1.2)
            elif of.method == MEAN_IMAGE:
                (shown[of.title],) = draw(ls="--", color="0.35", lw=1)
            elif of.method in untuned:
                (shown[of.title],) = draw(marker="o", color=METHODS[of.method].colour, lw=2, ms=5)
        ax.set_xticks(range(len(sigmas)), [f"{s:g}" for s in sigmas])
        ax.set_title(victim, fontsize=10)
        ax.grid(alpha=0.25)
    for ax in axes.flat[len(victims) :]:
        ax.set_visible(False)
    fig.supxlabel("sigma: standard deviation of the noise", fontsize=10)
    fig.supylabel("PSNR (dB), median over images", fontsize=10)
    fig.legend(handles=list(shown.values()), loc="outside right upper", fontsize=8, frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


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
