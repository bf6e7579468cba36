"""The log of a training: a row of JSON a checkpoint, which is written before it, so that each checkpoint has its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gdiff_jax.files import write_atomic

Row = dict[str, Any]  # step; loss, the mean since the row before; heldout, eps-MSE by timestep; seconds since the row before


def read(path: Path) -> list[Row]:
    """The rows that are whole, in their order; a machine that stops may cut one short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def cut(path: Path, last: int) -> None:
    """Takes away the rows after a step, whose checkpoints were never whole: what they tell of is done again."""
    if path.is_file():
        kept = [row for row in read(path) if row["step"] <= last]
        write_atomic(path, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8"))


def add(path: Path, row: Row) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
