"""The tokens of a dense layer whose outputs' positions are learned, under noise: a linear system with errors in its matrix.

With A (T, d_in) and Delta (T, d_out) the position gradient, dL/dK = A^T Delta + N. Delta is measured with the same noise, which
enters as A^T N': as if dL/dK had noise of variance sigma^2 (1 + E|a|^2), a an input of all tokens [our choice: not correlated].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Tokens(NamedTuple):
    """tokens (T, d_in), the posterior mean, and std (T,) of the error of each token's entries."""

    tokens: np.ndarray
    std: np.ndarray


def tokens_under_noise(
    kernel_gradient: np.ndarray, delta: np.ndarray, sigma: float, mean: np.ndarray, variance: float
) -> Tokens:
    """The posterior mean of the inputs whose entries are `mean` + Gaussian of `variance`, in float64.

    Args:
      kernel_gradient: (d_in, d_out).
      delta: (T, d_out), dL/dZ of each token.
      sigma: standard deviation of the noise in both, > 0. Where sigma sqrt(d_out) is not small against delta's singular values,
        noise passes for delta there, and the error is larger than `std` says.
      mean: (T, d_in).
      variance: of an entry, > 0; of pixels in [-1, 1] 0.1 gave more than 0.25 [measured].
    """
    gradient, delta, mean = (np.asarray(a, np.float64) for a in (kernel_gradient, delta, mean))
    noise = sigma**2 * (1 + len(delta) * variance + np.square(mean).sum(0).mean())
    covariance = np.linalg.inv(delta @ delta.T / noise + np.eye(len(delta)) / variance)
    away = covariance @ (delta @ (gradient - mean.T @ delta).T / noise)
    return Tokens(mean + away, np.sqrt(np.diag(covariance)))
