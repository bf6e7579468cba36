"""DLG, deep leakage from gradients (Zhu, Liu & Han, NeurIPS 2019): L-BFGS on the squared distance of the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from gdiff_jax.attacks import base
from gdiff_jax.trace import StepInfo


def dlg(
    key: jax.Array,
    objective: Callable[[Any], jax.Array],
    shape: tuple[int, ...],
    *,
    steps: int = 2000,
    restarts: int = 1,
    label_shape: tuple[int, ...] | None = None,
    truth: jax.Array | None = None,
) -> tuple[Any, StepInfo]:
    """One reconstruction by DLG.

    Args:
      key: typed PRNG key of the trial.
      objective: scalar distance of an image to the leak; DLG's is the squared L2 distance. It has no box and no image prior.
      shape: (H, W, C) of the image, or (B, H, W, C).
      steps: of L-BFGS, each with a line search of its own.
      restarts: starts drawn from a standard normal; the one of least objective is returned.
      label_shape: (classes,) or (B, classes): label logits are optimised too, as in the paper; the objective is then called
        with (image, logits), see `JointLabels`, and the result is such a pair.
      truth: only fills `x0_error` of the trace.

    Returns:
      image of `shape`, not confined to [-1, 1], and a trace of up to 100 steps.
    """
    # Where it is stuck, as on ReLU networks, every search goes to its end: with 20 evaluations at most it costs twice the time,
    # and gains nothing elsewhere either.
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=6, initial_guess_strategy="one")
    optimiser = optax.lbfgs(memory_size=100, linesearch=search)

    def run(key: jax.Array) -> base.Descent:
        start: Any = jax.random.normal(key, shape)
        if label_shape is not None:
            start = (start, jax.random.normal(jax.random.fold_in(key, 1), label_shape))
        return base.descend(start, objective, None, optimiser, lambda candidate: candidate, steps, truth)

    return base.best_of(key, run, restarts)
