"""The report of a comparison: one page that asks nothing of a network, with its data and figures beside it."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import math
from pathlib import Path
from typing import Any

from gdiff_jax.auditing import markdown, summary, templates
from gdiff_jax.auditing.answers import MORE
from gdiff_jax.auditing.comparing import figures, words
from gdiff_jax.auditing.comparing.apart import settings_apart
from gdiff_jax.auditing.comparing.pairs import Difference, Paired, epsilons
from gdiff_jax.auditing.comparing.words import judged
from gdiff_jax.auditing.record import plain
from gdiff_jax.auditing.sentences import noise_text
from gdiff_jax.auditing.templates import Table, table
from gdiff_jax.sweeping import tables

FORMAT = 1


def differences(paired: Paired) -> Table:
    """A level's first audit, then each other one at it, by level."""
    first = paired.names[0]
    shares = ["recovered", "less, points", "recognised", "less, points"]
    head = ["noise", "audit", "PSNR dB", f"less that of {first}", *shares, "pairs"]
    rows: list[list[str]] = []
    for by_epsilon, first_sigma in dict.fromkeys(sorted((d.at != "sigma", d.first_sigma) for d in paired.differences)):
        at_level = [d for d in paired.differences if (d.at != "sigma", d.first_sigma) == (by_epsilon, first_sigma)]
        for k, d in enumerate([None, *at_level]):
            audit, sigma = (d.audit, d.sigma) if d else (0, first_sigma)
            level = next(v for v in summary.levels(paired.shared[audit]) if v.sigma == sigma)
            epsilon = f"ε ≈ {epsilons(paired.shared[0])[sigma]:.3g}, " if by_epsilon and k == 0 else ""
            noise = f"{epsilon}σ = {sigma:.3g}" if by_epsilon or k == 0 else ""
            known = f"{level.identified.value:.0%}" if paired.shared[audit].can_recognise else "-"
            mine = [level.psnr.text(), f"{level.recovered.value:.0%}", known]
            less = [judged(d.psnr, d.images), *[_points(v, d.images) for v in (d.recovered, d.recognised)]] if d else [""] * 3
            cells = [cell for both in zip(mine, less, strict=True) for cell in both]
            rows.append([noise, paired.names[audit], *cells, str(d.pairs) if d else ""])
    return table(head, rows)


def _points(interval: Any, images: int) -> str:
    """A difference of shares, in percentage points."""
    return judged(interval, images, 100, 0)


def apart(paired: Paired) -> Table:
    """The settings that are not the same."""
    rows = [[f"{s.topic}: {s.name}", *s.values] for s in settings_apart(paired.audits)]
    return table(["setting", *paired.names], rows)


def enough(paired: Paired) -> Table:
    """The smallest noise that protects, side by side, of the images in common."""
    rows = []
    for name, audit in zip(paired.names, paired.shared, strict=True):
        both = [noise_text(audit, summary.smallest_noise(audit, oracle)) for oracle in (False, True)]
        rows.append([name, *both, ", ".join(f"{sigma:.3g}" for sigma in audit.sigmas)])
    return table(["audit", "σ by the attacker's choice", "by the oracle's", "σ tried"], rows)


def render(paired: Paired, drawn: dict[str, bytes]) -> str:
    """The page; `drawn` are the files of its figures, made by `figures.files`."""
    kinds = {"compare_quality": "svg", "compare_reconstructions": "png"}
    shown = {
        name: templates.embedded(kind, drawn[f"{name}.{kind}"]) for name, kind in kinds.items() if f"{name}.{kind}" in drawn
    }
    sections = [("apart", "What differs"), ("differences", "Differences"), ("images", "Images"), ("own", "Own warnings")]
    return templates.render(
        "compare.html",
        names=paired.names,
        images=len(paired.places),
        sections=[s for s in [*sections, ("reproduce", "Reproduce")] if s[0] != "images" or "compare_reconstructions" in shown],
        verdict=words.verdict(paired),
        warnings=words.warnings(paired),
        apart=apart(paired),
        figures=shown,
        differences=differences(paired),
        method=words.METHOD,
        share=f"{paired.shared[0].about['share']:.0%}",
        enough=enough(paired),
        own_warnings=words.own_warnings(paired),
        commands=table(
            ["audit", "command"],
            [[name, str(audit.about.get("command", "-"))] for name, audit in zip(paired.names, paired.audits, strict=True)],
        ),
    )


def to_markdown(paired: Paired) -> str:
    """The same in short, for the summary of a pipeline."""
    lines = [markdown.escaped(" ".join(words.verdict(paired)))]
    lines.append("\n".join(f"- {markdown.escaped(line)}" for line in words.warnings(paired)))
    for found in (differences(paired), enough(paired), apart(paired)):
        if found["rows"]:
            escaped = [[markdown.escaped(cell) for cell in row] for row in found["rows"]]
            lines.append(tables.markdown([markdown.escaped(cell) for cell in found["head"]], escaped))
    lines.append(words.METHOD)
    return "\n\n".join(["## Audits beside each other", *[line for line in lines if line]]) + "\n"


def _flat(paired: Paired, difference: Difference) -> dict[str, Any]:
    """A difference by names of columns."""
    row: dict[str, Any] = {"audit": paired.names[difference.audit], "first": paired.names[0]}
    for field in dataclasses.fields(difference):
        value = getattr(difference, field.name)
        if field.name in ("psnr", "recovered", "recognised"):
            row |= {f"{field.name}{end}": part for end, part in zip(("", "_low", "_high"), value, strict=True)}
        elif field.name != "audit":
            row[field.name] = None if isinstance(value, float) and math.isnan(value) else value
    return row


def to_csv(paired: Paired) -> str:
    """A line a difference; what was not measured is empty."""
    rows = [plain(_flat(paired, d)) for d in paired.differences]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json(paired: Paired) -> str:
    """Strict JSON: names, settings that differ, places of the images in common, differences, and what is said of them."""
    data = {
        "format": FORMAT,
        "names": paired.names,
        "verdict": words.verdict(paired),
        "warnings": words.warnings(paired),
        "method": words.METHOD,
        "settings": [dataclasses.asdict(setting) for setting in settings_apart(paired.audits)],
        "images": [dict(zip(paired.names, places, strict=True)) for places in paired.places],
        "differences": [_flat(paired, d) for d in paired.differences],
        "smallest_noise": {
            name: [_end(v) for v in summary.smallest_noise(audit)]
            for name, audit in zip(paired.names, paired.shared, strict=True)
        },
    }
    return json.dumps(plain(data), allow_nan=False, indent=1)


def _end(value: float) -> float | str:
    """Infinity, which stands for more noise than was tried, in words: JSON has no number for it."""
    return MORE if math.isinf(value) else value


def to_html(paired: Paired) -> str:
    """Verdict and differences, for a notebook."""
    found = differences(paired)
    cells = lambda tag, row: "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row) + "</tr>"
    body = "".join(cells("td", row) for row in found["rows"])
    said = "".join(f"<p>{html.escape(line)}</p>" for line in words.verdict(paired))
    return f"{said}<table>{cells('th', found['head'])}{body}</table>"


def write(paired: Paired, folder: Path) -> Path:
    """Writes compare.html, compare.md, compare.json, compare.csv and figures, each whole or not at all; returns the page."""
    drawn = figures.files(paired)
    texts = {
        "compare.md": to_markdown(paired),
        "compare.json": to_json(paired),
        "compare.csv": to_csv(paired),
        "compare.html": render(paired, drawn),
    }
    templates.write_files(folder, texts, drawn)
    return folder / "compare.html"
