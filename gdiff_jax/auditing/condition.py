"""Under which condition an audit is to fail, as in a pipeline: `recovered > 0.1`. Pure Python."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable

from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.auditing.summary import Level, levels

MEASURES: dict[str, Callable[[Level], float]] = {
    "recovered": lambda level: level.recovered.value,
    "recognised": lambda level: level.identified.value,
    "psnr": lambda level: level.psnr.value,
    "ssim": lambda level: level.ssim.value,
}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


@dataclasses.dataclass(frozen=True)
class Condition:
    """A measure of a noise level against a bound; see `parse`."""

    measure: str
    comparison: str
    bound: float

    def __str__(self) -> str:
        return f"{self.measure} {self.comparison} {self.bound:g}"

    def met(self, record: AuditRecord) -> list[str]:
        """The noise levels at which it holds, in words, each with its value; one that was not measured counts as one.

        The value is the measured one, not an end of its interval.
        """
        found = []
        for level in levels(record):
            value = MEASURES[self.measure](level)
            if math.isnan(value):
                found.append(f"sigma {level.sigma:.3g} (not measured)")
            elif COMPARISONS[self.comparison](value, self.bound):
                found.append(f"sigma {level.sigma:.3g} ({value:.3g})")
        return found


def parse(text: str) -> Condition:
    """Of `MEASURE COMPARISON NUMBER`; shares lie in [0, 1], PSNR is in dB, both medians and shares are of the attacker's picks.

    Raises:
      ValueError: with what may stand there.
    """
    parts = re.fullmatch(r"\s*([a-z]+)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
    if parts and parts[1] in MEASURES:
        try:
            bound = float(parts[3])
        except ValueError:
            bound = math.nan
        if math.isfinite(bound):
            if parts[1] in ("recovered", "recognised") and not 0 <= bound <= 1:
                raise ValueError(f"{text!r}: {parts[1]} is a share, and {bound:g} does not lie in 0..1; 10 % is 0.1")
            return Condition(parts[1], parts[2], bound)
    raise ValueError(
        f"{text!r} is no condition; give one of {', '.join(MEASURES)}, one of {' '.join(COMPARISONS)} and a number, such as "
        "'recovered > 0.1'"
    )
