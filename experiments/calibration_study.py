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

import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


from experiments import attackers, cli, report, sweep
from experiments.calibration_report import (
    MEAN_IMAGE,
    STRENGTHS,
    Score,
    Setting,
    by_victim,
    check_complete,
    plot,
    read_csv,
    summary,
    write_csv,
)
from experiments.cli import ConfigError, option
from experiments.inputs import Inputs, SweepConfig, check_numbers, load_inputs
from experiments.methods import METHODS
from experiments.records import Store
from gdiff_jax import images as image_files
from gdiff_jax import parallel
from gdiff_jax.priors import BUNDLED


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    victims: tuple[str, ...] = option(("cnn", "mlp-wide"), "attacked networks, NAME untrained or NAME@STEPS of --checkpoints")
    checkpoints: str = option("", "folder of experiments/train_victim.py, for victims with @STEPS")
    sigma_grid: tuple[float, ...] = option((0.01, 0.1, 0.3, 1.0, 3.0), "standard deviations of the Gaussian noise", bare=True)
    rates: tuple[float, ...] = option((0.025, 0.05, 0.1, 0.2, 0.4, 0.8), "guidance rates of dsg that the oracle chooses among")
    zetas: tuple[float, ...] = option((8.0, 16.0, 32.0, 64.0), "step sizes of dps that the oracle chooses among")
    untuned: tuple[str, ...] = option(
        ("calibrated-dsg", "calibrated-mean"), "attacks with their default setting at every noise level"
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


def settings(c: CalibrationConfig) -> list[Setting]:
    """DSG with the sweep's default rate is always among them."""
    rates = sorted({*c.rates, SweepConfig().guidance_rate})
    tuned = [Setting(m, s) for m, values in (("dsg", rates), ("dps", sorted(set(c.zetas)))) for s in values]
    return tuned + [Setting(m) for m in c.untuned]


def config_of(c: CalibrationConfig, victim: str, of: Setting) -> SweepConfig:
    name, _, steps = victim.partition("@")
    if steps and not steps.isdecimal():
        raise ConfigError(f"--victims {victim}: after the @ comes a number of training steps, such as {name}@100")
    common = {f.name: getattr(c, f.name) for f in dataclasses.fields(SweepConfig) if hasattr(c, f.name)}
    common |= dict(victims=(name,), training_steps=(int(steps or 0),), methods=(of.method,))
    common |= dict(out=str(Path(c.out) / f"{name}-{steps or 0}" / of.title))
    return SweepConfig(**common) if of.strength is None else SweepConfig(**common, **{STRENGTHS[of.method]: of.strength})


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
                found.append(Score(c.prior, victim, MEAN_IMAGE, None, sigma, i, round(r["psnr"], 3), round(r["ssim"], 3), 0.0))
    return found


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
    check_complete(found)
    victims, folder = by_victim(found), Path(c.out)
    untuned = tuple(dict.fromkeys(s.method for s in found if s.strength is None and s.method != MEAN_IMAGE))
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
