"""The images of a batch from the gradient of a first layer that is dense and feeds a ReLU, with no prior.

With inputs X (B, inputs) and deltas D (B, neurons) that gradient is dL/dK = X^T D and dL/db = 1^T D, of rank B: the rows of D
span its row space, and each is zero wherever its image leaves a unit inactive, about half of them, so they are the sparsest
vectors there (SPEAR, Dimitrov et al., NeurIPS 2024, arXiv 2403.03945). SPEAR tries subsets of B - 1 units until one is
inactive for an image throughout, 2^(B - 1) of them. Here each row is sought as a minimum of the sum of |.| on the sphere, by
reweighted least squares from random starts (Qu, Sun & Wright 2014, arXiv 1412.4659; Daubechies et al. 2010), of which
tens do [our choice]. Float64 on the host's CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.attacks.base import eigh_alone
from gdiff_jax.first_dense import FirstDense

STARTS = 64  # at once
ROUNDS = 24  # of them at most
PATIENCE = 4  # rounds without a better answer, after which there is none under noise
STEPS, FIRST, SHRINK = 40, 2.0, 0.8  # of the reweighting: its floor falls from FIRST times the typical entry by SHRINK a step
NEAR = (1e-3, 1e-5, 0.0)  # of the typical entry: what counts as zero beside the noise, in one refinement after another
TYPICAL = 0.7  # of the largest share of zeros, from which on a direction is taken for a right one, and no longer sought
DEVIATIONS = 4.0  # of the noise, within which an entry counts as zero
ROUNDING = 30.0  # times the root mean square of rounding's errors, which counts as their deviation
AGREE = 0.999  # share of units that are active exactly where their delta is not zero, from which on the images explain them


class Factors(NamedTuple):
    """[X 1]^T D of a gradient.

    Attributes:
      inputs: (R, inputs).
      deltas: (R, neurons).
      agreement: share of units, over all rows, that are active exactly where their delta is not zero.
    """

    inputs: np.ndarray
    deltas: np.ndarray
    agreement: float


def _eigenvectors(matrices: jax.Array) -> jax.Array:
    """Of each; not by LAPACK's batches, which two leaks that are solved side by side would wait for."""
    return jax.vmap(eigh_alone)(matrices)[1]


@jax.jit
def sparse_directions(basis: jax.Array, noise: jax.Array, starts: jax.Array) -> jax.Array:
    """(K, R) of norm 1: local minima of || q basis ||_1 on the sphere.

    Args:
      basis: (R, n), of orthonormal rows.
      noise: (R,) standard deviation of the noise in the entries of each row: no entry is told from zero below it.
      starts: (K, R).
    """
    r, n = basis.shape
    products = (basis[:, None] * basis[None]).reshape(r * r, n).T

    def step(i: jax.Array, q: jax.Array) -> jax.Array:
        floor = jnp.maximum(FIRST * SHRINK**i / np.sqrt(n), 1e-9) + jnp.linalg.norm(q * noise, axis=1, keepdims=True)
        weights = 1 / jnp.maximum(jnp.abs(q @ basis), floor)
        return _eigenvectors((weights @ products).reshape(-1, r, r))[:, :, 0]

    return jax.lax.fori_loop(0, STEPS, step, starts / jnp.linalg.norm(starts, axis=1, keepdims=True))


@jax.jit
def refined(basis: jax.Array, noise: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The directions that vanish best on the units where these nearly do, and the share of units where they vanish."""
    r, n = basis.shape
    products = (basis[:, None] * basis[None]).reshape(r * r, n).T
    vanish = lambda q, near: jnp.abs(q @ basis) < near + DEVIATIONS * jnp.linalg.norm(q * noise, axis=1, keepdims=True)
    for near in NEAR:
        q = _eigenvectors((vanish(q, near / np.sqrt(n)) @ products).reshape(-1, r, r))[:, :, 0]
    return q, vanish(q, 0.0).mean(1)


def independent(q: np.ndarray, order: np.ndarray, count: int, least: float) -> list[int]:
    """Which of directions (K, R), at most so many, in an order from low to high, none near the span of those before."""
    chosen = list[int]()
    for k in np.argsort(order, kind="stable"):
        if len(chosen) < count and np.linalg.svd(q[[*chosen, k]], compute_uv=False)[-1] > least:
            chosen.append(int(k))
    return chosen


class Layer(NamedTuple):
    """What is known of the first layer.

    Attributes:
      rows: (inputs + 1, n) leaked gradient of kernel and bias.
      kernel, bias: (inputs, n) and (n,), the weights.
      values, basis: (R,) and (R, n), leading singular values of rows, and their right vectors.
      noise: standard deviation of the errors of rows.
    """

    rows: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    values: np.ndarray
    basis: np.ndarray
    noise: float

    def factors(self, deltas: np.ndarray) -> Factors:
        """With deltas (R, n) up to a factor each."""
        inputs = np.linalg.lstsq(deltas.T, self.rows.T, rcond=None)[0]
        scale = inputs[:, -1:]
        scale = np.where(scale == 0, 1e-30, scale)
        inputs, deltas = inputs[:, :-1] / scale, deltas * scale
        nonzero = np.abs(deltas) > DEVIATIONS * self.deviation(deltas)[:, None]
        active = inputs @ self.kernel + self.bias > 0
        return Factors(inputs, deltas, 1 - float((nonzero & ~active).mean()))

    def deviation(self, deltas: np.ndarray) -> np.ndarray:
        """(R,) of the errors of each delta's entries."""
        return self.noise * np.linalg.norm(deltas @ self.basis.T / self.values, axis=1)


def read_layer(names: FirstDense, params: Mapping[str, Any], leak: Mapping[str, Any], count: int, sigma: float) -> Layer:
    """Of a leak of `count` images; its rank is the number of those that differ."""
    wide = lambda a: np.asarray(a, np.float64)
    rows = np.concatenate([wide(names.kernel_of(leak)), wide(leak[names.bias])[None]])
    _, values, basis = np.linalg.svd(np.linalg.qr(rows, mode="r"), full_matrices=False)
    freedom = (len(rows) - count) * (rows.shape[1] - count)
    rounding = np.sqrt(np.square(values[count:]).sum() / max(freedom, 1))  # of all entries; of large ones it is larger
    noise = sigma if sigma > 0 else max(ROUNDING * rounding, 1e-14 * values[0])
    edge = noise * (np.sqrt(len(rows)) + np.sqrt(rows.shape[1]))  # of the largest singular value of noise alone
    rank = int((values[:count] > 1.02 * edge).sum())
    return Layer(rows, wide(names.kernel_of(params)), wide(params[names.bias]), values[:rank], basis[:rank], noise)


def factorise(layer: Layer, exact: bool, seed: int = 0) -> tuple[Factors | None, int]:
    """Inputs and deltas of a layer, and after how many starts; of an `exact` leak the search ends where they agree."""
    rank, noise = len(layer.basis), layer.noise / layer.values
    rng, least = np.random.default_rng(seed), max(1e-4, 3 * float(np.linalg.norm(noise)))
    found, zeros, known = np.zeros((0, rank)), np.zeros(0), np.zeros((0, rank))
    best, since = None, 0
    for k in range(ROUNDS):
        starts = rng.normal(size=(STARTS, rank))
        if k % 2:  # away from those that are found
            starts -= starts @ np.linalg.pinv(known) @ known
        q, share = jax.device_get(refined(layer.basis, noise, sparse_directions(layer.basis, noise, starts)))
        found, zeros = np.concatenate([found, q]), np.concatenate([zeros, share])
        since += 1
        # Without noise zeros tell best which are right, with noise the sum that was minimised.
        for order in (-zeros, np.abs(found @ layer.basis).sum(1)):
            chosen = independent(found, order, rank, least)
            if len(chosen) == rank:
                factors = layer.factors(found[chosen] @ layer.basis)
                if best is None or factors.agreement > best.agreement:
                    best, since = factors, 0
        known = found[chosen][zeros[chosen] > TYPICAL * zeros.max()][: rank - 1]
        if best is not None and (best.agreement >= AGREE if exact else since >= PATIENCE):
            break
    return best, (k + 1) * STARTS
