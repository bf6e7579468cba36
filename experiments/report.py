"""What a sweep says: a table, a plot of quality over sigma, a contact sheet. Reads records, computes no reconstruction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gdiff_jax as gd
from experiments import attackers, compare
from experiments.cli import write_atomic
from experiments.methods import METHODS
from experiments.records import Row, Store
from experiments.trials import PRIOR_ONLY
from gdiff_jax.images import to_unit

if TYPE_CHECKING:
    from experiments.inputs import Inputs, SweepConfig
    from gdiff_jax.theory.privacy import Guarantee

Key = tuple[str, int, str, str, float]  # victim, training steps, mechanism, method, sigma
METRICS = ("psnr", "ssim", "mse")
EXACT = 60  # dB, where plots end: what is above is the truth to rounding


def by_cell(rows: list[Row]) -> dict[Key, list[Row]]:
    cells: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] != PRIOR_ONLY:
            cells[row["victim"], row["training_steps"], row["mechanism"], row["method"], row["sigma"]].append(row)
    return dict(cells)


def quartiles(rows: list[Row], name: str) -> tuple[float, float, float]:
    """Median and the first and third quartile over the trials that did not fail; nan where there is none."""
    values = [r[name] for r in rows if r.get(name) is not None and not r["failed"]]
    return tuple(np.percentile(values, [50, 25, 75])) if values else (np.nan,) * 3


def choices(rows: list[Row]) -> tuple[float, float]:
    """Median over trials of the PSNR of one iterate chosen among all steps of the trial.

    First the attacker's choice (least distance to the leak), then the oracle's (closest to the truth, which no attacker
    has). Both choose among the same x0hat's, so the second is never below the first.
    """
    attacker, oracle = [], []
    for row in rows:  # a seed is a leak of its own, so nobody can choose among seeds
        if not row["failed"] and row["psnr_at_least_distance"] is not None:
            attacker.append(row["psnr_at_least_distance"])
            oracle.append(row["psnr_of_best_step"])
    return (float(np.median(attacker)), float(np.median(oracle))) if attacker else (np.nan, np.nan)


def mean_image_rows(inputs: Inputs) -> list[Row]:
    """The prior's mean training image as everybody's reconstruction; empty where the prior brings none."""
    mean = inputs.prior.mean_image
    if mean is None:
        return []
    scores = gd.image_metrics(jnp.broadcast_to(mean, inputs.images.shape), jnp.asarray(inputs.images))
    return [{"failed": False, **{k: float(v[i]) for k, v in scores.items()}} for i in range(len(inputs.images))]


def _spread(rows: list[Row], name: str) -> str:
    m, lo, hi = quartiles(rows, name)
    digits = {"psnr": 1, "ssim": 2, "mse": 4}[name]
    return "-" if np.isnan(m) else f"{m:.{digits}f} [{lo:.{digits}f}, {hi:.{digits}f}]"


def table(rows: list[Row], mean_rows: list[Row]) -> str:
    """Median [first, third quartile] over images and seeds, a line for each victim, mechanism, method and sigma."""
    head = [
        "victim",
        "trained",
        "mechanism",
        "method",
        "sigma",
        "trials",
        "PSNR dB",
        "SSIM",
        "MSE",
        "attacker's pick",
        "oracle's pick",
    ]
    body = []
    for (victim, steps, mechanism, method, sigma), cell in sorted(by_cell(rows).items(), key=lambda kv: kv[0]):
        picks = ["-" if np.isnan(p) else f"{p:.1f}" for p in choices(cell)]
        failed = sum(r["failed"] for r in cell)
        count = f"{len(cell)}" + (f" ({failed} failed)" if failed else "")
        spreads = [_spread(cell, name) for name in METRICS]
        body.append([victim, str(steps) if steps else "no", mechanism, method, f"{sigma:.4g}", count, *spreads, *picks])
    for name, base in ((PRIOR_ONLY, [r for r in rows if r["method"] == PRIOR_ONLY]), ("mean image", mean_rows)):
        if base:
            body.append(["-", "-", "-", name, "-", str(len(base)), *[_spread(base, m) for m in METRICS], "-", "-"])
    return markdown(head, body)


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table with columns of even width."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    rule = ["-" * w for w in widths]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in [head, rule, *body]
    )


def guarantee(c: SweepConfig, inputs: Inputs, victim: str, mechanism: str, sigma: float) -> Guarantee:
    """What one release of a gradient of this victim guarantees."""
    size = sum(p.size for p in inputs.params[victim, c.training_steps[0]].values())
    return inputs.mechanisms[mechanism].guarantee(sigma, size, c.delta)


def privacy_table(c: SweepConfig, inputs: Inputs) -> str:
    """What each mechanism guarantees at each of its noise levels, one release of one image's gradient."""
    head = ["mechanism", "victim", "sigma", "epsilon", "delta", "mu", "advantage", "TPR at 1 % FPR", "gamma at kappa 1e-4"]
    body = []
    for text in inputs.mechanisms:
        # The sensitivity of the Laplace mechanism, of signs and of QSGD grows with the number of parameters.
        per_victim = any(name in text for name in ("laplace", "sign", "qsgd"))
        for victim in c.victims if per_victim else c.victims[:1]:
            for sigma in inputs.sigmas[text]:
                g = guarantee(c, inputs, victim, text, sigma)
                line = [text, victim if per_victim else "any", f"{sigma:.4g}"]
                figures = [g.tpr(0.01), g.reconstruction_bound(1e-4)]
                mu = "-" if g.mu is None else f"{g.mu:.4g}"
                if g:
                    epsilon = f"{g.epsilon:.4g}"
                    line += [
                        epsilon,
                        "0 (pure)" if g.pure_epsilon else f"{c.delta:g}",
                        mu,
                        f"{g.advantage:.3g}",
                        *[f"{v:.3g}" for v in figures],
                    ]
                else:
                    line += [str(g), *["-"] * 5]
                body.append(line)
    return markdown(head, body)


def _panels(rows: list[Row]) -> list[tuple[str, int, str]]:
    return sorted({key[:3] for key in by_cell(rows)})


def title(victim: str, steps: int, mechanism: str) -> str:
    noise = "" if mechanism == "gaussian" else f", {mechanism}"
    return f"{victim}, {f'trained {steps} steps' if steps else 'untrained'}{noise}"


def _tick(sigma: float, epsilon: float) -> str:
    return f"{sigma:.3g}" if np.isinf(epsilon) else f"{sigma:.3g}\n(ε {epsilon:.3g})"


def plot_quality(rows: list[Row], mean_rows: list[Row], epsilon: Callable[[str, str, float], float], path: Path) -> None:
    """PSNR and SSIM over sigma: median and interquartile band a method, beside prior-only and the mean image.

    `epsilon(victim, mechanism, sigma)` is written under sigma where it is finite.
    """
    panels, cells = _panels(rows), by_cell(rows)
    names = [n for n in ("psnr", "ssim") if n in rows[0]]
    columns = min(len(panels), 6)
    bands = -(-len(panels) // columns)  # more panels than fit side by side go below
    size = (max(3.4 * columns, 5), 2.9 * len(names) * bands + 0.6)
    fig, axes = plt.subplots(len(names) * bands, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes[-len(names) :].ravel():  # the last band may not be full
        ax.set_visible(False)
    prior = [r for r in rows if r["method"] == PRIOR_ONLY]
    for i, name in enumerate(names):
        for j, panel in enumerate(panels):
            ax = axes[i + len(names) * (j // columns), j % columns]
            ax.set_visible(True)
            if ax is not axes[i, 0]:
                ax.sharey(axes[i, 0])
            here = [key[3:] for key in cells if key[:3] == panel]
            sigmas = sorted({sigma for _, sigma in here})
            x = np.arange(len(sigmas))  # even spacing: the grid is logarithmic and begins with 0
            for method in sorted({method for method, _ in here}):
                found = [quartiles(cells.get((*panel, method, s), []), name) for s in sigmas]
                middle, low, high = np.array(found).T
                ax.plot(x, middle, "o-", color=METHODS[method].colour, label=method.upper(), ms=4)
                ax.fill_between(x, low, high, color=METHODS[method].colour, alpha=0.18, lw=0)
            for base, label, style in ((prior, "prior only", "--"), (mean_rows, "mean image", ":")):
                if base:
                    ax.axhline(quartiles(base, name)[0], ls=style, color="0.35", lw=1.2, label=label)
            ax.set_xticks(x, [_tick(s, epsilon(panel[0], panel[2], s)) for s in sigmas], rotation=45)
            ax.grid(alpha=0.25)
            if i == 0:
                ax.set_title(title(*panel), fontsize=10)
        cut = name == "psnr" and axes[i, 0].get_ylim()[1] > EXACT
        if cut:
            axes[i, 0].set_ylim(0, EXACT)
        for band in range(bands):
            unit = {"psnr": f"PSNR (dB{f', cut at {EXACT}' if cut else ''})", "ssim": "SSIM"}[name]
            axes[i + len(names) * band, 0].set_ylabel(unit)
    fig.supxlabel("sigma: standard deviation of the noise on the gradient", fontsize=10)
    found = [ax.get_legend_handles_labels() for ax in axes.ravel()]
    lines = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    fig.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=min(5, int(size[0] / 1.6)), frameon=False)
    write_atomic(path, lambda p: fig.savefig(p, dpi=130))
    plt.close(fig)


def contact_sheet(rows: list[Row], inputs: Inputs, store: Store, path: Path) -> None:
    """Truth, then seed 0's reconstruction at every sigma: a block a victim and method, a line an image, about a page in all."""
    cells = by_cell(rows)
    blocks = sorted({key[:4] for key in cells})
    sigmas = sorted({key[4] for key in cells})
    shown = min(4, max(1, 12 // len(blocks)), len(inputs.images))
    cache: dict[int, dict[str, np.ndarray]] = {}

    def picture(row: Row) -> np.ndarray:
        if row["chunk"] not in cache:
            cache[row["chunk"]] = store.arrays(row["chunk"])
        return to_unit(cache[row["chunk"]]["images"][row["row"]])

    prior = {r["image"]: r for r in rows if r["method"] == PRIOR_ONLY and r["seed"] == 0}
    columns = 2 + len(sigmas)
    lines = len(blocks) * shown
    size = (columns * 0.95 + 0.6, lines * 1.08 + 0.6)
    fig, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    for b, block in enumerate(blocks):
        for i in range(shown):
            line = axes[b * shown + i]
            at = {r["sigma"]: r for s in sigmas for r in cells.get((*block, s), []) if (r["image"], r["seed"]) == (i, 0)}
            shots: list[Any] = [
                to_unit(inputs.images[i]),
                *[picture(at[s]) if s in at else None for s in sigmas],
                picture(prior[i]),
            ]
            notes = ["", *[f"{at[s]['psnr']:.1f}" if s in at and not at[s]["failed"] else "failed" for s in sigmas], ""]
            for ax, shot, note in zip(line, shots, notes, strict=True):
                ax.set_xticks([])
                ax.set_yticks([])
                ax.set_frame_on(False)
                if shot is not None:
                    ax.imshow(np.nan_to_num(shot).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                ax.set_xlabel(note, fontsize=7, labelpad=1)
        label = f"{block[3].upper()}\n{title(*block[:3])}"
        axes[b * shown + (shown - 1) // 2, 0].set_ylabel(label.replace(", ", "\n"), fontsize=8)
    for ax, head in zip(axes[0], ["truth", *[f"σ = {s:.3g}" for s in sigmas], "prior only"], strict=True):
        ax.set_title(head, fontsize=8)
    fig.suptitle("Seed 0 of every cell, not chosen; numbers are PSNR in dB", fontsize=9)
    write_atomic(path, lambda p: fig.savefig(p, dpi=130))
    plt.close(fig)


def write(c: SweepConfig, inputs: Inputs, rows: list[Row], store: Store, quiet: bool = False) -> None:
    """Writes summary.md, quality.png and contact_sheet.png, and unless `quiet` prints the summary."""
    mean_rows = mean_image_rows(inputs)
    text = table(rows, mean_rows)
    prior = f"{c.prior} (sha256 {inputs.prior.sha256[:12]}{f', revision {r[:12]}' if (r := inputs.prior.revision) else ''})"
    about = [
        attackers.threat_model(c),
        f"Median [quartiles] over {c.num_images} images x {c.seeds} seeds of {c.images}{_released(c)}; prior {prior}; "
        f"{c.steps} steps, {c.spacing}; {strengths(c)}. The scores are of each trial's last image.",
        "Picks: PSNR of one iterate a trial (of its first chain, where it has several), over all its steps: least gradient "
        "distance (attacker), closest to the truth (oracle: no attacker can do that).",
    ]
    if len(c.methods) > 1:
        about += [
            "Methods beside each other: median PSNR with the 95 % interval of a bootstrap over images; wins: on how many "
            "images x seeds a method's PSNR is the highest; time without compiling, of a trial among those computed at a time:",
            compare.table(rows),
            "\n".join(compare.verdicts(rows)),
        ]
    guarantees = [
        f"Guarantees of one release against every attack, add/remove adjacency, delta {c.delta:g}:",
        privacy_table(c, inputs),
    ]
    store.write_text("summary.md", "\n\n".join([text, *about, *guarantees]) + "\n")
    epsilon = lambda victim, mechanism, sigma: guarantee(c, inputs, victim, mechanism, sigma).epsilon
    files = [store.folder / "quality.png", store.folder / "contact_sheet.png"]
    plot_quality(rows, mean_rows, epsilon, files[0])
    contact_sheet(rows, inputs, store, files[1])
    if c.labels != "known":
        files.append(store.folder / "labels.png")
        compare.plot_labels(rows, files[-1])
    if not quiet:
        print("\n".join([text, *about, *guarantees, f"pictures: {', '.join(map(str, files))}"]))


def _released(c: SweepConfig) -> str:
    """What of the images is released, where it is not the gradient of one."""
    of = f", {c.group} to a gradient, matched to the truth by assignment" if c.group > 1 else ""
    batch = f" of {c.local_batch} images" if c.local_batch else ""
    steps = (
        f", released after {c.local_steps} local steps{batch} at rate {c.local_learning_rate:g}" if c.local_steps > 1 else ""
    )
    return of + steps


def strengths(c: SweepConfig) -> str:
    """The settings of the methods that ran."""
    restarts = f", {c.restarts} restarts" if c.restarts > 1 else ""
    dsg, calibrated = f"DSG guidance rate {c.guidance_rate:g}", f"calibrated DSG guidance rate {c.calibrated_rate:g} at most"
    of = {
        "dsg": dsg,
        "calibrated-dsg": calibrated,
        "dsg-mean": f"the mean of {c.chains} chains of {dsg}",
        "calibrated-mean": f"the mean of {c.chains} chains of {calibrated}",
        "dps": f"DPS zeta {c.zeta:g}",
        "red-diff": f"RED-diff weight {c.red_diff_weight:g}",
        "dlg": f"DLG {c.dlg_steps} L-BFGS steps{restarts}",
        "inverting": f"inverting gradients {c.inverting_steps} steps, TV {c.tv:g}{restarts}",
        "analytic": "analytic of the first dense layer",
        "analytic-dsg": f"{dsg} from the analytic estimate",
    }
    where = "" if c.through_prior else " at x0hat, without a derivative of the prior"
    matching = f"guided by {c.distance}{where}" + (", layers weighted alike" if c.layer_weights == "equal" else "")
    return ", ".join([*(of[name] for name in c.methods), matching])
