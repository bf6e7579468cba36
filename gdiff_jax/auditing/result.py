"""The result of an audit: everything that its report shows, as plain data, with what can be done with it."""

from __future__ import annotations

import csv
import dataclasses
import functools
import html
import io
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from gdiff_jax import metrics
from gdiff_jax.auditing import pictures, sentences, summary
from gdiff_jax.auditing.intervals import Interval
from gdiff_jax.auditing.summary import PRIOR_ONLY, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 1
SHOWN = 4  # images whose reconstructions are kept as pictures


@dataclasses.dataclass(frozen=True)
class Audit:
    """What an audit found. `report(folder)` writes all that can be read of it, `load(file)` reads it back.

    Attributes:
      about: the question: victim, prior, images, mechanism, threat model, thresholds, versions, hashes, command.
      trials: a dict for each method, noise level, image and seed; PSNR in dB and MSE are of images in [0, 1], `rank` is the
        number of other candidates that are at least as close as the truth, `leak` names the first image of its group.
      curves: per trial "distance" and "psnr" of x0hat at each reverse step, by `curve_key`.
      mean_image: scores of the prior's mean image, one an image; empty where the prior has none.
      guarantees: what one release guarantees at each noise level.
      theory: what can be said without an attack (`theory.summary.summarise`); None where it was left out.
      pictures: PNG files, base64, by name: `truth/IMAGE`, `found/SIGMA/IMAGE` (attacker's pick, seed 0),
        `recognised/SIGMA/IMAGE` (the pick to recognise it by, where another is in the running), `prior/IMAGE`, `film/STEP`.
    """

    about: dict[str, Any]
    trials: list[Row]
    curves: dict[str, dict[str, list[float | None]]]
    mean_image: list[Row]
    guarantees: list[dict[str, Any]]
    theory: dict[str, Any] | None
    pictures: dict[str, str]

    @functools.cached_property
    def attacks(self) -> list[Row]:
        """The trials that used the gradient."""
        return [row for row in self.trials if row["method"] != PRIOR_ONLY]

    @functools.cached_property
    def prior_only(self) -> list[Row]:
        """Samples of the prior, which ignore the gradient."""
        return [row for row in self.trials if row["method"] == PRIOR_ONLY]

    @functools.cached_property
    def sigmas(self) -> list[float]:
        """Noise levels, ascending."""
        return sorted({row["sigma"] for row in self.attacks})

    @functools.cached_property
    def methods(self) -> list[str]:
        """Attacks, in the order in which they ran."""
        return list(dict.fromkeys(row["method"] for row in self.attacks))

    @property
    def has_truth(self) -> bool:
        """Whether the private images are known, so that reconstructions can be scored."""
        return bool(self.about["has_truth"])

    @property
    def candidates(self) -> int:
        """Images among which the truth is looked for, itself included."""
        return self.about["candidates"]

    def at(self, sigma: float) -> list[Row]:
        """The attacks at one noise level."""
        return [row for row in self.attacks if row["sigma"] == sigma]

    def curve(self, row: Row) -> dict[str, np.ndarray]:
        """Gradient distance, PSNR of x0hat and, where measured, share of signal at each step of a trial; nan where none."""
        return {k: np.array(v, np.float64) for k, v in self.curves[curve_key(row)].items()}

    def levels(self) -> list[summary.Level]:
        """What came of each noise level, ascending."""
        return self._levels

    @functools.cached_property
    def _levels(self) -> list[summary.Level]:  # once: verdict, warnings, page and figures all ask, and each bootstraps
        return summary.levels(self)

    def smallest_noise(self, oracle: bool = False) -> Interval:
        """Sigma from which on fewer than `about["share"]` of the images are recovered; 0 and inf are ends of the grid."""
        return summary.smallest_noise(self, oracle)

    def verdict(self) -> str:
        """The answer in a few sentences, with intervals."""
        return " ".join(sentences.verdict(self))

    def warnings(self) -> list[str]:
        """Signs that the figures may mislead."""
        return sentences.warnings(self)

    def plot(self) -> Figure:
        """PSNR and the share of recovered and recognised images over the noise."""
        from gdiff_jax.auditing import figures

        return figures.overview(self)

    def report(self, folder: str | Path) -> Path:
        """Writes report.html (self-contained), audit.json, trials.csv and every figure as PNG and SVG; returns the page."""
        from gdiff_jax.auditing import page

        return page.write(self, Path(folder))

    def to_json(self) -> str:
        """Strict JSON, from which `load` gives the same audit."""
        return json.dumps({"format": FORMAT, **_finite(dataclasses.asdict(self))}, allow_nan=False)

    def to_csv(self) -> str:
        """A line a trial."""
        names = list(dict.fromkeys(name for row in self.trials for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.trials)
        return text.getvalue()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Audit:
        """Reads what `report` wrote as audit.json.

        Raises:
          ValueError: where the file is something else, or of another version of this format.
        """
        try:
            data = json.loads(Path(path).read_text())
            version = data.pop("format")
            audit = cls(**data)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not an audit.json that an audit wrote ({type(error).__name__}: {error})") from None
        if version != FORMAT:
            raise ValueError(f"{path} is of format {version}, this version reads {FORMAT}; make it again")
        return audit

    def __repr__(self) -> str:
        noise = ", ".join(f"{s:.3g}" for s in self.sigmas)
        return f"<Audit of {self.about['victim']}: {len(self.attacks)} attacks at sigma {noise}. {self.verdict()}>"

    def _repr_html_(self) -> str:
        head = ("sigma", "median PSNR, dB", "recovered", "recognised")
        rows = [(f"{v.sigma:.3g}", v.psnr.text(), v.recovered.percent(), v.identified.percent()) for v in self.levels()]
        cells = lambda tag, row: "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"
        table = cells("th", head) + "".join(cells("td", row) for row in rows)
        return f"<p>{html.escape(self.verdict())}</p>" + (f"<table>{table}</table>" if rows else "")


def curve_key(row: Row) -> str:
    return f"{row['method']}/{row['sigma']}/{row['leak']}/{row['seed']}"


def assemble(
    about: dict[str, Any],
    rows: list[Row],
    images: list[np.ndarray],
    traces: list[dict[str, np.ndarray]],
    truth: np.ndarray | None,
    *,
    candidates: np.ndarray,
    mean_image: np.ndarray | None,
    guarantees: list[dict[str, Any]],
    theory: dict[str, Any] | None,
    film: list[np.ndarray],
) -> Audit:
    """The audit of these trials: adds what needs the pictures (identification, LPIPS) and keeps what the report shows.

    Args:
      about: see `Audit`; needs threshold, share, delta, group, victim, num_images, seeds.
      rows: of the trials, with method, sigma (None for prior-only), image, leak, seed, psnr, mse, distance, failed, ...
      images: the reconstruction of each row, (H, W, C) in [-1, 1].
      traces: of each row, arrays "distance", "x0_error" and "signal" of its steps.
      truth: private images (N, H, W, C) in [-1, 1], indexed by the rows' `image`; None where they are not known.
      candidates: (K, H, W, C) public or private images among which each truth is looked for; it is counted once.
      mean_image: (H, W, C), or None.
      guarantees: one a noise level.
      theory: of `theory.summary.summarise`, or None.
      film: images (H, W, C) of one reconstruction over the steps.
    """
    rows = [dict(row) for row in rows]
    kept: dict[str, str] = {}
    mean_rows: list[Row] = []
    if truth is not None:
        has_lpips = metrics.lpips_is_installed()
        for i, x in enumerate(truth):
            scored = [(row, image) for row, image in zip(rows, images, strict=True) if row["image"] == i and not row["failed"]]
            found = np.array([image for _, image in scored]).reshape(-1, *x.shape)
            for (row, image), rank in zip(scored, metrics.identification_ranks(found, x, candidates), strict=True):
                row["rank"] = int(rank)
                if has_lpips:
                    row["lpips"] = float(metrics.lpips(image, x))
        about = {**about, "candidates": metrics.candidate_count(candidates, truth), "has_lpips": has_lpips}
        for i, x in enumerate(truth[:SHOWN]):
            kept[f"truth/{i}"] = pictures.png(x)
        if mean_image is not None:
            scores = metrics.image_metrics(jnp.broadcast_to(mean_image, truth.shape), jnp.asarray(truth))
            mean_rows = [{k: float(v[i]) for k, v in scores.items()} for i in range(len(truth))]
    about = {"candidates": 0, "has_lpips": False, **about, "has_truth": truth is not None}
    curves = {}
    for row, trace in zip(rows, traces, strict=True):
        psnr = 10 * np.log10(4 / np.maximum(np.asarray(trace["x0_error"], np.float64), 1e-12))
        curves[curve_key(row)] = {"distance": _rounded(trace["distance"]), "psnr": _rounded(psnr)}
        if np.isfinite(trace["signal"]).any():
            curves[curve_key(row)]["signal"] = _rounded(trace["signal"])
    differ = len({row["method"] in summary.COMBINED for row in rows if row["method"] != PRIOR_ONLY}) > 1
    by_place = {id(row): image for row, image in zip(rows, images, strict=True)}
    for sigma in sorted({row["sigma"] for row in rows if row["method"] != PRIOR_ONLY}):
        picks, to_recognise = (summary.attacker_picks([r for r in rows if r["sigma"] == sigma], aim) for aim in (False, True))
        for row in picks:
            shown = row["seed"] == 0 and row["image"] < SHOWN if truth is not None else row["seed"] < 2 * SHOWN
            if shown:
                kept[f"found/{sigma!r}/{row['image'] if truth is not None else row['seed']}"] = pictures.png(by_place[id(row)])
        if truth is not None and differ:
            for row in to_recognise:
                if row["seed"] == 0 and row["image"] < SHOWN:
                    kept[f"recognised/{sigma!r}/{row['image']}"] = pictures.png(by_place[id(row)])
    for row, image in zip(rows, images, strict=True):
        if row["method"] == PRIOR_ONLY and row["seed"] == 0 and row["image"] < SHOWN:
            kept[f"prior/{row['image']}"] = pictures.png(image)
    kept |= {f"film/{k}": pictures.png(frame) for k, frame in enumerate(film)}
    data = Audit(about, rows, curves, mean_rows, guarantees, theory, kept)
    return Audit(**_finite(dataclasses.asdict(data)))  # as it will be read back


def _rounded(values: Any) -> list[float | None]:
    """To four digits, which curves need no more than."""
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in np.asarray(values, np.float64).tolist()]


def _finite(value: Any) -> Any:
    """Plain JSON values; a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
