"""The spectrum of J^T J: its extremes, its effective rank, its density, from products with vectors alone.

With more parameters than pixels J J^T is singular, so where the paper writes lambda_min(J J^T) the d x d matrix J^T J is
meant [inferred]. The functions take any symmetric positive semi-definite `matvec` on vectors of length d, so
`lambda v: gram_vector(loss, params, x, y, v.reshape(x.shape)).ravel()` or the rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdiff_jax.theory.jacobian import Estimate

Matvec = Callable[[jax.Array], jax.Array]


def power_iteration(
    key: jax.Array, matvec: Matvec, d: int, iterations: int = 100, dtype: jnp.dtype = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """The largest eigenvalue, and the residual || A v - lambda v ||: some eigenvalue lies within it of the one returned.

    The value never exceeds the largest eigenvalue but by rounding. || J || is the root of it.
    """

    def step(v: jax.Array, _: None) -> tuple[jax.Array, None]:
        w = matvec(v)
        norm = jnp.linalg.norm(w)
        return jnp.where(norm > 0, w / jnp.where(norm > 0, norm, 1.0), v), None

    start = jax.random.normal(key, (d,), dtype)
    v, _ = jax.lax.scan(step, start / jnp.linalg.norm(start), length=iterations)
    w = matvec(v)
    value = jnp.vdot(v, w)
    return value, jnp.linalg.norm(w - value * v)


class Ritz(NamedTuple):
    """What `lanczos` knows of a spectrum after k steps from a unit vector q."""

    values: jax.Array  # (k,) approximate eigenvalues, ascending; all lie inside the spectrum
    weights: jax.Array  # (k,) squared components along q: q^T f(A) q is about sum(weights * f(values))
    residuals: jax.Array  # (k,) an eigenvalue lies within this distance of each value


def lanczos(matvec: Matvec, start: jax.Array, steps: int) -> Ritz:
    """Lanczos's tridiagonalisation with full reorthogonalisation (Golub & Van Loan, section 10.3).

    Where the Krylov space is exhausted before `steps`, the remaining values repeat the first Rayleigh quotient with
    weight 0.

    Args:
      matvec: A v for a vector (d,), A symmetric.
      start: (d,), not zero.
      steps: k, 1 <= k <= d; each costs one product, and memory for one vector.
    """
    d = start.size
    if not 1 <= steps <= d:
        raise ValueError(f"steps {steps} must lie in 1..{d}, the size of the matrix")
    q = start / jnp.linalg.norm(start)
    tiny = 10 * jnp.finfo(start.dtype).eps * d**0.5

    def body(carry: Any, k: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        basis, q, alive, scale, first = carry
        basis = basis.at[k].set(q)
        w = matvec(q)
        alpha = jnp.vdot(q, w)
        first = jnp.where(k == 0, alpha, first)
        for _ in range(2):  # once loses orthogonality, twice is enough
            w = w - basis.T @ (basis @ w)
        beta = jnp.linalg.norm(w)
        scale = jnp.maximum(scale, jnp.maximum(jnp.abs(alpha), beta))
        goes_on = alive & (beta > tiny * scale)
        off = jnp.where(goes_on, beta, 0.0)
        q = jnp.where(goes_on, w / jnp.where(goes_on, beta, 1.0), jnp.zeros_like(w))
        return (basis, q, goes_on, scale, first), (jnp.where(alive, alpha, first), off)

    zero = jnp.zeros((), start.dtype)
    carry = (jnp.zeros((steps, d), start.dtype), q, jnp.array(True), zero, zero)
    _, (alphas, betas) = jax.lax.scan(body, carry, jnp.arange(steps))
    matrix = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
    values, vectors = jnp.linalg.eigh(matrix)
    # Where it ended early, what was cut off is no more than rounding.
    return Ritz(values, jnp.square(vectors[0]), betas[-1] * jnp.abs(vectors[-1]) + tiny * jnp.abs(values).max())


def effective_rank(eigenvalues: jax.Array) -> jax.Array:
    """exp of the entropy of the eigenvalues' shares (Roy & Vetterli 2007, there of singular values), in [1, d].

    nan if all are 0.
    """
    positive = jnp.maximum(eigenvalues, 0.0)
    total = positive.sum()
    shares = positive / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1.0)), 0.0).sum()
    return jnp.where(total > 0, jnp.exp(entropy), jnp.nan)


class Spectrum(NamedTuple):
    """Matrix-free summary of J^T J."""

    largest: jax.Array
    largest_error: jax.Array  # an eigenvalue lies within this distance of it
    smallest: jax.Array  # an upper bound of lambda_min: Ritz values lie inside the spectrum, and the low end converges last
    smallest_error: jax.Array  # an eigenvalue lies within this distance of it, if not the smallest one
    trace: Estimate  # || J ||_F^2
    effective_rank: Estimate


def spectrum(
    key: jax.Array, matvec: Matvec, d: int, steps: int = 64, probes: int = 16, dtype: jnp.dtype = jnp.float32
) -> Spectrum:
    """Extremes by Lanczos, trace and effective rank by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017).

    Args:
      key: typed PRNG key of the probes.
      matvec: A v, A symmetric positive semi-definite.
      d: size of A.
      steps: Lanczos steps a probe, at most d.
      probes: random sign vectors, >= 2; standard errors are by the jackknife over them.
      dtype: of the vectors.
    """
    if probes < 2:
        raise ValueError(f"probes {probes} must be at least 2; the standard error needs them")
    starts = jax.random.rademacher(key, (probes, d), dtype)
    ritz = jax.lax.map(lambda v: lanczos(matvec, v, min(steps, d)), starts)
    values = jnp.maximum(ritz.values, 0.0)
    traces = d * (ritz.weights * values).sum(1)
    entropies = d * (ritz.weights * jnp.where(values > 0, values * jnp.log(jnp.where(values > 0, values, 1.0)), 0.0)).sum(1)

    def rank(trace: jax.Array, entropy: jax.Array) -> jax.Array:
        return jnp.exp(jnp.log(trace) - entropy / trace)  # -sum p log p with p = lambda / trace

    without = rank((traces.sum() - traces) / (probes - 1), (entropies.sum() - entropies) / (probes - 1))
    spread = jnp.sqrt((probes - 1) / probes * jnp.square(without - without.mean()).sum())
    top = jnp.argmax(ritz.values[:, -1])
    low = jnp.argmin(ritz.values[:, 0])
    return Spectrum(
        ritz.values[top, -1],
        ritz.residuals[top, -1],
        ritz.values[low, 0],
        ritz.residuals[low, 0],
        Estimate(traces.mean(), traces.std(ddof=1) / probes**0.5),
        Estimate(rank(traces.mean(), entropies.mean()), spread),
    )
