"""The report of an audit: one page, which asks nothing of a network, with its data and figures beside it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from gdiff_jax.auditing import (
    advice,
    against_bound,
    answers,
    blind_page,
    figures,
    markdown,
    pictures,
    sentences,
    summary,
    templates,
    worst,
)
from gdiff_jax.auditing.enough import enough
from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.auditing.templates import Table, table

LONG = 24  # entries of a setting that have no lines of their own
_RASTER = ("worst", "reconstructions", "recognised", "deviation", "attempts", "film")  # made of pixels: as PNG they are smaller


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def _levels(record: AuditRecord) -> Table:
    names = ["ssim", *(["lpips"] if record.about["has_lpips"] else [])]
    head = [
        "σ",
        "PSNR dB",
        "oracle",
        *[n.upper() for n in names],
        "recovered",
        "by the oracle",
        *["recognised", "by distance"] * record.can_recognise,
        "chosen",
        "trials",
    ]
    rows = []
    for v in summary.levels(record):
        trials = f"{v.trials}" + (f" ({v.failed} failed)" if v.failed else "")
        scores = [getattr(v, n).text(2) for n in names]
        recognised = (v.identified, v.identified_in_pixels) if record.can_recognise else ()
        shares = [s.percent() for s in (v.recovered, v.recovered_oracle, *recognised)]
        chosen = [v.methods] if v.methods == v.methods_to_recognise else [v.methods, f"to recognise {v.methods_to_recognise}"]
        rows.append([f"{v.sigma:.3g}", v.psnr.text(), v.oracle.text(), *scores, *shares, "; ".join(chosen) or "-", trials])
    return table(head, rows)


def _worst(record: AuditRecord) -> Table:
    every = worst.ranked(record)
    head = ["image", "", "recovered", *[f"σ = {s:.3g}" for s in record.sigmas]]
    decibels = lambda values: [_number(v) for v in values]
    rows = [
        [v.name, "picked" if v.picked else "audited", worst.up_to(record, v), *decibels(v.psnr)] for v in every[: worst.SHOWN]
    ]
    middle = [v.psnr.value for v in summary.levels(record)]
    return table(head, [*rows, ["median", "all audited", "", *decibels(middle)]] if rows else [])


def _baselines(record: AuditRecord) -> str:
    parts = []
    for rows, name in ((record.prior_only, "samples of the prior"), (record.mean_image, "the mean image")):
        values = [r["psnr"] for r in rows if r["psnr"] is not None]
        if values:
            parts.append(f"{name} {np.median(values):.1f} dB")
    return ", ".join(parts) + "." if parts else "none."


def _guarantees(record: AuditRecord) -> Table:
    head = ["σ", "ε", "δ", "μ", "advantage", "TPR at 1 % FPR", "γ(κ)", "γ(10⁻⁴)", ""]
    rows = []
    for g in record.guarantees:
        delta = "0 (pure)" if g["pure"] else f"{g['delta']:g}"
        figures_ = [_number(g[k]) for k in ("mu", "advantage", "tpr", "gamma", "gamma_1e-4")]
        with_ = [_number(g["epsilon"], 4), delta, *figures_, ""]
        rows.append([f"{g['sigma']:.3g}", *(with_ if g["epsilon"] is not None else ["none", *["-"] * 6, g["reason"]])])
    return table(head, rows)


def _enough(record: AuditRecord) -> Table:
    head = ["so that …", "σ", "ε", "cosine", "decrease of loss left"]
    rows = []
    for e in enough(record):
        sigma = sentences.noise_text(record, e.noise) if e.measured else e.noise.text(3, "g")
        left = "-" if math.isnan(e.cosine) else f"{100 * e.cosine**2:.2g} %"
        rows.append([e.wanted, sigma, _number(e.epsilon, 4), _number(e.cosine), left])
    return table(head, rows)


def _identified(record: AuditRecord) -> Table:
    found = against_bound.identified(record)
    bounded = any(r.bound is not None for r in found)
    head = ["σ", *["ε"] * bounded, "K", "named", "expected", *["worst gradients", "γ(1/K)"] * bounded, "blind"]
    rows = []
    for r in found:
        shares = map(against_bound.share, (r.expected, *(r.worst, r.bound) * bounded, 1 / r.count))
        epsilon = [_number(r.epsilon, 4)] * bounded
        rows.append([f"{r.sigma:.3g}", *epsilon, str(r.count), r.success.percent(1), *shares])
    return table(head, rows)


def _theory(record: AuditRecord) -> tuple[Table | None, Table]:
    t = record.theory
    if not t:
        return None, table((), ())
    rows = [
        ["parameters", f"{t['parameters']:,}"],
        ["||J||, median over images", f"{np.median(t['frobenius']):.4g}"],
        ["reconstruction vulnerability RV = max ||J||", f"{t['rv'][0]:.4g} ± {t['rv'][1]:.2g}"],
        ["norm of the gradient, median", f"{np.median(t['gradient_norm']):.4g}"],
    ]
    for k, s in enumerate(t["spectra"]):
        rank = f"rank {s['rank']} of {s['dimensions']}, " if "rank" in s else ""
        low = "λ min" if t["spectrum_is_exact"] else "λ min at most"
        text = f"{rank}effective rank {s['effective_rank']:.1f}, λ max {s['lambda_max']:.3g}, {low} {s['lambda_min']:.3g}"
        rows.append([f"spectrum of JᵀJ, image {k}", text])
    head = ["σ", "I2F, pixels' units", "Cramér-Rao, PSNR dB, without bias", "van Trees, PSNR dB at most"]
    columns = [t["i2f"], t.get("cramer_rao_psnr"), t.get("van_trees_psnr")]
    cell = lambda column, j: "-" if not column else ("unbounded error" if column[j] is None else f"{column[j]:.3g}")
    limits = [[f"{s:.3g}", *[cell(c, j) for c in columns]] for j, s in enumerate(t["sigmas"])]
    return table(("quantity", "value"), rows), table(head, limits if t["i2f"] else [])


def _cards(record: AuditRecord) -> list[tuple[str, str]]:
    if not record.has_truth:
        return []
    first = summary.levels(record)[0]
    at = "without noise" if first.sigma == 0 else f"at σ = {first.sigma:.3g}"
    noise, share = summary.smallest_noise(record), record.about["share"]
    value = {0.0: "any tried", math.inf: f"> {record.sigmas[-1]:.3g}"}.get(noise.value, f"{noise.value:.2g}")
    return [
        (f"{first.psnr.value:.1f} dB", f"median PSNR {at}"),
        (f"{first.recovered.value:.0%}", f"of images recovered {at}"),
        *[(f"{first.identified.value:.0%}", f"recognised among {record.candidates} {at}")] * record.can_recognise,
        (value, f"σ from which fewer than {share:.0%} are recovered"),
    ]


def _settings(record: AuditRecord) -> Table:
    flat: list[list[str]] = []
    for key, value in record.about.items():
        if isinstance(value, dict) and len(value) > LONG:  # such as the classes of a large set
            flat.append([key, ", ".join(f"{k} -> {v}" for k, v in value.items())])
        elif isinstance(value, dict):
            flat += [[f"{key}.{k}", str(v)] for k, v in value.items() if v not in (None, {}, "")]
        elif key not in ("command", "threat_model"):
            flat.append([key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)])
    return table(("setting", "value"), flat)


def render(record: AuditRecord, drawn: dict[str, bytes]) -> str:
    """The page; `drawn` are the files of its figures, made by `figures.files`."""
    shown = {}
    for name in figures.drawings(record):
        kind = "png" if name in _RASTER else "svg"
        shown[name] = templates.embedded(kind, drawn[f"{name}.{kind}"])
    frames = [v for k, v in record.pictures.items() if k.startswith("film/")]
    theory, limits = _theory(record)
    sections = [("worst", "Worst case"), ("images", "Images"), ("noise", "Noise"), ("guarantees", "Guarantees")]
    sections += [("named", "Who knows the candidates")]
    sections += [("steps", "Steps"), ("theory", "Theory"), ("reproduce", "Reproduce")]
    missing = {
        "worst": not worst.ranked(record),
        "noise": not record.has_truth,
        "theory": not theory,
        "named": not against_bound.identified(record),
    }
    return templates.render(
        "page.html",
        about=record.about,
        sections=[s for s in sections if not missing.get(s[0])],
        findings=against_bound.findings(record),
        decision=sentences.decision(record),
        advice=advice.advice(record),
        warnings=sentences.warnings(record),
        cards=_cards(record),
        figures=shown,
        gif=f"data:image/gif;base64,{pictures.gif(frames)}" if frames else "",
        levels=_levels(record),
        worst=_worst(record),
        worst_note=worst.note(record),
        enough=_enough(record),
        baselines=_baselines(record),
        guarantees=_guarantees(record),
        identification=record.identification,
        seldom_named=against_bound.seldom_named(record),
        blind=record.blind,
        identified=_identified(record),
        why_below=against_bound.why_below(record),
        theory=theory,
        limits=limits,
        settings=_settings(record),
    )


def write(record: AuditRecord, folder: Path) -> Path:
    """Writes report.html, its summary, data and figures, each file whole or not at all; returns the page's path."""
    drawn = figures.files(record)
    texts = {
        "summary.md": markdown.render(record),
        "audit.json": answers.to_json(record),
        "trials.csv": record.to_csv(),
        **({"blind.html": blind_page.render(record)} if record.blind else {}),
        "report.html": render(record, drawn),
    }
    templates.write_files(folder, texts, drawn)
    return folder / "report.html"
