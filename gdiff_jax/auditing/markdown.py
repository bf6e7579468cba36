"""An audit as Markdown, of a length that the summary of a pipeline has room for."""

from __future__ import annotations

from gdiff_jax.auditing import sentences, summary
from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.sweeping.tables import markdown


def render(record: AuditRecord) -> str:
    """Verdict, warnings, and a line a noise level, with 95 % intervals; epsilon where there is one."""
    parts = [f"## Audit of {escaped(record.about['victim'])}", escaped(" ".join(sentences.verdict(record)))]
    parts.append("\n".join(f"- {escaped(warning)}" for warning in sentences.warnings(record)))
    if levels := summary.levels(record):
        head = ["sigma", "epsilon", "median PSNR dB", "recovered", *["recognised"] * record.can_recognise, "chosen"]
        body = []
        for v in levels:
            shares = [v.recovered.percent(), *[v.identified.percent()] * record.can_recognise]
            body.append([f"{v.sigma:.3g}", f"{v.epsilon:.4g}", v.psnr.text(), *shares, v.methods or "-"])
        parts.append(markdown(head, body))
    about = record.about
    parts.append(escaped(" ".join(about[name] for name in ("threat_model", "command") if about.get(name))))
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: names of files hold what would be marks, or a link."""
    return "".join(f"\\{c}" if c in "\\`*_<>#|" else c for c in text).replace("](", "]\\(")
