"""What the shape of the noise matters, and what other defences buy at equal utility.

    python experiments/noise_study.py --out=runs/noise_study

A sweep of DSG over mechanisms (OUT/sweep), then two tables and a figure: Gaussian, Laplace and uniform noise of equal variance;
and noise beside sparsification, quantisation, signs and pruning at equal *utility*: the cosine between the mean of many
clients' released gradients and the mean of their true ones. It is what an optimiser sees of a round, and costs no
training; zero-mean noise averages out over clients, a biased defence does not [our choice: not the accuracy after
training].
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import gdiff_jax as gd
from gdiff_jax import numerics, options, parallel
from gdiff_jax.commands import flags
from gdiff_jax.errors import ConfigError, need
from gdiff_jax.files import write_atomic
from gdiff_jax.images import to_model
from gdiff_jax.mechanisms import text as mechanism_text
from gdiff_jax.options import option
from gdiff_jax.sweeping import inputs, tables, words
from gdiff_jax.sweeping.attackers import Attacker
from gdiff_jax.sweeping.config import Attacks, Noise, PriorOptions, PrivateImages, Run, SweepConfig, Victims, check_list
from gdiff_jax.sweeping.plan import PRIOR_ONLY, NoisyMechanism, Plan, VictimState
from gdiff_jax.sweeping.records import Row, Store
from gdiff_jax.sweeping.sweep import sweep
from gdiff_jax.victims.own import OwnVictim

NOISES = tuple(mechanism_text.NOISES)
SIGMAS = (0.01, 0.03, 0.1, 0.3)
DEFENCES = (
    "none", "topk:0.3", "topk:0.1", "topk:0.01", "random:0.3", "random:0.1", "random:0.01", "sign",
    "qsgd:16", "qsgd:4", "qsgd:1", "soteria:0.3", "soteria:0.7",
)  # fmt: skip
STYLES = {
    "gaussian": ("#0072b2", "o"), "laplace": ("#d55e00", "s"), "uniform": ("#009e73", "^"), "topk": ("#cc79a7", "D"),
    "random": ("#e69f00", "v"), "qsgd": ("#56b4e9", "P"),
    "soteria": ("#8c6d31", "X"), "sign": ("0.25", "*"), "none": ("0.5", "h"),
}  # fmt: skip

Utilities = dict[tuple[str, str, float], float]  # by victim, mechanism and sigma


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    victims: tuple[str, ...] = option(("cnn",), "attacked networks, untrained")
    sigma_grid: tuple[float, ...] = option(SIGMAS, "standard deviations of the three noises", bare=SIGMAS)
    defences: tuple[str, ...] = option(DEFENCES, "mechanisms without noise to set beside it, as in the sweep's --mechanisms")
    adaptive: bool = option(True, "the attacker knows the mechanism and matches through it")
    clients: int = option(32, "images of the same set, one a client, whose mean gradient gives the utility")
    utilities: tuple[float, ...] = option((0.95, 0.9, 0.8, 0.5), "utilities at which the defences are compared")
    private: PrivateImages = PrivateImages()
    prior: PriorOptions = PriorOptions()
    seed: int = option(0, "of the weights and of all random numbers")
    batch: int = option(8, "trials at a time")
    out: str = option("runs/noise_study", "output folder")

    def check(self) -> None:
        for text in self.defences:
            try:
                noisy = mechanism_text.parse(text).noisy
            except ValueError as error:
                raise ConfigError(f"--defences: {error}") from None
            need(not noisy, f"--defences {text} adds noise; the three noises are always there, at --sigma_grid")
        need(self.clients >= 1, f"--clients {self.clients} must be at least 1")
        check_list("sigma_grid", self.sigma_grid)

    def sweep(self) -> SweepConfig:
        """DSG against the noises and the defences."""
        return SweepConfig(
            mechanisms=(*NOISES, *self.defences),
            noise=Noise(self.sigma_grid),
            victims=Victims(self.victims),
            private=self.private,
            attacker=Attacker(adaptive=self.adaptive),
            attacks=Attacks(methods=("dsg",)),
            prior=self.prior,
            run=Run(seed=self.seed, batch=self.batch, out=str(Path(self.out) / "sweep")),
        )


def utility(
    key: jax.Array, mechanism: NoisyMechanism, victim: gd.Victim | OwnVictim, params: Any, images: Any, labels: Any
) -> Any:
    """f(sigma): cosine between the mean of the clients' released gradients and the mean of their true ones."""

    @jax.jit
    def at(sigma: jax.Array) -> jax.Array:
        def client(total: Any, own: tuple[jax.Array, ...]) -> tuple[Any, None]:
            k, x, y = own
            k_mask, k_noise = jax.random.split(k)
            gradient = gd.victim_gradient(victim.loss, params, x, y)
            sent = mechanism.for_image(k_mask, sigma, victim, params, x)(k_noise, gradient)
            return jax.tree.map(jnp.add, total, (gradient, sent)), None

        zeros = jax.tree.map(jnp.zeros_like, (params, params))
        keys = jax.random.split(key, len(images))
        true, sent = jax.lax.scan(client, zeros, (keys, images, labels))[0]
        return 1 - gd.cosine(true, sent)

    return at


def measure_utilities(seed: int, plan: Plan, images: np.ndarray, labels: Any) -> Utilities:
    """Of each mechanism at each of its noise levels; the images (N, H, W, C) in [-1, 1] are of one client each."""
    key, measured = numerics.key(seed), {}
    x, y = jnp.asarray(images), jnp.asarray(labels)
    for name, victim in plan.victims.items():
        for text, mechanism in plan.mechanisms.items():
            at = utility(key, mechanism, victim, plan.params[VictimState(name, 0)], x, y)
            measured.update({(name, text, sigma): float(at(jnp.float32(sigma))) for sigma in plan.sigmas[text]})
    return measured


def equal_variance_table(rows: list[Row]) -> str:
    """PSNR of the three noises at one sigma."""
    cells = tables.by_cell(rows)
    sigmas = sorted({cell[4] for cell in cells if cell[2] in NOISES})
    body = []
    for victim in sorted({cell[0] for cell in cells}):
        for noise in NOISES:
            shown = [tables.quartiles(cells[victim, 0, noise, "dsg", sigma], "psnr") for sigma in sigmas]
            body.append([victim, noise, *[f"{m:.1f} [{lo:.1f}, {hi:.1f}]" for m, lo, hi in shown]])
    return tables.markdown(["victim", "noise", *[f"sigma {sigma:g}" for sigma in sigmas]], body)


def curves(rows: list[Row], measured: Utilities, victim: str) -> Iterator[tuple[str, list[Any]]]:
    """For each kind of defence its points (utility, median PSNR, what), least useful first."""
    kinds: dict[str, list[Any]] = {}
    for (name, _, mechanism, _, sigma), cell in tables.by_cell(rows).items():
        if name == victim:
            what = f"{mechanism}, sigma {sigma:g}" if mechanism in NOISES else mechanism
            point = (measured[name, mechanism, sigma], tables.quartiles(cell, "psnr")[0], what)
            kinds.setdefault(mechanism.partition(":")[0], []).append(point)
    for kind, points in kinds.items():
        yield kind, sorted(points)


def equal_utility_table(config: NoiseConfig, rows: list[Row], measured: Utilities) -> str:
    """Median PSNR interpolated at each utility; only between measured strengths. `none` stands for strength 0 of each."""
    body = []
    for victim in config.victims:
        by_kind = dict(curves(rows, measured, victim))
        undefended = by_kind.pop("none", [])
        for kind, points in by_kind.items():
            if ":" not in points[0][2] and kind not in NOISES:
                continue  # without a strength there is nothing to interpolate
            x, y = (np.array(v) for v in zip(*[p[:2] for p in sorted(points + undefended)], strict=True))
            inside = lambda u, x=x: x[0] <= u <= x[-1]
            line = [f"{np.interp(u, x, y):.1f}" if inside(u) and len(x) > 1 else "-" for u in config.utilities]
            body.append([victim, kind, *line])
    return tables.markdown(["victim", "defence", *[f"utility {u:g}" for u in config.utilities]], body)


def points_table(config: NoiseConfig, rows: list[Row], measured: Utilities) -> str:
    """Every point: what was done, its utility, what came back."""
    body = []
    for victim in config.victims:
        for _, points in curves(rows, measured, victim):
            body += [[victim, what, f"{u:.3f}", f"{psnr:.1f}"] for u, psnr, what in points]
    return tables.markdown(["victim", "defence", "utility", "median PSNR dB"], body)


def plot(config: NoiseConfig, rows: list[Row], measured: Utilities, prior_psnr: float, path: Path) -> None:
    """A line a victim: PSNR over sigma for three noises, and PSNR over utility for every defence."""
    figure = Figure(figsize=(10, 3.7 * len(config.victims)), layout="constrained")
    axes = figure.subplots(len(config.victims), 2, squeeze=False)
    cells = tables.by_cell(rows)
    for (over_sigma, over_utility), victim in zip(axes, config.victims, strict=True):
        for noise in NOISES:
            sigmas = sorted(cell[4] for cell in cells if cell[0] == victim and cell[2] == noise)
            middle, low, high = np.array([tables.quartiles(cells[victim, 0, noise, "dsg", s], "psnr") for s in sigmas]).T
            colour, marker = STYLES[noise]
            over_sigma.plot(range(len(sigmas)), middle, marker=marker, color=colour, label=noise)
            over_sigma.fill_between(range(len(sigmas)), low, high, color=colour, alpha=0.12, lw=0)
            over_sigma.set_xticks(range(len(sigmas)), [f"{s:g}" for s in sigmas])
        over_sigma.set_xlabel("sigma: standard deviation of the noise")
        over_sigma.set_ylabel(f"{victim}: PSNR (dB), median and quartiles")
        for kind, points in curves(rows, measured, victim):
            colour, marker = STYLES.get(kind, ("0.3", "."))
            x, y = [p[0] for p in points], [p[1] for p in points]
            over_utility.plot(x, y, marker=marker, color=colour, label=kind, lw=1.2)
        over_utility.set_xlabel(f"utility: cosine of the mean gradient of {config.clients} clients")
        for ax in (over_sigma, over_utility):
            ax.axhline(prior_psnr, color="0.35", ls="--", lw=1, label="prior only")
            ax.grid(alpha=0.25)
            ax.legend(fontsize=8, frameon=False, ncols=2)
    write_atomic(path, lambda p: figure.savefig(p, dpi=130))


def write(config: NoiseConfig, plan: Plan, rows: list[Row], measured: Utilities, store: Store) -> None:
    """summary.md, utilities.json and the figure."""
    prior_psnr = tables.quartiles([row for row in rows if row["method"] == PRIOR_ONLY], "psnr")[0]
    parts = [
        f"{words.threat_model(plan)} DSG, {config.prior.steps} steps, {config.private.num_images} images, "
        f"prior only {prior_psnr:.1f} dB.",
        "Equal variance: PSNR in dB, median [quartiles] over images. The attacker matches by L2, which uses no more of a "
        "noise than its variance:",
        equal_variance_table(rows),
        f"Equal utility (cosine of the mean gradient of {config.clients} clients): median PSNR in dB, interpolated between the "
        "measured strengths; '-' is outside of them. Lower is the better defence:",
        equal_utility_table(config, rows, measured),
        "Every point:",
        points_table(config, rows, measured),
    ]
    store.write_text("summary.md", "\n\n".join(parts) + "\n")
    numbers = [{"victim": v, "mechanism": m, "sigma": s, "utility": u} for (v, m, s), u in measured.items()]
    store.write_text("utilities.json", json.dumps(numbers) + "\n")
    plot(config, rows, measured, prior_psnr, store.folder / "noise_study.png")
    print("\n\n".join([*parts, f"figure {store.folder / 'noise_study.png'}"]))


def main() -> None:
    parallel.use_every_core()
    config = flags.read_flags(NoiseConfig())
    config.check()
    plan = inputs.load(config.sweep())
    of_clients = dataclasses.replace(config.private, num_images=config.clients)
    clients = inputs.load_private(of_clients, config.prior.prior, plan.prior.image_shape)
    asked = {name: value for name, value in options.flat(config).items() if name not in ("out", "batch")}
    store = Store(Path(config.out), {**asked, "sha256": plan.identity["sha256"]})
    store.open()
    rows = sweep(config.sweep(), plan, quiet=True)
    write(config, plan, rows, measure_utilities(config.seed, plan, to_model(clients.images), clients.labels), store)


if __name__ == "__main__":
    flags.command(main, NoiseConfig(), text=__doc__)
