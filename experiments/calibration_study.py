"""One setting for every noise level, beside DSG and DPS tuned for each of them.

    python experiments/calibration_study.py --out=runs/calibration                       CIFAR-10, untrained victims
    python experiments/calibration_study.py --victims=cnn@100 --checkpoints=FOLDER --out=runs/calibration-trained
    python experiments/calibration_study.py --prior=faces-64 --images=FOLDER --out=runs/calibration-faces
    python experiments/calibration_study.py --trials=A.csv,B.csv --out=runs/all          tables of several studies, at once

The oracle takes, for each victim and noise level, the setting of DSG or DPS whose median PSNR is the highest: it knows the
truth, as no attacker does. Beside it stand the attacks that are run with one setting. A sweep for each victim and setting
(OUT/VICTIM-STEPS/SETTING; killed, it goes on there), then OUT/trials.csv, a table and a figure.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments import attackers, cli, report, sweep
from experiments.cli import ConfigError, option
from experiments.inputs import Inputs, SweepConfig, check_numbers, load_inputs
from experiments.methods import METHODS
from experiments.records import Store
from gdiff_jax import images as image_files
from gdiff_jax import parallel
from gdiff_jax.auditing.intervals import Interval, paired_difference
from gdiff_jax.priors import BUNDLED

STRENGTHS = {"dsg": "guidance_rate", "dps": "zeta"}  # the flag that is tuned for the oracle
MEAN_IMAGE = "mean image"


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    victims: tuple[str, ...] = option(("cnn", "mlp-wide"), "attacked networks, NAME untrained or NAME@STEPS of --checkpoints")
    checkpoints: str = option("", "folder of experiments/train_victim.py, for victims with @STEPS")
    sigma_grid: tuple[float, ...] = option((0.01, 0.1, 0.3, 1.0, 3.0), "standard deviations of the Gaussian noise", bare=True)
    rates: tuple[float, ...] = option((0.05, 0.1, 0.2, 0.4), "guidance rates of dsg that the oracle chooses among")
    zetas: tuple[float, ...] = option((8.0, 16.0, 32.0), "step sizes of dps that the oracle chooses among")
    untuned: tuple[str, ...] = option(
        ("calibrated-dsg", "dsg-mean", "calibrated-mean"), "attacks with their default setting at every noise level"
    )
    images: str = option(image_files.BUNDLED, "private images, as for the sweep")
    num_images: int = option(32, "the first so many are attacked")
    num_classes: int = option(10, "labels are 0 .. num_classes - 1")
    steps: int = option(100, "reverse steps")
    seed: int = option(0, "of the weights and of all random numbers")
    prior: str = option("cifar10-32", f"diffusion prior: {', '.join(BUNDLED)}, a folder or OWNER/NAME, as for the sweep")
    batch: int = option(8, "trials at a time")
    trials: tuple[str, ...] = option((), "trials.csv of finished studies: their table and figure, nothing is run")
    out: str = option("runs/calibration", "output folder")


class Setting(NamedTuple):
    method: str
    strength: float  # nan where the method has its default

    @property
    def title(self) -> str:
        return self.method if np.isnan(self.strength) else f"{self.method}-{self.strength:g}"


class Score(NamedTuple):
    """One trial; a line of trials.csv."""

    prior: str
    victim: str
    method: str
    strength: float
    sigma: float
    image: int
    psnr: float
    ssim: float
    seconds: float


Cells = dict[Setting, dict[float, np.ndarray]]  # of one victim: PSNR by image, at each sigma


def settings(c: CalibrationConfig) -> list[Setting]:
    """DSG with the sweep's default rate is always among them."""
    rates = sorted({*c.rates, SweepConfig().guidance_rate})
    tuned = [Setting(m, s) for m, values in (("dsg", rates), ("dps", sorted(set(c.zetas)))) for s in values]
    return tuned + [Setting(m, float("nan")) for m in c.untuned]


def config_of(c: CalibrationConfig, victim: str, of: Setting) -> SweepConfig:
    name, _, steps = victim.partition("@")
    if steps and not steps.isdecimal():
        raise ConfigError(f"--victims {victim}: after the @ comes a number of training steps, such as {name}@100")
    common = {f.name: getattr(c, f.name) for f in dataclasses.fields(SweepConfig) if hasattr(c, f.name)}
    common |= dict(victims=(name,), training_steps=(int(steps or 0),), methods=(of.method,))
    common |= dict(out=str(Path(c.out) / f"{name}-{steps or 0}" / of.title))
    return SweepConfig(**common) if np.isnan(of.strength) else SweepConfig(**common, **{STRENGTHS[of.method]: of.strength})


def scores(c: CalibrationConfig, inputs: dict[str, Inputs]) -> list[Score]:
    """Runs what is not done yet; `inputs` by victim."""
    found = []
    for victim, of in itertools.product(c.victims, settings(c)):
        config, loaded = config_of(c, victim, of), inputs[victim]
        rows = sweep.run_trials(config, loaded, Store(Path(config.out), sweep.identity(config, loaded)))
        for r in rows:
            if r["method"] == of.method:
                psnr, ssim = (float("nan") if r["failed"] else round(r[k], 3) for k in ("psnr", "ssim"))
                found.append(Score(c.prior, victim, *of, r["sigma"], r["image"], psnr, ssim, r["seconds"]))
    first = next(iter(inputs.values()))
    for victim in c.victims:  # which ignores the leak
        for i, r in enumerate(report.mean_image_rows(first)):
            for sigma in c.sigma_grid:
                found.append(
                    Score(c.prior, victim, MEAN_IMAGE, float("nan"), sigma, i, round(r["psnr"], 3), round(r["ssim"], 3), 0.0)
                )
    return found


def write_csv(found: Sequence[Score]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(Score._fields)
    lines.writerows(["" if v != v else v for v in score] for score in found)
    return text.getvalue()


def read_csv(path: Path) -> list[Score]:
    """The scores of a trials.csv; ConfigError where it is none."""
    number = lambda text: float(text) if text else float("nan")
    try:
        with path.open() as file:
            lines = list(csv.DictReader(file))
        return [
            Score(r["prior"], r["victim"], r["method"], number(r["strength"]), number(r["sigma"]), int(r["image"]),
                  *(number(r[k]) for k in ("psnr", "ssim", "seconds")))
            for r in lines
        ]  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--trials {path} is no trials.csv of this study: {error!r}") from None


def by_victim(found: Sequence[Score]) -> dict[str, Cells]:
    """By victim and prior. A failed trial counts as 0 dB, less than noise: it recovered nothing."""
    cells: dict[str, dict[Setting, dict[float, dict[int, float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    untuned: dict[str, Setting] = {}  # one object a method: nan is not equal to nan
    for s in found:
        of = (
            untuned.setdefault(s.method, Setting(s.method, s.strength))
            if np.isnan(s.strength)
            else Setting(s.method, s.strength)
        )
        cells[f"{s.victim}, {s.prior}"][of][s.sigma][s.image] = 0.0 if np.isnan(s.psnr) else s.psnr
    in_order = lambda images: np.array([images[i] for i in sorted(images)])
    return {v: {of: {s: in_order(i) for s, i in at.items()} for of, at in c.items()} for v, c in cells.items()}


def pick(cells: Cells, method: str, strength: float = float("nan")) -> dict[float, np.ndarray]:
    return next(at for of, at in cells.items() if of.title == Setting(method, strength).title)


def oracle(cells: Cells, sigma: float, method: str = "") -> Setting:
    """The tuned setting with the highest median at this noise level, of one method or of all."""
    tuned = [of for of in cells if of.method in STRENGTHS and not np.isnan(of.strength) and method in ("", of.method)]
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
        for sigma, own in pick(cells, method).items():
            others = {"the oracle": cells[oracle(cells, sigma)], "dsg": pick(cells, "dsg", SweepConfig().guidance_rate)}
            if any(of.method == MEAN_IMAGE for of in cells):
                others[MEAN_IMAGE] = pick(cells, MEAN_IMAGE)
            for name, other in others.items():
                found[name].append(Gap(victim, sigma, paired_difference(own, other[sigma])))
    return found


def table(victims: dict[str, Cells], untuned: Sequence[str]) -> str:
    """Median PSNR, a line a victim and noise level."""
    default = SweepConfig().guidance_rate
    means = any(of.method == MEAN_IMAGE for cells in victims.values() for of in cells)
    shown = [*untuned, *([MEAN_IMAGE] if means else [])]
    body = []
    for victim, cells in victims.items():
        for sigma in sorted(pick(cells, "dsg", default)):
            best = [oracle(cells, sigma, method) for method in STRENGTHS]
            chosen = [f"{np.median(cells[of][sigma]):.1f} ({of.strength:g})" for of in best]
            plain = [f"{np.median(at[sigma]):.1f}" for at in (pick(cells, "dsg", default), *(pick(cells, m) for m in shown))]
            body.append([victim, f"{sigma:g}", *chosen, *plain])
    return report.markdown(["victim", "sigma", "DSG tuned (rate)", "DPS tuned (zeta)", f"DSG {default:g}", *shown], body)


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
    fig, axes = plt.subplots(1, len(victims), figsize=(4.6 * len(victims), 4.2), squeeze=False, layout="constrained")
    styles = {"dsg": ("Blues", "-"), "dps": ("Oranges", ":")}  # the stronger, the darker
    for ax, (victim, cells) in zip(axes[0], victims.items(), strict=True):
        for of, at in cells.items():
            sigmas = sorted(at)
            medians = [np.median(at[s]) for s in sigmas]
            if of.method in STRENGTHS:
                name, line = styles[of.method]
                alike = sorted(other.strength for other in cells if other.method == of.method)
                colour = matplotlib.colormaps[name](0.35 + 0.6 * alike.index(of.strength) / len(alike))
                ax.plot(range(len(sigmas)), medians, line, color=colour, lw=1.2, label=f"{of.method} {of.strength:g}")
            elif of.method == MEAN_IMAGE:
                ax.plot(range(len(sigmas)), medians, "--", color="0.35", lw=1, label=MEAN_IMAGE)
            elif of.method in untuned:
                ax.plot(range(len(sigmas)), medians, "o-", color=METHODS[of.method].colour, lw=2, ms=5, label=of.method)
        ax.set_xticks(range(len(sigmas)), [f"{s:g}" for s in sigmas])
        ax.set_xlabel("sigma: standard deviation of the noise")
        ax.set_title(victim, fontsize=10)
        ax.grid(alpha=0.25)
    axes[0][0].set_ylabel("PSNR (dB), median over images")
    axes[0][-1].legend(fontsize=7.5, frameon=False, ncols=2)
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


def check(c: CalibrationConfig) -> None:
    for name in ("victims", "rates", "zetas", "untuned"):
        values = getattr(c, name)
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"--{name} {','.join(map(str, values))!r} must be non-empty, without repeats")
    for method in c.untuned:
        if method not in METHODS or METHODS[method].dense:
            known = ", ".join(m for m in METHODS if not METHODS[m].dense)
            raise ConfigError(f"--untuned {method!r} is not known; known: {known}")


def write(found: Sequence[Score], c: CalibrationConfig, about: str) -> None:
    victims, folder = by_victim(found), Path(c.out)
    untuned = tuple(dict.fromkeys(s.method for s in found if np.isnan(s.strength) and s.method != MEAN_IMAGE))
    text = f"{about}\n\n{summary(victims, untuned)}"
    folder.mkdir(parents=True, exist_ok=True)
    cli.write_atomic(folder / "trials.csv", lambda p: p.write_text(write_csv(found)))
    cli.write_atomic(folder / "summary.md", lambda p: p.write_text(text + "\n"))
    cli.write_atomic(folder / "calibration.png", lambda p: plot(victims, untuned, p))
    print(f"{text}\n\nfigure {folder / 'calibration.png'}, every trial {folder / 'trials.csv'}")


def main() -> None:
    parallel.use_every_core()
    c: CalibrationConfig = cli.read_flags(CalibrationConfig)
    if c.trials:
        if (Path(c.out) / "manifest.json").exists():
            raise ConfigError(f"--out {c.out} is the folder of a study, whose trials.csv --trials would replace; give another")
        write([score for path in c.trials for score in read_csv(Path(path))], c, f"Of {', '.join(c.trials)}.")
        return
    check(c)
    for victim, of in itertools.product(c.victims, settings(c)):
        check_numbers(config_of(c, victim, of))
    inputs = {v: load_inputs(config_of(c, v, settings(c)[0])) for v in c.victims}  # which a setting does not change
    given = {k: v for k, v in dataclasses.asdict(c).items() if k not in ("out", "batch", "checkpoints", "trials")}
    study = Store(Path(c.out), {**given, "sha256": {v: loaded.hashes for v, loaded in inputs.items()}})
    study.open()
    first = config_of(c, c.victims[0], settings(c)[0])
    about = f"{attackers.threat_model(first)} {c.steps} steps, {c.num_images} images, seed {c.seed}, prior {c.prior}."
    write(scores(c, inputs), c, about)


if __name__ == "__main__":
    cli.define_flags(CalibrationConfig)
    cli.run(main)
