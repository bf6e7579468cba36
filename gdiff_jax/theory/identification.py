"""How often a leak names its record among K candidates: the best attacker, on these gradients and on the worst there are.

A record is one of K, each as likely. Its clipped gradient g_i, || g_i || <= C, is released as y = g_i + sigma n, n standard
normal, and an attacker who knows all K names one. The maximum-likelihood attacker is Bayes-optimal: it names the candidate with
the largest score <y, g_j> - || g_j ||^2 / 2, which is sigma^2 log p(y | j) but for what all candidates share.

**Which bound holds** [derived; a case of Hayes et al. 2023, arXiv 2302.07225]. Let mu = C / sigma, and Q the release of a
gradient of zero (add/remove adjacency), which knows nothing of i. An attacker names i with probability a_i under Q, and these
sum to 1. By Neyman and Pearson it names i with probability at most f(a_i) = Phi(Phi^-1(a_i) + mu) where i is the record, and f
is concave: its success, the mean over i, is at most f(1/K) = gamma(1/K). So the bound is of the mean over *all* candidates: of
one fixed record, or of a few among more candidates, it says nothing, as an attacker may favour those.

**Where it is met.** For K = 2 by g and -g with || g || = C: success is Phi(mu), which is gamma(1/2) [derived]. For more
candidates by none: equality needs each candidate's region to be a half-space of its own, and K > 2 half-spaces do not tile.
What comes closest is the regular simplex, of K gradients of norm C with cosines -1 / (K - 1) [inferred: the weak simplex
conjecture, unproven in general]. It reaches 87 % of gamma(1/K) or more for K up to 10^4 and all mu that were tried (0.27 to 6).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.integrate
from scipy.special import ndtr

DRAWS_AT_ONCE = 2**22  # numbers, of scores


def orthogonal_success(count: int, mu: float) -> float:
    """Success of the best attacker among `count` orthogonal gradients of norm mu sigma.

    It is the integral of phi(x) Phi(x + mu)^(K-1): in units of sigma || g || the scores are x + mu of the record and K - 1
    others, independent standard normals [derived].

    Args:
      count: K >= 1.
      mu: norm of the gradients over sigma, >= 0.
    """
    density = lambda x: np.exp(-x * x / 2) / np.sqrt(2 * np.pi) * ndtr(x + mu) ** (count - 1)
    return float(scipy.integrate.quad(density, -mu - 10, 12, limit=400, epsabs=1e-12)[0])


def simplex_success(count: int, mu: float) -> float:
    """The same of a regular simplex: the most that any gradients of norm mu sigma are known to give away.

    What its gradients share tells nothing, so it is as good as orthogonal ones sqrt(K / (K - 1)) times as long [derived].

    Args:
      count: K >= 2.
      mu: norm of the gradients over sigma, >= 0.
    """
    return orthogonal_success(count, mu * np.sqrt(count / (count - 1)))


def orders(rng: np.random.Generator, repetitions: int, pool: int, most: int) -> np.ndarray:
    """(repetitions, most) candidates of each repetition, drawn without order from a pool; the first is the record.

    So the record is one of the first K at random, for every K up to `most`, as the bound needs it.
    """
    return np.stack([rng.choice(pool, most, replace=False) for _ in range(repetitions)])


def identified(rng: np.random.Generator, scores: np.ndarray, order: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Whether the record has the highest score among the first K candidates; of equal scores one is named at random.

    Args:
      rng: which of equal ones is named.
      scores: (R, N), each release's score of each candidate of the pool.
      order: (R, M) of `orders`.
      counts: the K, each in 1 .. M.

    Returns:
      (R, len(counts)) bool.
    """
    placed = np.take_along_axis(scores, order, axis=1).T
    mine = placed[0]
    lot = rng.uniform(size=len(mine))
    higher, equal = placed > mine, placed == mine  # (M, R)
    named = lambda k: ~higher[:k].any(0) & (lot * equal[:k].sum(0) < 1)
    return np.stack([named(k) for k in counts], axis=1)


def expected_hits(
    rng: np.random.Generator, gram: np.ndarray, sigmas: Sequence[float], counts: Sequence[int], draws: int
) -> np.ndarray:
    """How often the best attacker would name the record among K of a pool of gradients, counted over draws of the noise.

    Scores need no gradient: of a record i they are G_ij + sigma <n, g_j> - G_jj / 2, and the <n, g_j> are jointly normal with
    the Gram matrix G as covariance. Exact in distribution [derived].

    Args:
      rng: of candidates and noise.
      gram: (N, N) inner products of the clipped gradients, float64.
      sigmas: standard deviations of the noise, > 0, in units of the gradient; one draw of noise serves all.
      counts: the K, each in 1 .. N.
      draws: how often.

    Returns:
      (len(sigmas), len(counts)) integers in 0 .. draws.
    """
    values, vectors = np.linalg.eigh(gram)
    root = vectors * np.sqrt(np.maximum(values, 0))  # rounding leaves eigenvalues of 0 a little below it
    found = np.zeros((len(sigmas), len(counts)), int)
    while draws > 0:
        some = min(draws, max(1, DRAWS_AT_ONCE // len(gram)))
        order = orders(rng, some, len(gram), max(counts))
        noise = rng.standard_normal((some, len(gram))) @ root.T
        clean = gram[order[:, 0]] - np.diag(gram) / 2
        for row, sigma in zip(found, sigmas, strict=True):
            row += identified(rng, clean + sigma * noise, order, counts).sum(0)
        draws -= some
    return found
