"""From trials as they ran to an audit: what needs the pictures (identification, LPIPS), and of these what the report shows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gdiff_jax import metrics
from gdiff_jax.auditing import pictures, summary, worst
from gdiff_jax.auditing.blind import blind_test
from gdiff_jax.auditing.pick import Picked
from gdiff_jax.auditing.record import COMBINED, SHOWN, AuditRecord, Row, curve_key, plain
from gdiff_jax.auditing.result import Audit
from gdiff_jax.modules import digest


@dataclasses.dataclass(frozen=True)
class Trials:
    """Trials as they ran, in one order.

    Attributes:
      rows: of each its method, sigma (None for prior-only), image, leak, seed, psnr, mse, distance, failed, ...
      images: of each its reconstruction, (H, W, C) in [-1, 1].
      traces: of each the arrays "distance" and "x0_error" of its steps, and "signal", which is nan or left out where it was
        not measured.
      deviations: of each what the attacker expects each pixel to err by, (H, W, C); None where the method does not say.
    """

    rows: Sequence[Row]
    images: Sequence[np.ndarray]
    traces: Sequence[Mapping[str, np.ndarray]]
    deviations: Sequence[np.ndarray | None]


def assemble(
    about: dict[str, Any],
    trials: Trials,
    truth: np.ndarray | None,
    *,
    candidates: np.ndarray,
    mean_image: np.ndarray | None,
    guarantees: list[dict[str, Any]],
    theory: dict[str, Any] | None,
    film: Sequence[np.ndarray],
    identification: dict[str, Any] | None = None,
    picked: tuple[Picked, Trials] | None = None,
) -> Audit:
    """The audit of these trials, exactly as it will be read back from its file.

    Args:
      about: see `AuditRecord`; needs threshold, share, delta, group, victim, num_images, seeds.
      trials: all of them, those of prior-only included.
      truth: private images (N, H, W, C) in [-1, 1], indexed by the rows' `image`; None where they are not known.
      candidates: (K, H, W, C) public or private images among which each truth is looked for; it is counted once.
      mean_image: (H, W, C), or None.
      guarantees: one a noise level.
      theory: of `theory.summary.summarise`, or None.
      film: images (H, W, C) of one reconstruction over the steps.
      identification: of `identify.measured`, or None.
      picked: images picked out of a larger set, and the attacks on them, which are counted on from those of `truth`.

    Raises:
      ValueError: where there are not as many rows as images, traces and deviations.
    """
    rows, beside = [dict(row) for row in trials.rows], [dict(row) for row in picked[1].rows] if picked else []
    scoring: dict[str, Any] = {}
    if truth is not None:
        no_lpips = metrics.lpips_hindrance(truth.shape[1:])
        scoring = {"candidates": metrics.candidate_count(candidates, truth), "recognised_by": "correlation"}
        scoring |= {"has_lpips": not no_lpips, "no_lpips": no_lpips}
        _score(rows, trials.images, truth, candidates, not no_lpips)
        if picked:
            every = np.concatenate([truth, picked[0].images])
            _score(beside, picked[1].images, every, candidates, not no_lpips)
    record = AuditRecord(
        about={"candidates": 0, "has_lpips": False, "no_lpips": "", **about, **scoring, "has_truth": truth is not None},
        trials=rows,
        curves={curve_key(row): _curve(trace) for row, trace in zip(rows, trials.traces, strict=True)},
        mean_image=[] if truth is None or mean_image is None else _mean_image_scores(mean_image, truth),
        guarantees=guarantees,
        theory=theory,
        pictures={},
        identification=identification,
        worst={**picked[0].told, "trials": beside} if picked else None,
    )
    shown = _pictures(record, trials, truth, film) | (
        _worst_pictures(record, trials, truth, picked) if truth is not None else {}
    )
    finished = record.can_recognise and not record.about.get("unfinished")
    test = blind_test(record, trials.images, truth, candidates) if truth is not None and finished else None
    return Audit(**plain(dataclasses.asdict(dataclasses.replace(record, pictures=shown, blind=test))))


def _score(rows: list[Row], images: Sequence[np.ndarray], truth: np.ndarray, candidates: np.ndarray, has_lpips: bool) -> None:
    """Puts ranks and, where it can be had, `lpips` into the rows of trials that did not fail, and its image's hash into each.

    By the hash two audits are compared on the same images, which their places in two sets do not tell.
    """
    hashes = [digest({repr(x.shape): np.asarray(x, np.float32)})[:16] for x in truth]
    for row in rows:
        row["image_sha256"] = hashes[row["image"]]
    for i, x in enumerate(truth):
        scored = [(row, image) for row, image in zip(rows, images, strict=True) if row["image"] == i and not row["failed"]]
        reconstructions = np.array([image for _, image in scored]).reshape(-1, *x.shape)
        scores: dict[str, Any] = {
            "rank": metrics.identification_ranks(reconstructions, x, candidates, metrics.patterns),
            "rank_in_pixels": metrics.identification_ranks(reconstructions, x, candidates),
            **({"lpips": metrics.lpips(reconstructions, x)} if has_lpips else {}),
        }
        for k, (row, _) in enumerate(scored):
            row |= {name: values[k].item() for name, values in scores.items()}


def _mean_image_scores(mean_image: np.ndarray, truth: np.ndarray) -> list[Row]:
    """Of each private image what a guess of the mean image scores."""
    scores = metrics.image_metrics(jnp.broadcast_to(mean_image, truth.shape), jnp.asarray(truth))
    return [{name: float(values[i]) for name, values in scores.items()} for i in range(len(truth))]


def _curve(trace: Mapping[str, np.ndarray]) -> dict[str, list[float | None]]:
    """A trace as `AuditRecord.curves` holds it: PSNR in dB in place of the squared error on [-1, 1]."""
    psnr = 10 * np.log10(4 / np.maximum(np.asarray(trace["x0_error"], np.float64), 4e-20))
    curve = {"distance": _rounded(trace["distance"]), "psnr": _rounded(psnr)}
    if "signal" in trace and np.isfinite(trace["signal"]).any():
        curve["signal"] = _rounded(trace["signal"])
    return curve


def _rounded(values: Any) -> list[float | None]:
    """To four digits, which curves need no more than."""
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in np.asarray(values, np.float64).tolist()]


def _pictures(record: AuditRecord, trials: Trials, truth: np.ndarray | None, film: Sequence[np.ndarray]) -> dict[str, str]:
    """Those that the sheets show, by the names of `AuditRecord.pictures`."""
    by_trial = lambda arrays: {_trial(row): array for row, array in zip(record.trials, arrays, strict=True)}
    reconstruction, deviation = by_trial(trials.images), by_trial(trials.deviations)
    png = lambda row: pictures.png(reconstruction[_trial(row)])
    shown = {} if truth is None else {f"truth/{i}": pictures.png(x) for i, x in enumerate(truth[:SHOWN])}
    both_kinds = truth is not None and len({method in COMBINED for method in record.methods}) > 1
    # Where the image is not known every leak is one of it, and its attempts are told apart by their seeds.
    is_kept, place = (_is_shown, "image") if truth is not None else (lambda row: row["seed"] < 2 * SHOWN, "seed")
    for sigma in record.sigmas:
        picks, to_recognise = (summary.attacker_picks(record.at(sigma), recognise) for recognise in (False, True))
        kept = [row for row in picks if is_kept(row)]
        shown |= {f"found/{sigma!r}/{row[place]}": png(row) for row in kept}
        errors = {row[place]: deviation[_trial(row)] for row in kept if "expected_psnr" in row}
        shown |= {f"deviation/{sigma!r}/{name}": pictures.deviation_png(error) for name, error in errors.items()}
        if both_kinds:
            shown |= {f"recognised/{sigma!r}/{row['image']}": png(row) for row in to_recognise if _is_shown(row)}
    shown |= {f"prior/{row['image']}": png(row) for row in record.prior_only if _is_shown(row)}
    return shown | {f"film/{k}": pictures.png(frame) for k, frame in enumerate(film)}


def _worst_pictures(
    record: AuditRecord, trials: Trials, truth: np.ndarray, picked: tuple[Picked, Trials] | None
) -> dict[str, str]:
    """Of the images that leak most, audited or picked: the truth, and what came of seed 0 at each noise level."""
    images = truth if picked is None else np.concatenate([truth, picked[0].images])
    every, made = (
        [*record.trials, *(record.worst or {}).get("trials", [])],
        [*trials.images, *(picked[1].images if picked else [])],
    )
    found = {_trial(row): image for row, image in zip(every, made, strict=True)}
    most = [leaking.image for leaking in worst.ranked(record)[: worst.SHOWN]]
    shown = {f"worst/truth/{i}": pictures.png(images[i]) for i in most}
    for sigma in record.sigmas:
        picks = summary.attacker_picks([r for r in every if r["sigma"] == sigma and r["image"] in most and r["seed"] == 0])
        shown |= {f"worst/{sigma!r}/{r['image']}": pictures.png(found[_trial(r)]) for r in picks}
    return shown


def _trial(row: Row) -> tuple[str, float | None, int, int]:
    """What tells a row from all others; images of a group share their leak."""
    return row["method"], row["sigma"], row["image"], row["seed"]


def _is_shown(row: Row) -> bool:
    return row["seed"] == 0 and row["image"] < SHOWN
