"""A blind test: whether a person recognises a private image by what came back of it, among others. Printed, with its key.

Of each image one question, at the noise from which on few are recovered: whether that is enough for an eye is what neither PSNR
nor a rank among candidates tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gdiff_jax.auditing import pictures, summary
from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.intervals import clopper_pearson
from gdiff_jax.metrics import unlike
from gdiff_jax.modules import digest

CHOICES = 6  # images to choose from, the right one among them
QUESTIONS = 12  # at most, for two or three sheets of paper
LARGEST = 64  # pixels; of larger images what came back would be told by its sharpness alone, and the page be large


def blind_test(
    record: AuditRecord, images: Sequence[np.ndarray], truth: np.ndarray, candidates: np.ndarray
) -> dict[str, Any] | None:
    """Questions and their key, for `AuditRecord.blind`; None where even all right answers could be luck.

    Args:
      record: whose trials are scored.
      images: of each trial its reconstruction, (H, W, C) in [-1, 1].
      truth: (N, H, W, C) private images.
      candidates: (K, H, W, C), distinct; wrong answers are drawn from those that are not the private image itself.
    """
    choices = min(CHOICES, record.candidates)
    sigma = _sigma(record)
    picks = summary.attacker_picks(record.at(sigma), recognise=True)
    place = {id(row): k for k, row in enumerate(record.trials)}
    asked = [(row, images[place[id(row)]]) for row in picks if row["seed"] == 0][:QUESTIONS]
    if choices < 2 or clopper_pearson(len(asked), max(len(asked), 1)).low <= 1 / choices:
        return None
    # Of the pictures: who has done one test learns no places for the next, and the same audit gives the same.
    seed = int(digest({str(k): np.asarray(image, np.float32) for k, (_, image) in enumerate(asked)})[:8], 16)
    rng = np.random.default_rng(seed)
    questions = []
    for k in rng.permutation(len(asked)):
        row, image = asked[k]
        own = truth[row["image"]]
        wrong = rng.choice(np.flatnonzero(unlike(candidates, own)), choices - 1, replace=False)
        answer = int(rng.integers(choices))
        shown = [pictures.png(picture, LARGEST) for picture in np.insert(candidates[wrong], answer, own, axis=0)]
        found = pictures.png(image, LARGEST)
        questions.append(
            {"image": row["image"], "method": row["method"], "found": found, "candidates": shown, "answer": answer}
        )
    return {"sigma": sigma, "seed": seed, "choices": choices, "questions": questions}


def _sigma(record: AuditRecord) -> float:
    """The least noise tried at which few are recovered; the most, where that is at none."""
    enough = summary.smallest_noise(record).value
    return next((sigma for sigma in record.sigmas if sigma >= enough), record.sigmas[-1])
