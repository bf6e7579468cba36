"""From a model to an answer: how bad is it if its gradient leaks, and how much noise is needed."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdiff_jax.auditing.call import audit
    from gdiff_jax.auditing.comparing.result import Comparison, compare
    from gdiff_jax.auditing.result import Audit

__all__ = ["Audit", "Comparison", "audit", "compare"]

_HOME = {"Audit": "result", "Comparison": "comparing.result", "audit": "call", "compare": "comparing.result"}


def __getattr__(name: str) -> Any:
    """Imported when asked for: the command, which needs the settings first, does not wait for all that an audit needs."""
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
