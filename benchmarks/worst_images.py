"""Which measure tells, without an attack, the images that leak most? Rank correlations with what `auto` makes of each image.

    for v in mlp cnn lenet; do
      python experiments/train_victim.py --victim=$v --data=CIFAR10 --steps=100,1000 --out=runs/victims
    done
    python benchmarks/worst_images.py --checkpoints=runs/victims --out=runs/worst

The sweep leaves its folder in OUT/sweep, the measures of each victim are a file in OUT/measures, and OUT holds summary.md.
Killed, the same command goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr
from tqdm import tqdm

from gdiff_jax import numerics, options, parallel
from gdiff_jax.commands import flags
from gdiff_jax.files import write_atomic
from gdiff_jax.matching import l2, victim_gradient
from gdiff_jax.options import option
from gdiff_jax.sweeping import inputs, tables
from gdiff_jax.sweeping.config import Attacks, Noise, PrivateImages, Run, SweepConfig, Victims, check_list
from gdiff_jax.sweeping.plan import Plan, VictimState
from gdiff_jax.sweeping.records import Row, Store
from gdiff_jax.sweeping.sweep import sweep
from gdiff_jax.theory import expected, jacobian, spectrum

Measures = dict[str, Any]  # by name (images,), or (images, sigmas) of what depends on the noise
PROBES, STEPS = 4, 48  # of Lanczos, for all that is read off the spectrum
EXPECTED = "expected PSNR"


@dataclasses.dataclass(frozen=True)
class WorstConfig:
    victims: tuple[str, ...] = option(("mlp", "cnn", "lenet"), "attacked networks, without BatchNorm")
    training_steps: tuple[int, ...] = option((0, 100, 1000), "their training states; all but 0 from --checkpoints")
    checkpoints: str = option("", "folder of experiments/train_victim.py")
    sigma_grid: tuple[float, ...] = option((0.01, 0.1), "standard deviations > 0 of the Gaussian noise", bare=(0.01, 0.1))
    private: PrivateImages = PrivateImages(num_images=24)
    whole: int = option(0, "images, the first ones, of which the whole J^T J is computed for lambda_min; half a minute each")
    seed: int = option(0, "of the untrained weights and of all random numbers")
    out: str = option("runs/worst", "output folder")

    def check(self) -> None:
        check_list("sigma_grid", self.sigma_grid)

    def sweep(self) -> SweepConfig:
        return SweepConfig(
            noise=Noise(self.sigma_grid),
            victims=Victims(self.victims, self.training_steps, self.checkpoints),
            private=self.private,
            attacks=Attacks(methods=("auto",)),
            run=Run(seed=self.seed, seeds=1, out=str(Path(self.out) / "sweep")),
        )


def measures_of(config: WorstConfig, plan: Plan, state: VictimState) -> Measures:
    """Of each image of the plan, at one victim."""
    loss, prior, key = plan.victims[state.name].loss, plan.prior, numerics.key(config.seed)

    def measure(params: Any, denoise: Any, image: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        matvec = lambda v: jacobian.gram_vector(loss, params, image, label, v.reshape(image.shape)).ravel()
        k_starts, k_expected = jax.random.split(key)
        starts = jax.random.rademacher(k_starts, (PROBES, image.size), image.dtype)
        ritz = jax.lax.map(lambda start: spectrum.lanczos(matvec, start, STEPS), starts)
        values = jnp.maximum(ritz.values, 0)
        trace = image.size * (ritz.weights * values).sum(1).mean()
        safe = jnp.where(values > 0, values, 1.0)
        entropy = image.size * (ritz.weights * values * jnp.log(safe)).sum(1).mean()
        gradient = victim_gradient(loss, params, image, label)
        sigmas = sorted(config.sigma_grid)
        told = lambda sigma: expected.expected_psnr(
            k_expected, loss, params, image, label, sigma, denoise, plan.schedule, prior.expected_image, clip=prior.clip
        )
        return {
            "norm of the gradient": l2(gradient, jax.tree.map(jnp.zeros_like, gradient)),
            "norm of J": jnp.sqrt(trace),
            "lambda_max": values.max(),
            "I2F / sigma (least first)": -jnp.sqrt(trace) / values.max(),
            "effective rank": jnp.exp(jnp.log(trace) - entropy / trace),
            "share that noise leaves to be seen": jnp.stack([1 - expected.hidden_share(ritz, s) for s in sigmas]),
            EXPECTED: told(np.array(sigmas, np.float32)),
        }  # fmt: skip

    run, params = jax.jit(measure), plan.params[state]
    rows = [jax.device_get(run(params, prior.denoise, x, y)) for x, y in zip(plan.images, plan.labels, strict=True)]
    found = {name: np.stack([row[name] for row in rows]).astype(float).tolist() for name in rows[0]}
    smallest = jax.jit(lambda params, x, y: jnp.linalg.eigvalsh(jacobian.gram(loss, params, x, y))[0])
    whole = [float(smallest(params, x, y)) for x, y in tqdm(list(zip(plan.images, plan.labels, strict=True))[: config.whole])]
    return {**found, **({"lambda_min": whole} if whole else {})}


def smoothness(images: np.ndarray) -> np.ndarray:
    """Minus the mean difference of neighbouring pixels: what the picture is by itself, whatever leaks of it."""
    return -np.array([np.abs(np.diff(x, axis=0)).mean() + np.abs(np.diff(x, axis=1)).mean() for x in images])


def table(config: WorstConfig, plan: Plan, rows: list[Row], measured: dict[VictimState, Measures]) -> str:
    """A line a victim and noise level: the rank correlation of each measure with the PSNR of `auto`, over the images."""
    cells, sigmas = tables.by_cell(rows), sorted(config.sigma_grid)
    names = sorted({name for measures in measured.values() for name in measures}, key=lambda n: (n != EXPECTED, n))
    head = ["victim", "trained", "sigma", "measured dB, median", "expected less measured", *names, "smoothness of the picture"]
    body, correlations = [], []
    for state, measures in measured.items():
        every = {**measures, head[-1]: smoothness(plan.images)}
        for k, sigma in enumerate(sigmas):
            found = {r["image"]: r["psnr"] for r in cells[state.name, state.training_steps, "gaussian", "auto", sigma]}
            psnr = np.array([found[i] for i in range(len(plan.images))])
            line = [_correlation(np.array(every[name]), k, psnr) if name in every else np.nan for name in head[5:]]
            less = np.median(np.array(measures[EXPECTED])[:, k] - psnr)
            told = [state.name, str(state.training_steps or "no"), f"{sigma:g}", f"{np.median(psnr):.1f}", f"{less:+.1f}"]
            body.append([*told, *[f"{v:.2f}" for v in line]])
            correlations.append(line)
    for name, of in (("mean", np.nanmean), ("least", np.nanmin)):
        body.append([name, "", "", "", "", *[f"{of(column):.2f}" for column in np.array(correlations).T]])
    return tables.markdown(head, body)


def _correlation(values: np.ndarray, k: int, psnr: np.ndarray) -> float:
    """Of ranks, over the images that were measured; `k` is the noise level, of what depends on it."""
    values = values[:, k] if values.ndim > 1 else values
    return float(spearmanr(values, psnr[: len(values)]).statistic) if np.ptp(values) > 0 else np.nan


def main() -> None:
    parallel.use_every_core()
    config = flags.read_flags(WorstConfig())
    config.check()
    plan = inputs.load(config.sweep())
    asked = {k: v for k, v in options.flat(config).items() if k not in ("out", "checkpoints")}
    store = Store(Path(config.out), {**asked, "sha256": plan.identity["sha256"]})
    store.open()
    rows = sweep(config.sweep(), plan, quiet=True)
    folder, measured = store.folder / "measures", {}
    folder.mkdir(exist_ok=True)
    for state in tqdm(plan.params, unit="victim", desc="measures"):
        path = folder / f"{state.name}-{state.training_steps}.json"
        if not path.is_file():
            text = json.dumps(measures_of(config, plan, state))
            write_atomic(path, lambda p, text=text: p.write_text(text + "\n", encoding="utf-8"))
        measured[state] = json.loads(path.read_text(encoding="utf-8"))
    store.write_text("summary.md", table(config, plan, rows, measured) + "\n")
    print((store.folder / "summary.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    flags.define_flags(WorstConfig())
    flags.run(main)
