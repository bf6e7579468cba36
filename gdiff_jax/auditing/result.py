"""The result of an audit: its data, with all that can be said, drawn and written of it."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

from gdiff_jax.auditing import against_bound, answers, sentences, summary
from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Audit(AuditRecord):
    """What an audit found. `report(folder)` writes all that can be read of it, `load(file)` reads it back.

    Its data are the attributes of `record.AuditRecord`: about, trials, curves, mean_image, guarantees, theory, pictures,
    identification, blind.
    """

    def levels(self) -> list[summary.Level]:
        """What came of each noise level, ascending."""
        return summary.levels(self)

    def smallest_noise(self, oracle: bool = False) -> Interval:
        """Sigma from which on fewer than `about["share"]` of the images are recovered; 0 and inf are ends of the grid."""
        return summary.smallest_noise(self, oracle)

    def verdict(self) -> str:
        """The answer in two paragraphs, with intervals: for those who decide, and for those who build."""
        return "\n\n".join(sentences.paragraphs(self))

    def warnings(self) -> list[str]:
        """Signs that the figures may mislead."""
        return sentences.warnings(self)

    def findings(self) -> list[str]:
        """What must not be: a release that gives away more than its mechanism can. The verdict begins with them."""
        return against_bound.findings(self)

    def plot(self, name: str = "overview") -> Figure:
        """A figure, which a notebook shows where it is a cell's last line.

        Args:
          name: "overview", PSNR and the share of recovered and recognised images over the noise; or one of the report's, such
            as "reconstructions", the images and what came back of them.

        Raises:
          ValueError: where this audit has no such figure, naming those that it has.
        """
        from gdiff_jax.auditing import figures  # with matplotlib, as the page: who draws nothing does not wait for it
        from gdiff_jax.sweeping.drawing import house_style

        draws = {"overview": figures.overview, **figures.drawings(self)}
        if name not in draws:
            raise ValueError(f"plot({name!r}): this audit has no such figure; it has {', '.join(draws)}")
        with house_style(figures.STYLE):
            return draws[name](self)

    def to_json(self) -> str:
        """Strict JSON, as audit.schema.json describes it, from which `load` gives the same audit."""
        return answers.to_json(self)

    def report(self, folder: str | Path) -> Path:
        """Writes report.html (self-contained), blind.html, summary.md, audit.json, trials.csv and figures; returns the page."""
        from gdiff_jax.auditing import page

        return page.write(self, Path(folder))

    def __repr__(self) -> str:
        noise = ", ".join(f"{s:.3g}" for s in self.sigmas)
        return f"<Audit of {self.about['victim']}: {len(self.attacks)} attacks at sigma {noise}. {self.verdict()}>"

    def _repr_html_(self) -> str:
        head = ("sigma", "median PSNR, dB", "recovered", *["recognised"] * self.can_recognise)
        shares = lambda v: (v.recovered, *[v.identified] * self.can_recognise)
        rows = [(f"{v.sigma:.3g}", v.psnr.text(), *(s.percent() for s in shares(v))) for v in self.levels()]
        cells = lambda tag, row: "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row) + "</tr>"
        table = cells("th", head) + "".join(cells("td", row) for row in rows)
        told = "".join(f"<p>{html.escape(text)}</p>" for text in sentences.paragraphs(self))
        return told + (f"<table>{table}</table>" if rows else "")
