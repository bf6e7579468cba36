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
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import gdiff_jax as gd
from experiments import attackers, cli, mechanism_specs, report, sweep
from experiments.cli import ConfigError, option
from experiments.inputs import Inputs, SweepConfig, load_inputs
from experiments.records import Row, Store
from gdiff_jax import images as image_files
from gdiff_jax import parallel
from gdiff_jax.priors import BUNDLED

NOISES = tuple(mechanism_specs.NOISES)
DEFENCES = (
    "none", "topk:0.3", "topk:0.1", "topk:0.01", "random:0.3", "random:0.1", "random:0.01", "sign",
    "qsgd:16", "qsgd:4", "qsgd:1", "soteria:0.3", "soteria:0.7",
)  # fmt: skip
STYLES = {
    "gaussian": ("#0072b2", "o"), "laplace": ("#d55e00", "s"), "uniform": ("#009e73", "^"), "topk": ("#cc79a7", "D"),
    "random": ("#e69f00", "v"), "qsgd": ("#56b4e9", "P"),
    "soteria": ("#8c6d31", "X"), "sign": ("0.25", "*"), "none": ("0.5", "h"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    victims: tuple[str, ...] = option(("cnn",), "attacked networks, untrained")
    sigma_grid: tuple[float, ...] = option((0.01, 0.03, 0.1, 0.3), "standard deviations of the three noises", bare=True)
    defences: tuple[str, ...] = option(DEFENCES, "mechanisms without noise to set beside it, as in the sweep's --mechanisms")
    adaptive: bool = option(True, "the attacker knows the mechanism and matches through it")
    images: str = option(image_files.BUNDLED, "private images, as for the sweep")
    num_images: int = option(4, "the first so many are attacked")
    clients: int = option(32, "images of the same set, one a client, whose mean gradient gives the utility")
    utilities: tuple[float, ...] = option((0.95, 0.9, 0.8, 0.5), "utilities at which the defences are compared")
    num_classes: int = option(10, "labels are 0 .. num_classes - 1")
    steps: int = option(100, "reverse steps of DSG")
    seed: int = option(0, "of the weights and of all random numbers")
    prior: str = option("cifar10-32", f"diffusion prior: {', '.join(BUNDLED)}, a folder or OWNER/NAME, as for the sweep")
    batch: int = option(8, "trials at a time")
    out: str = option("runs/noise_study", "output folder")


def utility(key: jax.Array, spec: mechanism_specs.Spec, victim: gd.Victim, params: Any, images: Any, labels: Any) -> Any:
    """f(sigma): cosine between the mean of the clients' released gradients and the mean of their true ones."""

    @jax.jit
    def at(sigma: jax.Array) -> jax.Array:
        def client(total: Any, a: tuple[jax.Array, ...]) -> tuple[Any, None]:
            k, x, y = a
            k_mask, k_noise = jax.random.split(k)
            gradient = gd.victim_gradient(victim.loss, params, x, y)
            sent = spec.for_image(k_mask, sigma, victim, params, x)(k_noise, gradient)
            return jax.tree.map(jnp.add, total, (gradient, sent)), None

        zeros = jax.tree.map(jnp.zeros_like, (params, params))
        keys = jax.random.split(key, len(images))
        true, sent = jax.lax.scan(client, zeros, (keys, images, labels))[0]
        return 1 - gd.cosine(true, sent)

    return at


def utilities(c: NoiseConfig, inputs: Inputs, clients: tuple[np.ndarray, np.ndarray]) -> dict[tuple[str, str, float], float]:
    """By victim, mechanism and sigma."""
    images, labels = (jnp.asarray(a) for a in clients)
    found = {}
    for name, victim in inputs.victims.items():
        for text, spec in inputs.mechanisms.items():
            at = utility(jax.random.key(c.seed), spec, victim, inputs.params[name, 0], images, labels)
            found.update({(name, text, s): float(at(jnp.float32(s))) for s in inputs.sigmas[text]})
    return found


def equal_variance_table(rows: list[Row]) -> str:
    """PSNR of the three noises at one sigma."""
    cells = report.by_cell(rows)
    sigmas = sorted({key[4] for key in cells if key[2] in NOISES})
    body = []
    for victim in sorted({key[0] for key in cells}):
        for noise in NOISES:
            shown = [report.quartiles(cells[victim, 0, noise, "dsg", s], "psnr") for s in sigmas]
            body.append([victim, noise, *[f"{m:.1f} [{lo:.1f}, {hi:.1f}]" for m, lo, hi in shown]])
    return report.markdown(["victim", "noise", *[f"sigma {s:g}" for s in sigmas]], body)


def curves(rows: list[Row], found: dict[tuple[str, str, float], float], victim: str) -> Iterator[tuple[str, list[Any]]]:
    """For each kind of defence its points (utility, median PSNR, what), least useful first."""
    cells = report.by_cell(rows)
    kinds: dict[str, list[Any]] = {}
    for (name, _, mechanism, _, sigma), cell in cells.items():
        if name == victim:
            what = f"{mechanism}, sigma {sigma:g}" if mechanism in NOISES else mechanism
            point = (found[name, mechanism, sigma], report.quartiles(cell, "psnr")[0], what)
            kinds.setdefault(mechanism.partition(":")[0], []).append(point)
    for kind, points in kinds.items():
        yield kind, sorted(points)


def equal_utility_table(c: NoiseConfig, rows: list[Row], found: dict[tuple[str, str, float], float]) -> str:
    """Median PSNR interpolated at each utility; only between measured strengths. `none` stands for strength 0 of each."""
    body = []
    for victim in c.victims:
        by_kind = dict(curves(rows, found, victim))
        undefended = by_kind.pop("none", [])
        for kind, points in by_kind.items():
            if ":" not in points[0][2] and kind not in NOISES:
                continue  # without a strength there is nothing to interpolate
            x, y = (np.array(v) for v in zip(*[p[:2] for p in sorted(points + undefended)], strict=True))
            inside = lambda u, x=x: x[0] <= u <= x[-1]
            line = [f"{np.interp(u, x, y):.1f}" if inside(u) and len(x) > 1 else "-" for u in c.utilities]
            body.append([victim, kind, *line])
    return report.markdown(["victim", "defence", *[f"utility {u:g}" for u in c.utilities]], body)


def points_table(c: NoiseConfig, rows: list[Row], found: dict[tuple[str, str, float], float]) -> str:
    """Every point: what was done, its utility, what came back."""
    body = []
    for victim in c.victims:
        for _, points in curves(rows, found, victim):
            body += [[victim, what, f"{u:.3f}", f"{psnr:.1f}"] for u, psnr, what in points]
    return report.markdown(["victim", "defence", "utility", "median PSNR dB"], body)


def plot(c: NoiseConfig, rows: list[Row], found: dict[tuple[str, str, float], float], prior_psnr: float, path: Path) -> None:
    """A line a victim: PSNR over sigma for three noises, and PSNR over utility for every defence."""
    fig, axes = plt.subplots(len(c.victims), 2, figsize=(10, 3.7 * len(c.victims)), squeeze=False, layout="constrained")
    cells = report.by_cell(rows)
    for line, victim in zip(axes, c.victims, strict=True):
        for noise in NOISES:
            sigmas = sorted(key[4] for key in cells if key[0] == victim and key[2] == noise)
            middle, low, high = np.array([report.quartiles(cells[victim, 0, noise, "dsg", s], "psnr") for s in sigmas]).T
            colour, marker = STYLES[noise]
            line[0].plot(range(len(sigmas)), middle, marker=marker, color=colour, label=noise)
            line[0].fill_between(range(len(sigmas)), low, high, color=colour, alpha=0.12, lw=0)
            line[0].set_xticks(range(len(sigmas)), [f"{s:g}" for s in sigmas])
        line[0].set_xlabel("sigma: standard deviation of the noise")
        line[0].set_ylabel(f"{victim}: PSNR (dB), median and quartiles")
        for kind, points in curves(rows, found, victim):
            colour, marker = STYLES.get(kind, ("0.3", "."))
            line[1].plot([p[0] for p in points], [p[1] for p in points], marker=marker, color=colour, label=kind, lw=1.2)
        line[1].set_xlabel(f"utility: cosine of the mean gradient of {c.clients} clients")
        for ax in line:
            ax.axhline(prior_psnr, color="0.35", ls="--", lw=1, label="prior only")
            ax.grid(alpha=0.25)
            ax.legend(fontsize=8, frameon=False, ncols=2)
    cli.write_atomic(path, lambda p: fig.savefig(p, dpi=130))
    plt.close(fig)


def main() -> None:
    parallel.use_every_core()
    c: NoiseConfig = cli.read_flags(NoiseConfig)
    for text in c.defences:
        if mechanism_specs.parse(text).noisy:
            raise ConfigError(f"--defences {text} adds noise; the three noises are always there, at --sigma_grid")
    if c.clients < 1:
        raise ConfigError(f"--clients {c.clients} must be at least 1")
    common = {f.name: getattr(c, f.name) for f in dataclasses.fields(SweepConfig) if hasattr(c, f.name)}
    common |= dict(methods=("dsg",), mechanisms=(*NOISES, *c.defences), out=str(Path(c.out) / "sweep"))
    config = SweepConfig(**common)
    inputs = load_inputs(config)
    clients = load_inputs(dataclasses.replace(config, num_images=c.clients))  # checks as many images and labels
    given = {k: v for k, v in dataclasses.asdict(c).items() if k not in ("out", "batch")}
    study = Store(Path(c.out), {**given, "sha256": inputs.hashes})
    store = Store(Path(config.out), sweep.identity(config, inputs))
    study.open()
    rows = sweep.sweep(config, inputs, store, quiet=True)
    found = utilities(c, inputs, (clients.images, clients.labels))
    prior_psnr = report.quartiles([r for r in rows if r["method"] == "prior-only"], "psnr")[0]
    parts = [
        f"{attackers.threat_model(config)} DSG, {c.steps} steps, {c.num_images} images, prior only {prior_psnr:.1f} dB.",
        "Equal variance: PSNR in dB, median [quartiles] over images. The attacker matches by L2, which uses no more of a "
        "noise than its variance:",
        equal_variance_table(rows),
        f"Equal utility (cosine of the mean gradient of {c.clients} clients): median PSNR in dB, interpolated between the "
        "measured strengths; '-' is outside of them. Lower is the better defence:",
        equal_utility_table(c, rows, found),
        "Every point:",
        points_table(c, rows, found),
    ]
    study.write_text("summary.md", "\n\n".join(parts) + "\n")
    numbers = [{"victim": v, "mechanism": m, "sigma": s, "utility": u} for (v, m, s), u in found.items()]
    study.write_text("utilities.json", json.dumps(numbers) + "\n")
    plot(c, rows, found, prior_psnr, study.folder / "noise_study.png")
    print("\n\n".join([*parts, f"figure {study.folder / 'noise_study.png'}"]))


if __name__ == "__main__":
    cli.define_flags(NoiseConfig)
    cli.run(main)
