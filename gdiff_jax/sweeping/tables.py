"""What a sweep's records say, as tables: medians over the grid, guarantees, baselines. Computes no reconstruction."""

from __future__ import annotations

from collections import defaultdict

import jax.numpy as jnp
import numpy as np

from gdiff_jax.metrics import image_metrics
from gdiff_jax.sweeping.plan import PRIOR_ONLY, Plan
from gdiff_jax.sweeping.records import Row

Cell = tuple[str, int, str, str, float]  # victim, training steps, mechanism, method, sigma
Panel = tuple[str, int, str]  # victim, training steps, mechanism
METRICS = ("psnr", "ssim", "mse")


def by_cell(rows: list[Row]) -> dict[Cell, list[Row]]:
    cells: dict[Cell, list[Row]] = defaultdict(list)
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


def mean_image_rows(plan: Plan) -> list[Row]:
    """The prior's mean training image as everybody's reconstruction; empty where the prior brings none."""
    mean = plan.prior.mean_image
    if mean is None:
        return []
    scores = image_metrics(jnp.broadcast_to(mean, plan.images.shape), jnp.asarray(plan.images))
    return [{"failed": False, **{k: float(v[i]) for k, v in scores.items()}} for i in range(len(plan.images))]


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


def brief(rows: list[Row], mean_rows: list[Row]) -> str:
    """Median PSNR in dB alone, for a screen: a line a victim, mechanism and method, a column a sigma; last, no leak."""
    cells = by_cell(rows)
    sigmas = sorted({sigma for *_, sigma in cells})
    psnr = lambda some: "-" if np.isnan(median := quartiles(some, "psnr")[0]) else f"{median:.1f}"
    body = [
        [title(*panel), method, *(psnr(cells.get((*panel, method, sigma), [])) for sigma in sigmas)]
        for panel in panels(rows)
        for method in sorted({cell[3] for cell in cells if cell[:3] == panel})
    ]
    for name, base in ((PRIOR_ONLY, [row for row in rows if row["method"] == PRIOR_ONLY]), ("mean image", mean_rows)):
        if base:
            body.append(["no leak at all", name, *[psnr(base)] * len(sigmas)])
    return markdown(["attacked", "method", *(f"{sigma:.4g}" for sigma in sigmas)], body)


def expectations(rows: list[Row]) -> str:
    """Of methods that give each pixel's deviation what they expect beside what is true, medians; empty where there are none."""
    body = []
    for (victim, steps, mechanism, method, sigma), cell in sorted(by_cell(rows).items(), key=lambda kv: kv[0]):
        if some := [row for row in cell if "expected_psnr" in row]:
            true, expected, within = (quartiles(some, n)[0] for n in ("psnr", "expected_psnr", "within_two_deviations"))
            figures = [f"{true:.1f}", f"{expected:.1f}", f"{within:.0%}"]
            body.append([victim, str(steps) if steps else "no", mechanism, method, f"{sigma:.4g}", str(len(some)), *figures])
    head = ["victim", "trained", "mechanism", "method", "sigma", "trials", "PSNR dB", "expected", "within two deviations"]
    return markdown(head, body) if body else ""


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table with columns of even width."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    rule = ["-" * w for w in widths]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in [head, rule, *body]
    )


def privacy_table(plan: Plan) -> str:
    """What each mechanism guarantees at each of its noise levels, one release of one image's gradient."""
    head = ["mechanism", "victim", "sigma", "epsilon", "delta", "mu", "advantage", "TPR at 1 % FPR", "gamma at kappa 1e-4"]
    body = []
    victims = list(dict.fromkeys(state.name for state in plan.params))
    for text in plan.mechanisms:
        per_victim = _is_per_victim(text)
        for victim in victims if per_victim else victims[:1]:
            for sigma in plan.sigmas[text]:
                body.append([text, victim if per_victim else "any", f"{sigma:.4g}", *_guarantee(plan, victim, text, sigma)])
    return markdown(head, body)


def _is_per_victim(mechanism: str) -> bool:
    """The sensitivity of the Laplace mechanism, of signs and of QSGD grows with the number of parameters."""
    return any(name in mechanism for name in ("laplace", "sign", "qsgd"))


def epsilons(plan: Plan) -> list[str]:
    """For a screen, a line a mechanism: epsilon at each sigma, where there is one and it is the same for every victim."""
    lines, victim = [], next(iter(plan.params)).name
    for text in plan.mechanisms:
        found = [(plan.guarantee(victim, text, sigma), sigma) for sigma in plan.sigmas[text]]
        if not _is_per_victim(text) and (some := [f"{g.epsilon:.4g} at {sigma:.4g}" for g, sigma in found if g]):
            lines.append(f"Epsilon of {text}, one release, delta {plan.delta:g}: {', '.join(some)}.")
    return lines


def _guarantee(plan: Plan, victim: str, mechanism: str, sigma: float) -> list[str]:
    g = plan.guarantee(victim, mechanism, sigma)
    if not g:
        return [str(g), *["-"] * 5]
    delta = "0 (pure)" if g.pure_epsilon else f"{plan.delta:g}"
    mu = "-" if g.mu is None else f"{g.mu:.4g}"
    return [f"{g.epsilon:.4g}", delta, mu, *(f"{v:.3g}" for v in (g.advantage, g.tpr(0.01), g.reconstruction_bound(1e-4)))]


def panels(rows: list[Row]) -> list[Panel]:
    return sorted({cell[:3] for cell in by_cell(rows)})


def title(victim: str, steps: int, mechanism: str) -> str:
    noise = "" if mechanism == "gaussian" else f", {mechanism}"
    return f"{victim}, {f'trained {steps} steps' if steps else 'untrained'}{noise}"
