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
from gdiff_jax import options, parallel
from gdiff_jax.commands import flags
from gdiff_jax.errors import need
from gdiff_jax.files import write_atomic
from gdiff_jax.methods import METHODS
from gdiff_jax.options import option
from gdiff_jax.sweeping import checks, inputs, tables, words
from gdiff_jax.sweeping.config import Attacks, Noise, PriorOptions, PrivateImages, Run, SweepConfig, Victims, check_list
from gdiff_jax.sweeping.plan import Plan
from gdiff_jax.sweeping.records import Store
from gdiff_jax.sweeping.run import run_trials

SIGMAS = (0.01, 0.1, 0.3, 1.0, 3.0)


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    victims: tuple[str, ...] = option(("cnn", "mlp-wide"), "attacked networks, NAME untrained or NAME@STEPS of --checkpoints")
    checkpoints: str = option("", "folder of experiments/train_victim.py, for victims with @STEPS")
    sigma_grid: tuple[float, ...] = option(SIGMAS, "standard deviations of the Gaussian noise", bare=SIGMAS)
    rates: tuple[float, ...] = option((0.025, 0.05, 0.1, 0.2, 0.4, 0.8), "guidance rates of dsg that the oracle chooses among")
    zetas: tuple[float, ...] = option((8.0, 16.0, 32.0, 64.0), "step sizes of dps that the oracle chooses among")
    untuned: tuple[str, ...] = option(
        ("calibrated-dsg", "calibrated-mean"), "attacks with their default setting at every noise level"
    )
    private: PrivateImages = PrivateImages(num_images=32)
    prior: PriorOptions = PriorOptions()
    seed: int = option(0, "of the weights and of all random numbers")
    batch: int = option(8, "trials at a time")
    trials: tuple[str, ...] = option((), "trials.csv of finished studies: their table and figure, nothing is run")
    out: str = option("runs/calibration", "output folder")

    def check(self) -> None:
        for name in ("victims", "sigma_grid", "rates", "zetas", "untuned"):
            check_list(name, getattr(self, name))
        known = [name for name, method in METHODS.items() if not method.needs_first_dense]
        for name in self.untuned:
            need(name in known, f"--untuned {name!r} is not known; known: {', '.join(known)}")
        for victim, setting in itertools.product(self.victims, self.settings()):
            sweep = self.sweep(victim, setting)
            checks.check(sweep, inputs.parse_mechanisms(sweep.mechanisms))

    def settings(self) -> list[Setting]:
        """DSG with the sweep's default rate is always among them."""
        rates = sorted({*self.rates, Attacks().guidance_rate})
        tuned = [Setting(m, s) for m, values in (("dsg", rates), ("dps", sorted(set(self.zetas)))) for s in values]
        return tuned + [Setting(method) for method in self.untuned]

    def sweep(self, victim: str, setting: Setting) -> SweepConfig:
        """One victim, attacked with one setting."""
        name, _, steps = victim.partition("@")
        need(
            not steps or steps.isdecimal(),
            f"--victims {victim}: after the @ comes a number of training steps, such as {name}@100",
        )
        attacks = Attacks(methods=(setting.method,))
        if setting.strength is not None:
            attacks = options.replace(attacks, **{STRENGTHS[setting.method]: setting.strength})
        folder = Path(self.out) / f"{name}-{steps or 0}" / setting.title
        return SweepConfig(
            noise=Noise(self.sigma_grid),
            victims=Victims((name,), (int(steps or 0),), self.checkpoints),
            private=self.private,
            attacks=attacks,
            prior=self.prior,
            run=Run(seed=self.seed, batch=self.batch, out=str(folder)),
        )


def with_attacks(plan: Plan, attacks: Attacks) -> Plan:
    """The plan with other methods in place of its own, compared alike; nothing is loaded anew."""
    return dataclasses.replace(plan, methods=attacks.make(), identity={**plan.identity, **options.flat(attacks)})


def scores(config: CalibrationConfig, plans: dict[str, Plan]) -> list[Score]:
    """Runs what is not done yet; `plans` by victim."""
    prior, trials = config.prior.prior, []
    for victim, setting in itertools.product(config.victims, config.settings()):
        sweep = config.sweep(victim, setting)
        plan = with_attacks(plans[victim], sweep.attacks)
        for row in run_trials(plan, Store(Path(sweep.run.out), plan.identity, plan.reading), sweep.run.batch):
            if row["method"] == setting.method:
                psnr, ssim = (float("nan") if row["failed"] else round(row[k], 3) for k in ("psnr", "ssim"))
                trials.append(Score(prior, victim, *setting, row["sigma"], row["image"], psnr, ssim, row["seconds"]))
    mean_rows = tables.mean_image_rows(next(iter(plans.values())))
    for victim, (i, row), sigma in itertools.product(config.victims, enumerate(mean_rows), config.sigma_grid):
        psnr, ssim = (round(row[k], 3) for k in ("psnr", "ssim"))  # which ignores the leak
        trials.append(Score(prior, victim, MEAN_IMAGE, None, sigma, i, psnr, ssim, 0.0))
    return trials


def write(trials: Sequence[Score], folder: Path, about: str) -> None:
    """trials.csv, summary.md and the figure."""
    check_complete(trials)
    victims = by_victim(trials)
    untuned = tuple(dict.fromkeys(s.method for s in trials if s.strength is None and s.method != MEAN_IMAGE))
    text = f"{about}\n\n{summary(victims, untuned)}"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "trials.csv", lambda p: p.write_text(write_csv(trials), encoding="utf-8"))
    write_atomic(folder / "summary.md", lambda p: p.write_text(text + "\n", encoding="utf-8"))
    write_atomic(folder / "calibration.png", lambda p: plot(victims, untuned, p))
    print(f"{text}\n\nfigure {folder / 'calibration.png'}, every trial {folder / 'trials.csv'}")


def write_again(config: CalibrationConfig) -> None:
    """Table and figure of finished studies."""
    out = Path(config.out)
    need(
        not (out / "manifest.json").exists(),
        f"--out {config.out} is the folder of a study, whose trials.csv --trials would replace; give another",
    )
    write([score for path in config.trials for score in read_csv(Path(path))], out, f"Of {', '.join(config.trials)}.")


def main() -> None:
    parallel.use_every_core()
    config = flags.read_flags(CalibrationConfig())
    if config.trials:
        write_again(config)
        return
    config.check()
    plans = {victim: inputs.load(config.sweep(victim, config.settings()[0])) for victim in config.victims}
    without_effect = ("out", "batch", "checkpoints", "trials")
    asked = {name: value for name, value in options.flat(config).items() if name not in without_effect}
    hashes = {victim: plan.identity["sha256"] for victim, plan in plans.items()}
    store = Store(Path(config.out), {**asked, "sha256": hashes})
    store.open()
    model, prior = words.threat_model(plans[config.victims[0]]), config.prior
    about = f"{model} {prior.steps} steps, {config.private.num_images} images, seed {config.seed}, prior {prior.prior}."
    write(scores(config, plans), store.folder, about)


if __name__ == "__main__":
    flags.command(main, CalibrationConfig(), text=__doc__)
