"""How far from the limit are the attacks? `auto` beside others over training states and noise, and van Trees' limit.

    for v in mlp cnn; do
      python experiments/train_victim.py --victim=$v --data=CIFAR10 --steps=100,1000 --out=runs/victims
    done
    python benchmarks/limits.py --victims=mlp,cnn --checkpoints=runs/victims --data=CIFAR10 --out=runs/limit

A sweep leaves its folder in OUT/sweep, the limits of each victim are a file in OUT/limits, and OUT holds summary.md and
limits.png. Killed, the same command goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from gdiff_jax import options, parallel
from gdiff_jax.commands import flags
from gdiff_jax.errors import need
from gdiff_jax.files import write_atomic
from gdiff_jax.metrics import psnr_from_error
from gdiff_jax.options import option
from gdiff_jax.sweeping import inputs, tables, words
from gdiff_jax.sweeping.attackers import Attacker
from gdiff_jax.sweeping.config import Attacks, Noise, PriorOptions, PrivateImages, Run, SweepConfig, Victims, check_list
from gdiff_jax.sweeping.plan import PRIOR_ONLY, Plan, VictimState
from gdiff_jax.sweeping.records import Row, Store
from gdiff_jax.sweeping.sweep import sweep
from gdiff_jax.theory.summary import LARGEST_GRAM, exact_spectra, prior_information

SIGMAS = (0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # of training states; Okabe & Ito's
LINES = ("-", ":")  # of the first methods, which are drawn; the table has all
HIGHEST = 60.0  # of the figure, in dB; what is above is drawn at its edge

Limits = dict[VictimState, np.ndarray]  # (limit_images, sigmas > 0) in dB


@dataclasses.dataclass(frozen=True)
class LimitConfig:
    victims: tuple[str, ...] = option(("mlp", "lenet", "cnn"), "attacked networks")
    training_steps: tuple[int, ...] = option((0, 100, 1000), "their training states; all but 0 from --checkpoints")
    checkpoints: str = option("", "folder of experiments/train_victim.py")
    sigma_grid: tuple[float, ...] = option(SIGMAS, "standard deviations of the Gaussian noise", bare=SIGMAS)
    methods: tuple[str, ...] = option(("auto", "dsg"), "attacks, the one that is held against the limit first; two are drawn")
    private: PrivateImages = PrivateImages()
    attacker: Attacker = Attacker("server")
    prior: PriorOptions = PriorOptions()
    seeds: int = option(1, "trials an image")
    data: str = option("", "images like the private ones, whose covariance the limit takes")
    limit_images: int = option(1, "images at which the limit is computed, the first ones; about a minute each and victim")
    seed: int = option(0, "of the untrained weights and of all random numbers")
    batch: int = option(8, "trials at a time")
    out: str = option("runs/limit", "output folder")

    def check(self) -> None:
        need(self.data, "--data is needed: images whose covariance the limit takes, such as CIFAR-10's archive")
        self.attacker.check()
        most = self.private.num_images
        need(1 <= self.limit_images <= most, f"--limit_images {self.limit_images} must lie in 1..{most}, --num_images")
        need(len(self.training_steps) <= len(COLOURS), f"--training_steps: the figure has room for {len(COLOURS)}")
        check_list("sigma_grid", self.sigma_grid)

    def sweep(self) -> SweepConfig:
        return SweepConfig(
            noise=Noise(self.sigma_grid),
            victims=Victims(self.victims, self.training_steps, self.checkpoints),
            private=self.private,
            attacker=self.attacker,
            attacks=Attacks(methods=self.methods),
            prior=self.prior,
            run=Run(seed=self.seed, seeds=self.seeds, batch=self.batch, out=str(Path(self.out) / "sweep")),
        )


def limits_of(config: LimitConfig, plan: Plan, information: np.ndarray, folder: Path) -> Limits:
    """Van Trees' limit of each victim in each state, local to each of the first images; a file each."""
    folder.mkdir(parents=True, exist_ok=True)
    noisy, found = [s for s in sorted(config.sigma_grid) if s > 0], {}
    for k, state in enumerate(tqdm(plan.params, unit="victim", desc="limits")):
        path = folder / f"{k}.json"  # of this study's configuration, as its store has seen to
        if not path.is_file():
            some = plan.images[: config.limit_images], plan.labels[: config.limit_images]
            spectra = exact_spectra(plan.victims[state.name].loss, plan.params[state], *some, noisy, information)
            text = json.dumps([row["van_trees"] for row in spectra])
            write_atomic(path, lambda p, text=text: p.write_text(text + "\n", encoding="utf-8"))
        errors = np.array(json.loads(path.read_text(encoding="utf-8"))) / plan.images[0].size
        found[state] = np.asarray(psnr_from_error(errors))
    return found


def distance_table(config: LimitConfig, rows: list[Row], limits: Limits) -> str:
    """A line for each victim and state: median PSNR of each method; the limit at the first images and, of the same, the
    median of how far the first method stays below it.
    """
    sigmas, cells, body = sorted(config.sigma_grid), tables.by_cell(rows), []
    for state, limit in limits.items():
        who = [state.name, str(state.training_steps or "no")]
        of = lambda method, sigma, state=state: _cell(cells, state, method, sigma)
        for method in config.methods:
            medians = [tables.quartiles(of(method, sigma), "psnr")[0] for sigma in sigmas]
            body.append([*who, method, *[_number(median) for median in medians]])
        ends = iter(limit.T)
        at_limit = [next(ends) if sigma > 0 else None for sigma in sigmas]
        body.append([*who, "limit", *["-" if end is None else _number(np.median(end)) for end in at_limit]])
        short = []
        for sigma, end in zip(sigmas, at_limit, strict=True):
            fine = [row for row in of(config.methods[0], sigma) if not row["failed"] and row["image"] < config.limit_images]
            below = [] if end is None else [end[row["image"]] - row["psnr"] for row in fine]
            short.append(_number(np.median(below)) if below else "-")
        body.append([*who, f"limit less {config.methods[0]}", *short])
    return tables.markdown(["victim", "trained", "PSNR dB", *[f"sigma {sigma:g}" for sigma in sigmas]], body)


def _cell(cells: dict[tables.Cell, list[Row]], state: VictimState, method: str, sigma: float) -> list[Row]:
    """No trials where the method does not fit the victim."""
    return cells.get((state.name, state.training_steps, "gaussian", method, sigma), [])


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.1f}"


def plot(config: LimitConfig, rows: list[Row], limits: Limits, baselines: dict[str, float], path: Path) -> None:
    """A panel a victim: a colour a training state, a line style a method, dashed van Trees' limit."""
    figure = Figure(figsize=(max(3.3 * len(config.victims), 6.6) + 0.4, 4.0), layout="constrained")
    axes = figure.subplots(1, len(config.victims), squeeze=False, sharey=True)[0]
    for ax, victim in zip(axes, config.victims, strict=True):
        _panel(config, ax, rows, {state: limit for state, limit in limits.items() if state.name == victim})
        for name, style in zip(baselines, ((0, (1, 1)), (0, (4, 2, 1, 2))), strict=False):
            ax.axhline(baselines[name], color="0.55", lw=1, ls=style, label=name)
        ax.set_title(victim, fontsize=10)
    axes[0].set_ylabel(f"median PSNR (dB), up to {HIGHEST:g}", fontsize=9)
    axes[0].set_ylim(5, HIGHEST + 1)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    write_atomic(path, lambda p: figure.savefig(p, dpi=130))


def _panel(config: LimitConfig, ax: Axes, rows: list[Row], limits: Limits) -> None:
    sigmas, cells = sorted(config.sigma_grid), tables.by_cell(rows)
    for colour, (state, limit) in zip(COLOURS, limits.items(), strict=False):
        trained = f"after {state.training_steps} steps" if state.training_steps else "untrained"
        for line, method in zip(LINES, config.methods, strict=False):
            of = [_cell(cells, state, method, sigma) for sigma in sigmas]
            medians = np.array([tables.quartiles(cell, "psnr")[0] for cell in of])
            width = 2.0 if method == config.methods[0] else 1.1
            ax.plot(np.minimum(medians, HIGHEST), line, color=colour, lw=width, label=f"{method}, {trained}")
        x = np.flatnonzero(np.array(sigmas) > 0)
        ax.plot(x, np.minimum(np.median(limit, 0), HIGHEST), "--", color=colour, lw=1, label=f"limit, {trained}")
    ax.set_xticks(range(len(sigmas)), [f"{sigma:g}" for sigma in sigmas], rotation=45, fontsize=8)
    ax.set_xlabel("sigma: standard deviation of the noise", fontsize=9)
    ax.grid(alpha=0.25)


def write(config: LimitConfig, plan: Plan, rows: list[Row], limits: Limits, store: Store) -> None:
    """summary.md and the figure."""
    median = lambda some: tables.quartiles(some, "psnr")[0]
    baselines = {"prior only": median([row for row in rows if row["method"] == PRIOR_ONLY])}
    if mean_rows := tables.mean_image_rows(plan):
        baselines["mean image"] = median(mean_rows)
    told = ", ".join(f"{name} {value:.1f} dB" for name, value in baselines.items())
    parts = [
        f"{words.threat_model(plan)} {config.private.num_images} images, {config.seeds} trials each; {told}.",
        f"Median PSNR. Van Trees' limit is local to each image, here 0 to {config.limit_images - 1}, and of an attacker who "
        "knows mean and covariance of the images: a better prior may go beyond it.",
        distance_table(config, rows, limits),
    ]
    store.write_text("summary.md", "\n\n".join(parts) + "\n")
    plot(config, rows, limits, baselines, store.folder / "limits.png")
    print("\n\n".join([*parts, f"figure {store.folder / 'limits.png'}"]))


def main() -> None:
    parallel.use_every_core()
    config = flags.read_flags(LimitConfig())
    config.check()
    plan = inputs.load(config.sweep())
    with_norm = [name for name, victim in plan.victims.items() if victim.has_batch_norm]
    need(not with_norm, f"--victims {','.join(with_norm)}: the limit is of a gradient of one image, and BatchNorm sees a batch")
    size = plan.images[0].size
    need(size <= LARGEST_GRAM, f"images of {size} numbers are too large for the limit, which takes up to {LARGEST_GRAM}")
    data = inputs.read_images("data", config.data, "train", config.prior.prior, plan.prior.image_shape)
    inputs.tell(config.data, data)
    asked: dict[str, Any] = {k: v for k, v in options.flat(config).items() if k not in ("out", "checkpoints", "batch")}
    store = Store(Path(config.out), {**asked, "sha256": plan.identity["sha256"], "data": data.sha256})
    store.open()
    rows = sweep(config.sweep(), plan, quiet=True)
    write(config, plan, rows, limits_of(config, plan, prior_information(data.images), store.folder / "limits"), store)


if __name__ == "__main__":
    flags.command(main, LimitConfig(), text=__doc__)
