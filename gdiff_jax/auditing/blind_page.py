"""The blind test of an audit as a page to be printed: its questions, and on a sheet of its own the key, and how to score."""

from __future__ import annotations

import math
from typing import Any

from gdiff_jax.auditing import summary, templates
from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.auditing.templates import Table, table
from gdiff_jax.intervals import clopper_pearson


def scoring(questions: int, choices: int) -> Table:
    """What each number of right answers says: the share of Clopper and Pearson, and whether guessing explains it."""
    rows = []
    for right in range(questions + 1):
        share = clopper_pearson(right, questions)
        rows.append([str(right), share.percent(), "recognised" if share.low > 1 / choices else "may be guessed"])
    return table(("right", "share [95 %]", "is"), rows)


def render(record: AuditRecord) -> str:
    """The page, of a record that holds a test."""
    assert record.blind is not None
    test: dict[str, Any] = record.blind
    names = {row["image"]: str(row.get("name", row["image"])) for row in record.attacks}
    letters = [chr(ord("A") + k) for k in range(test["choices"])]
    key = [[str(k), letters[q["answer"]], names[q["image"]], q["method"]] for k, q in enumerate(test["questions"], 1)]
    level = next(v for v in summary.levels(record) if v.sigma == test["sigma"])
    return templates.render(
        "blind.html",
        about=record.about,
        test=test,
        letters=letters,
        key=table(("question", "answer", "image", "attack"), key),
        scoring=scoring(len(key), test["choices"]),
        level=level,
        epsilon=f"{level.epsilon:.4g}" if math.isfinite(level.epsilon) else "",
        figures={},
    )
