"""Mechanisms as text: `clip:1+gaussian` clips to norm 1, then adds Gaussian noise.

The number after a colon is the stage's own; the standard deviation of a noise is given apart, one text for a whole grid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import jax

from gdiff_jax.mechanisms.base import Chain, Mechanism, stages_of
from gdiff_jax.mechanisms.compression import Clip, RandomSparsification, Sign, StochasticQuantisation, TopK
from gdiff_jax.mechanisms.noise import GaussianNoise, LaplaceNoise, UniformNoise
from gdiff_jax.mechanisms.soteria import PruneRepresentation, soteria_mask

if TYPE_CHECKING:
    from gdiff_jax.theory.privacy import Guarantee

NOISES: dict[str, Callable[[Any], Any]] = {
    "gaussian": GaussianNoise,
    "laplace": LaplaceNoise,
    "uniform": UniformNoise,
}
# Stages with a number: what makes them, and what the number is.
NUMBERED: dict[str, tuple[Callable[[float], Any], str]] = {
    "clip": (Clip, "the norm, above 0"),
    "topk": (TopK, "the share of coordinates that is kept, in (0, 1]"),
    "random": (RandomSparsification, "the share of coordinates that is kept, in (0, 1]"),
    "qsgd": (lambda levels: StochasticQuantisation(int(levels)), "the number of levels, from 1 on"),
    "soteria": (lambda fraction: fraction, "the share of features that is pruned, in [0, 1)"),
}
_EXAMPLE = {"clip": "1", "topk": "0.1", "random": "0.1", "qsgd": "16", "soteria": "0.5"}
HELP = (
    "what happens to the gradient, stages joined by +: gaussian, laplace, uniform (noise of the grid's standard deviation), "
    "clip:NORM, topk:SHARE, random:SHARE, sign, qsgd:LEVELS, soteria:SHARE, none; such as clip:1+gaussian"
)


class HasFeatures(Protocol):
    """A network whose last dense layer's input can be asked for, which is what soteria prunes."""

    def features(self, params: Any, x: jax.Array) -> jax.Array: ...

    @property
    def last_kernel(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Spec:
    """A mechanism but for its sigma and what it needs of the private image."""

    text: str
    stages: tuple[tuple[str, float], ...]  # names and numbers (nan where there is none)

    @property
    def noisy(self) -> bool:
        return any(name in NOISES for name, _ in self.stages)

    @property
    def only_noise(self) -> bool:
        """Whether it is one noise of mean zero, or nothing at all."""
        return self.text in (*NOISES, "none")

    @property
    def clip_norm(self) -> float | None:
        """C, if this is the Gaussian mechanism `clip:C+gaussian`, of which sigma follows from epsilon; else None."""
        names = [name for name, _ in self.stages]
        return self.stages[0][1] if names == ["clip", "gaussian"] else None

    @property
    def hides_mask(self) -> bool:
        """Whether later stages fill the zeros of soteria's mask, which the image decides: the leak does not show it."""
        stages = stages_of(self.without_image(1.0))
        masked = [i for i, stage in enumerate(stages) if isinstance(stage, PruneRepresentation)]
        return any(not later.keeps_pattern for i in masked for later in stages[i + 1 :])

    def build(self, sigma: Any, prune: Callable[[float], Any]) -> Mechanism:
        """The mechanism. `prune(fraction)` makes a PruneRepresentation for the image at hand."""
        stages: list[Any] = []
        for name, number in self.stages:
            if name in NOISES:
                stages.append(NOISES[name](sigma))
            elif name == "soteria":
                stages.append(prune(number))
            else:
                stages.append(Sign() if name == "sign" else NUMBERED[name][0](number))
        return stages[0] if len(stages) == 1 else Chain(tuple(stages))

    def for_image(self, key: jax.Array, sigma: Any, victim: HasFeatures, params: Any, x: jax.Array) -> Mechanism:
        """The mechanism of a client that holds the image x."""

        def prune(fraction: float) -> PruneRepresentation:
            mask = soteria_mask(key, lambda x: victim.features(params, x), x, fraction)
            return PruneRepresentation(mask, victim.last_kernel)

        return self.build(sigma, prune)

    def without_image(self, sigma: Any) -> Mechanism:
        """The mechanism, to be asked what it is and not to be called: a soteria stage has no mask."""
        mask: Any = None
        return self.build(sigma, lambda _: PruneRepresentation(mask, ""))

    def guarantee(self, sigma: float, size: int, delta: float) -> Guarantee:
        """What one release of a gradient of `size` coordinates guarantees."""
        from gdiff_jax.theory import privacy  # not at the start, which need not wait a second for dp_accounting

        return privacy.guarantee(self.without_image(sigma), size, delta)


def parse(text: str) -> Spec:
    """The Spec of `text`.

    Raises:
      ValueError: naming the stage and what it takes.
    """
    stages = []
    for part in text.split("+") if text != "none" else []:
        name, colon, number = part.strip().partition(":")
        if name in NOISES or name == "sign":
            if colon:
                raise ValueError(f"mechanism {text!r}: {name} takes no number; a noise's sigma is the grid's")
            stages.append((name, math.nan))
            continue
        if name not in NUMBERED:
            known = ", ".join([*NOISES, *(f"{n}:NUMBER" for n in NUMBERED), "sign", "none"])
            raise ValueError(f"mechanism {text!r}: {name!r} is not known; known: {known}")
        make, what = NUMBERED[name]
        try:
            value = float(number)
            ok = math.isfinite(value) and (value > 0 or (name == "soteria" and value == 0))
            ok = ok and not (name == "soteria" and value >= 1) and not (name == "qsgd" and value != int(value))
            if not ok:
                raise ValueError
            make(value)
        except ValueError:
            raise ValueError(f"mechanism {text!r}: {part!r} needs {what}, such as {name}:{_EXAMPLE[name]}") from None
        stages.append((name, value))
    return Spec(text, tuple(stages))
