"""How well any attack can do: limits on the mean squared error from the Fisher information of the leaked gradient.

With Gaussian noise of standard deviation sigma on every coordinate, the Fisher information about the pixels is
J^T J / sigma^2. Errors are sums over the d pixels of images in [-1, 1]; divided by d, `psnr_from_error` makes decibels of
them. J is taken at one image: where the gradient is far from linear between that image and the attack's guess, the limits
are local ones and an attack may come out on either side of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cramer_rao(eigenvalues: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """Cramer-Rao: every *unbiased* attack has E|| x - xhat ||^2 >= sigma^2 tr((J^T J)^-1) [known]; inf if J^T J is singular.

    An attack with a prior is biased and may well do better. The smallest eigenvalues decide it, so give them in float64:
    those that are rounding, below d times epsilon of the largest, count as zero.

    Args:
      eigenvalues: (d,) of J^T J.
      sigma: standard deviation of the noise, >= 0.
    """
    edge = eigenvalues.size * jnp.finfo(eigenvalues.dtype).eps * eigenvalues.max()
    regular = eigenvalues > edge
    total = (1 / jnp.where(regular, eigenvalues, 1.0)).sum()
    return jnp.where(regular.all(), jnp.square(sigma) * total, jnp.inf)


def van_trees(gram: jax.Array, sigma: jax.Array | float, prior_information: jax.Array) -> jax.Array:
    """Van Trees: E|| x - xhat ||^2 >= tr((J^T J / sigma^2 + I_prior)^-1) for *every* attack, on average over the prior [known].

    With I_prior the inverse of the images' covariance it is exact for a Gaussian prior: the error of the posterior mean.
    Any other prior has more information than its covariance says, so for images this is the limit of an attacker who
    knows mean and covariance alone; a diffusion prior may go below it [inferred].

    Args:
      gram: (d, d) J^T J. Its mean over the prior makes this the limit; at one image it is a local one.
      sigma: standard deviation of the noise, > 0; at 0 the limit is 0 where J^T J is regular.
      prior_information: (d, d) Fisher information of the prior, positive definite.

    Returns:
      The limit, a scalar; nan where the sum is not positive definite.
    """
    root = jnp.linalg.cholesky(gram / jnp.square(sigma) + prior_information)
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    return jnp.square(jax.scipy.linalg.solve_triangular(root, identity, lower=True)).sum()


def shrunk_covariance(images: jax.Array, isotropic: float = 0.01) -> tuple[jax.Array, jax.Array]:
    """Mean (d,) and covariance (d, d) of flattened images (N, ...), positive definite for any N.

    The sample covariance, with a share `isotropic` of it replaced by its mean variance times the identity. More images need
    less; N well above d none.
    """
    if not 0 <= isotropic <= 1:
        raise ValueError(f"isotropic {isotropic} must lie in 0..1")
    flat = images.reshape(len(images), -1)
    mean = flat.mean(0)
    centred = flat - mean[None]
    sample = centred.T @ centred / (len(flat) - 1)
    d = flat.shape[1]
    return mean, (1 - isotropic) * sample + isotropic * jnp.trace(sample) / d * jnp.eye(d, dtype=flat.dtype)
