"""What can be said without an attack: vulnerability, spectrum, Jensen bounds, limits, and privacy guarantees.

| question | module |
|---|---|
| how strongly does the gradient answer to the pixels (RV, I2F, shares of the layers) | `jacobian` |
| which directions of the image does it show (extremes, effective rank) | `spectrum` |
| what does judging x0hat instead of x0 cost (Theorems 1 and 2) | `jensen` |
| how well can any attack do (Cramer-Rao, van Trees) | `limits` |
| all of it for one victim, in plain numbers | `summary` |
| what does the noise guarantee (epsilon, delta, mu, advantage, gamma) | `privacy` |
| how close may an attacker come to an image, by the spectrum and the prior | `expected` |
| how often does a leak name its record among K candidates | `identification` |
"""

import importlib
from types import ModuleType

_SUBMODULES = ("expected", "identification", "jacobian", "jensen", "limits", "privacy", "spectrum", "summary")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:  # when it is asked for: privacy waits half a second for dp_accounting
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
