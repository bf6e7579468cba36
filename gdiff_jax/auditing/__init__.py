"""From a model to an answer: how bad is it if its gradient leaks, and how much noise is needed."""

from gdiff_jax.auditing.result import Audit
from gdiff_jax.auditing.run import audit

__all__ = ["Audit", "audit"]
