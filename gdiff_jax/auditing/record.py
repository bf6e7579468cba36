"""What an audit holds: its trials and all else that its report shows, as plain data. Pure NumPy."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import os
from pathlib import Path
from typing import Any, Self

import numpy as np

from gdiff_jax.files import shown

FORMAT = 2  # of audit.json, as audit.schema.json describes it
READ = (1, FORMAT)  # 1 holds no summary, and what it holds is the same
SHOWN = 4  # images whose reconstructions are kept as pictures

Row = dict[str, Any]
PRIOR_ONLY = "prior-only"
COMBINED = ("calibrated-mean", "dsg-mean")  # of least expected error: near the truth, but also near the mean image


@dataclasses.dataclass(frozen=True, repr=False)
class AuditRecord:
    """The data of an audit, which audit.json holds; what it says is in `summary` and `sentences`.

    Attributes:
      about: the question: victim, prior, images, mechanism, threat model, thresholds, versions, hashes, command.
      trials: a dict for each method, noise level, image and seed; PSNR in dB and MSE are of images in [0, 1], `rank` is the
        number of other candidates that correlate with what came back at least as much as the truth, `rank_in_pixels` of those
        that are at least as near (in audits of before `rank` is that, and there is no other), `leak` names the first image of
        its group.
      curves: per trial "distance" and "psnr" of x0hat at each reverse step, and "signal" where it was measured, by `curve_key`.
      mean_image: scores of the prior's mean image, one an image; empty where the prior has none.
      guarantees: what one release guarantees at each noise level.
      theory: what can be said without an attack (`theory.summary.summarise`); None where it was left out.
      pictures: PNG files, base64, by name: `truth/IMAGE`, `found/SIGMA/IMAGE` (attacker's pick, seed 0),
        `recognised/SIGMA/IMAGE` (the pick to recognise it by, where another is in the running), `deviation/SIGMA/IMAGE` (what
        each pixel of what was found is expected to err by, where its method says), `prior/IMAGE`, `film/STEP`; of those that
        leak most `worst/truth/IMAGE` and `worst/SIGMA/IMAGE`.
      identification: how often the best attacker names the record among K candidates, and from which noise on seldom
        (`identify.measured`); None where it was not asked, as of audits of before.
      blind: pictures and key of a test for people (`blind.blind_test`); None where there is none.
      worst: of images that were picked out of a larger set because they seem to leak much, apart from all that is averaged: see
        `pick.Picked.told`, and "trials" as above, whose images count on from those audited. None where none was looked at.
    """

    about: dict[str, Any]
    trials: list[Row]
    curves: dict[str, dict[str, list[float | None]]]
    mean_image: list[Row]
    guarantees: list[dict[str, Any]]
    theory: dict[str, Any] | None
    pictures: dict[str, str]
    identification: dict[str, Any] | None = None
    blind: dict[str, Any] | None = None
    worst: dict[str, Any] | None = None

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

    @property
    def can_recognise(self) -> bool:
        """Whether there is another image beside the truth among which to look for it."""
        return self.has_truth and self.candidates > 1

    def at(self, sigma: float) -> list[Row]:
        """The attacks at one noise level."""
        return [row for row in self.attacks if row["sigma"] == sigma]

    def curve(self, row: Row) -> dict[str, np.ndarray]:
        """Gradient distance, PSNR of x0hat and, where measured, share of signal at each step of a trial; nan where none."""
        return {name: np.array(values, np.float64) for name, values in self.curves[curve_key(row)].items()}

    @functools.cached_property
    def memo(self) -> dict[str, Any]:
        """By name what was computed of this record and is asked for again; it is no part of the data."""
        return {}

    def to_csv(self) -> str:
        """A line a trial."""
        names = list(dict.fromkeys(name for row in self.trials for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.trials)
        return text.getvalue()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `report` wrote as audit.json; its summary follows from the rest, and what a later version added is left.

        Raises:
          ValueError: where the file is something else, or of another version of this format.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            version = data["format"]
            if version in READ:
                return cls(**{name: data[name] for name in _FIELDS if name in data})
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}; an audit leaves audit.json in its --out") from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not an audit.json that an audit wrote ({type(error).__name__}: {error})") from None
        later = isinstance(version, int) and version > FORMAT
        remedy = "read it with a later version of gdiff_jax" if later else "make it again"
        raise ValueError(f"{path} is of format {version!r}, this version reads {' and '.join(map(str, READ))}; {remedy}")


_FIELDS = tuple(field.name for field in dataclasses.fields(AuditRecord))


def curve_key(row: Row) -> str:
    """The name of a trial's curves."""
    return f"{row['method']}/{row['sigma']}/{row['leak']}/{row['seed']}"


def plain(value: Any) -> Any:
    """The value as JSON holds it: lists, dicts by strings, Python's numbers; a number that is not finite becomes None.

    Bytes of a path that are not UTF-8 are escaped.
    """
    if isinstance(value, dict):
        return {shown(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
