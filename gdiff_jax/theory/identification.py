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
EQUAL = 1e-13  # squared distance over squared norms, up to which two gradients are one: rounding of float64 and no more


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
    return rng.permuted(np.broadcast_to(np.arange(pool), (repetitions, pool)), axis=1)[:, :most]


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


def critical_noise(rng: np.random.Generator, gram: np.ndarray, counts: Sequence[int], draws: int) -> np.ndarray:
    """Of draws of record, candidates and noise: the sigma up to which the best attacker names the record, and above not.

    With d_j = || g_i - g_j || and standard normal n, the record i of y = g_i + sigma n has the highest score where
    sigma <n, g_j - g_i> <= d_j^2 / 2 for all other candidates j: up to the least d_j^2 / (2 <n, g_j - g_i>) of those with
    <n, g_j - g_i> > 0 [derived]. So success at *any* sigma is the share of draws that are at least that, it falls in sigma, and
    where it crosses a share is a quantile of them. No gradient is needed: the <n, g_j> are jointly normal, with the Gram matrix
    as covariance.

    Args:
      rng: of candidates and noise.
      gram: (N, N) inner products of the gradients as they meet the noise, float64.
      counts: the K, each in 1 .. N.
      draws: how many.

    Returns:
      (draws, len(counts)) in the units of the gradients: 0 where an equal candidate is named by lot, inf where no noise of that
      direction leads astray.
    """
    values, vectors = np.linalg.eigh(gram)
    root = vectors * np.sqrt(np.maximum(values, 0))  # rounding leaves eigenvalues of 0 a little below it
    norms = np.diag(gram)
    apart = norms[:, None] + norms[None] - 2 * gram
    apart = np.where(apart > EQUAL * (norms[:, None] + norms[None]), apart, 0)
    last = np.array(counts) - 1
    found = []
    while draws > 0:
        some = min(draws, max(1, DRAWS_AT_ONCE // len(gram)))
        order = orders(rng, some, len(gram), max(counts))
        record, others = order[:, :1], order[:, 1:]
        noise = rng.standard_normal((some, len(gram))) @ root.T
        astray = np.take_along_axis(noise, others, 1) - np.take_along_axis(noise, record, 1)
        squares = apart[record, others]
        equal = squares == 0
        inverse = np.divide(2 * astray, squares, out=np.zeros_like(astray), where=~equal & (astray > 0))
        inverse = np.maximum.accumulate(_and_first(inverse, 0.0), axis=1)[:, last]
        named = rng.uniform(size=(some, 1)) * np.cumsum(_and_first(equal, True), axis=1)[:, last] < 1
        found.append(np.where(named, np.divide(1, inverse, out=np.full_like(inverse, np.inf), where=inverse > 0), 0.0))
        draws -= some
    return np.concatenate(found)


def _and_first(others: np.ndarray, own: float) -> np.ndarray:
    """(R, M) of the other candidates and, first, the record."""
    return np.pad(others, ((0, 0), (1, 0)), constant_values=own)
