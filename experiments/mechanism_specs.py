"""Mechanisms by what is written at the command line: `clip:1+gaussian` clips to norm 1, then adds Gaussian noise.

The number after a colon is the stage's own; the standard deviation of a noise comes from the grid of the sweep.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from experiments.cli import ConfigError
from gdiff_jax import mechanisms as m
from gdiff_jax.victims import Victim

if TYPE_CHECKING:
    from gdiff_jax.theory.privacy import Guarantee

NOISES: dict[str, Callable[[Any], Any]] = {
    "gaussian": m.GaussianNoise,
    "laplace": m.LaplaceNoise,
    "uniform": m.UniformNoise,
}
# Stages with a number: what makes them, and what the number is.
NUMBERED: dict[str, tuple[Callable[[float], Any], str]] = {
    "clip": (m.Clip, "the norm, above 0"),
    "topk": (m.TopK, "the share of coordinates that is kept, in (0, 1]"),
    "random": (m.RandomSparsification, "the share of coordinates that is kept, in (0, 1]"),
    "qsgd": (lambda levels: m.StochasticQuantisation(int(levels)), "the number of levels, from 1 on"),
    "soteria": (lambda fraction: fraction, "the share of features that is pruned, in [0, 1)"),
}
HELP = (
    "what happens to the gradient, stages joined by +: gaussian, laplace, uniform (noise of the grid's standard deviation), "
    "clip:NORM, topk:SHARE, random:SHARE, sign, qsgd:LEVELS, soteria:SHARE, none; such as clip:1+gaussian"
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """A mechanism but for its sigma and what it needs of the private image."""

    text: str
    stages: tuple[tuple[str, float], ...]  # names and numbers (nan where there is none)

    @property
    def noisy(self) -> bool:
        return any(name in NOISES for name, _ in self.stages)

    @property
    def clip_norm(self) -> float | None:
        """C, if this is the Gaussian mechanism `clip:C+gaussian`, of which sigma follows from epsilon; else None."""
        names = [name for name, _ in self.stages]
        return self.stages[0][1] if names == ["clip", "gaussian"] else None

    def build(self, sigma: Any, prune: Callable[[float], Any]) -> m.Mechanism:
        """The mechanism. `prune(fraction)` makes a PruneRepresentation for the image at hand."""
        stages = []
        for name, number in self.stages:
            if name in NOISES:
                stages.append(NOISES[name](sigma))
            elif name == "soteria":
                stages.append(prune(number))
            else:
                stages.append(m.Sign() if name == "sign" else NUMBERED[name][0](number))
        return stages[0] if len(stages) == 1 else m.Chain(tuple(stages))

    def for_image(self, key: jax.Array, sigma: Any, victim: Victim, params: Any, x: jax.Array) -> m.Mechanism:
        """The mechanism of a client that holds the image x."""

        def prune(fraction: float) -> m.PruneRepresentation:
            mask = m.soteria_mask(key, lambda x: victim.features(params, x), x, fraction)
            return m.PruneRepresentation(mask, victim.last_kernel)

        return self.build(sigma, prune)

    def guarantee(self, sigma: float, size: int, delta: float) -> Guarantee:
        """What one release of a gradient of `size` coordinates guarantees."""
        # The mask is never looked at: pruning lets norms shrink only.
        from gdiff_jax.theory import privacy  # not at the start, which need not wait a second for dp_accounting

        return privacy.guarantee(self.build(sigma, lambda _: m.PruneRepresentation(None, "")), size, delta)


def parse(text: str) -> Spec:
    """The Spec of `text`.

    Raises:
      ConfigError: naming the stage and what it takes.
    """
    stages = []
    for part in text.split("+") if text != "none" else []:
        name, colon, number = part.strip().partition(":")
        if name in NOISES or name == "sign":
            if colon:
                raise ConfigError(f"--mechanisms {text}: {name} takes no number; a noise's sigma is --sigma_grid's")
            stages.append((name, math.nan))
            continue
        if name not in NUMBERED:
            known = ", ".join([*NOISES, *(f"{n}:NUMBER" for n in NUMBERED), "sign", "none"])
            raise ConfigError(f"--mechanisms {text}: {name!r} is not known; known: {known}")
        make, what = NUMBERED[name]
        try:
            value = float(number)
            ok = math.isfinite(value) and (value > 0 or (name == "soteria" and value == 0))
            ok = ok and not (name == "soteria" and value >= 1) and not (name == "qsgd" and value != int(value))
            if not ok:
                raise ValueError
            make(value)
        except ValueError:
            raise ConfigError(f"--mechanisms {text}: {part!r} needs {what}, such as {name}:{_EXAMPLE[name]}") from None
        stages.append((name, value))
    return Spec(text, tuple(stages))


def hides_a_mask(text: str) -> bool:
    """Whether soteria's mask, which is made of the private image, cannot be read off the leak: later stages fill its zeros."""
    made = parse(text).build(1.0, lambda _: m.PruneRepresentation(None, ""))
    stages = made.stages if isinstance(made, m.Chain) else (made,)
    masked = [i for i, stage in enumerate(stages) if isinstance(stage, m.PruneRepresentation)]
    return any(not later.keeps_pattern for i in masked for later in stages[i + 1 :])


_EXAMPLE = {"clip": "1", "topk": "0.1", "random": "0.1", "qsgd": "16", "soteria": "0.5"}
