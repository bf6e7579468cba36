"""What follows from an audit's data, beside them in audit.json: no reader has to compute it again. Pure NumPy."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from gdiff_jax.auditing import against_bound, sentences, summary, worst
from gdiff_jax.auditing.enough import enough
from gdiff_jax.auditing.record import FORMAT, AuditRecord, plain
from gdiff_jax.intervals import Interval

MORE = "more than was tried"  # in place of a sigma for which JSON has no number


def to_json(record: AuditRecord) -> str:
    """Strict JSON of audit.schema.json, from which `AuditRecord.load` gives the same audit."""
    data = {"format": FORMAT, "summary": answers(record), **dataclasses.asdict(record)}
    return json.dumps(plain(data), allow_nan=False)


def answers(record: AuditRecord) -> dict[str, Any]:
    """By name what the page says in words and tables; an interval as its value and both ends, None where there is none."""
    known = record.has_truth
    smallest = {
        "recovered": _of(summary.smallest_noise(record)) if known else None,
        "recovered_oracle": _of(summary.smallest_noise(record, oracle=True)) if known else None,
        "recognised": _of(summary.smallest_noise_to_hide(record)) if record.can_recognise else None,
    }
    return {
        "verdict": sentences.verdict(record),
        "warnings": sentences.warnings(record),
        "findings": against_bound.findings(record),
        "levels": [_level(record, level) for level in summary.levels(record)],
        "smallest_noise": smallest,
        "enough": [_of(noise) for noise in enough(record)],
        "worst": [_leaking(image) for image in worst.ranked(record)[: worst.SHOWN]],
        "against_bound": [_of(row) for row in against_bound.identified(record)],
    }


def _level(record: AuditRecord, level: summary.Level) -> dict[str, Any]:
    data = _of(dataclasses.replace(level, epsilon=level.epsilon if math.isfinite(level.epsilon) else math.nan))
    shares = data.pop("identified"), data.pop("identified_in_pixels")
    unmeasured = _of(Interval(math.nan, math.nan, math.nan))
    recognised, in_pixels = shares if record.can_recognise else (unmeasured, unmeasured)
    return {**data, "recognised": recognised, "recognised_in_pixels": in_pixels}


def _leaking(image: worst.Leaking) -> dict[str, Any]:
    return {**_of(image), "psnr": [None if math.isinf(v) else v for v in image.psnr]}


def _of(value: Any) -> Any:
    """Of dataclasses and intervals dicts by their fields' names, of infinity `MORE`."""
    if isinstance(value, Interval):
        return {name: _of(end) for name, end in value._asdict().items()}
    if dataclasses.is_dataclass(value):
        return {field.name: _of(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return MORE if isinstance(value, float) and math.isinf(value) else value
