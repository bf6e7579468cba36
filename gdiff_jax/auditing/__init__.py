"""From a model to an answer: how bad is it if its gradient leaks, and how much noise is needed."""

from gdiff_jax.auditing.call import audit
from gdiff_jax.auditing.result import Audit

__all__ = ["Audit", "audit"]
