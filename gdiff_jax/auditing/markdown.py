"""An audit as Markdown, of a length that the summary of a pipeline has room for."""

from __future__ import annotations

from gdiff_jax.auditing import advice, against_bound, sentences, summary
from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.sweeping.tables import markdown


def render(record: AuditRecord) -> str:
    """Verdict, warnings, and a line a noise level, with 95 % intervals; epsilon where there is one."""
    told = [against_bound.findings(record), sentences.decision(record), advice.advice(record)]
    parts = [f"## Audit of {escaped(record.about['victim'])}", *[escaped(" ".join(lines)) for lines in told]]
    parts.append("\n".join(f"- {escaped(warning)}" for warning in sentences.warnings(record)))
    if levels := summary.levels(record):
        head = ["sigma", "epsilon", "median PSNR dB", "recovered", *["recognised"] * record.can_recognise, "chosen"]
        body = []
        for v in levels:
            shares = [v.recovered.percent(), *[v.identified.percent()] * record.can_recognise]
            body.append([f"{v.sigma:.3g}", f"{v.epsilon:.4g}", v.psnr.text(), *shares, v.methods or "-"])
        parts.append(markdown(head, body))
    parts.append(escaped(record.about.get("command") or ""))
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: names of files hold what would be marks, or a link."""
    return "".join(f"\\{c}" if c in "\\`*_<>#|" else c for c in text).replace("](", "]\\(")
