"""What the direct inversions share: descent on an objective as one scan, and restarts of which the objective chooses one.

Their call shape is a sampler's without the prior: `image, trace = attack(key, objective, shape, ...)`, pure, for one trial; a
batch of trials is a `jax.vmap` over keys and objectives. Nothing here knows of diffusion or of victims.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gdiff_jax.trace import StepInfo, x0_error

TRACE_LENGTH = 100  # of the trace of a descent, however many steps it has


class Descent(NamedTuple):
    """Where one descent ended: the candidate, what was minimised there, and the trace on the way."""

    candidate: Any
    value: jax.Array
    trace: StepInfo


@jax.custom_batching.sequential_vmap
def eigh_alone(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of a symmetric matrix; of a batch, one after the other.

    A batch given to LAPACK waits for threads of XLA:CPU's pool (jaxlib 0.10's ParallelBatchMap). Two devices of a CPU that do
    so from within the pool wait for ever.
    """
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


def image_of(candidate: Any) -> jax.Array:
    """The image of a candidate that is an image, or (image, label logits)."""
    return candidate[0] if isinstance(candidate, tuple) else candidate


def descend(
    start: Any,
    objective: Callable[[Any], jax.Array],
    penalty: Callable[[Any], jax.Array] | None,
    optimiser: optax.GradientTransformation,
    project: Callable[[Any], Any],
    steps: int,
    truth: jax.Array | None,
) -> Descent:
    """`steps` steps of the optimiser on objective + penalty, each followed by `project`.

    The trace has TRACE_LENGTH entries, evenly spaced, each taken before its step (every step where there are fewer).
    """
    optimiser = optax.with_extra_args_support(optimiser)
    total = lambda candidate: objective(candidate) + (0.0 if penalty is None else penalty(candidate))

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], StepInfo]:
        candidate, state = carry
        value, grad = jax.value_and_grad(total)(candidate)
        with jax.numpy_dtype_promotion("standard"):  # inside optax
            updates, state = optimiser.update(grad, state, candidate, value=value, grad=grad, value_fn=total)
        distance = value if penalty is None else value - penalty(candidate)
        info = StepInfo(distance, optax.tree.norm(grad), x0_error(jnp.clip(image_of(candidate), -1.0, 1.0), truth))
        return (project(optax.apply_updates(candidate, updates)), state), info

    def several(carry: tuple[Any, Any], count: int) -> tuple[tuple[Any, Any], StepInfo]:
        first, info = step(carry, None)
        return jax.lax.fori_loop(1, count, lambda _, c: step(c, None)[0], first), info

    every = -(-steps // TRACE_LENGTH)
    carry = (start, optimiser.init(start))
    carry, trace = jax.lax.scan(lambda c, _: several(c, every), carry, length=steps // every)
    if rest := steps % every:
        carry = several(carry, rest)[0]
    return Descent(carry[0], total(carry[0]), trace)


def best_of(key: jax.Array, run: Callable[[jax.Array], Descent], restarts: int) -> tuple[Any, StepInfo]:
    """Of `restarts` runs, at once, the one that ended with the least value: what an attacker can select, no truth involved."""
    if restarts < 1:
        raise ValueError(f"restarts {restarts} must be at least 1")
    if restarts == 1:
        candidate, _, trace = run(key)
        return candidate, trace
    ends = jax.vmap(run)(jax.random.split(key, restarts))
    least = jnp.argmin(jnp.where(jnp.isfinite(ends.value), ends.value, jnp.inf))
    candidate, trace = jax.tree.map(lambda a: a[least], (ends.candidate, ends.trace))
    return candidate, trace
