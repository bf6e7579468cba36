"""What the denoiser says of an estimate, against the posterior of Gaussian pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import float32

from gdiff_jax.samplers import denoise_estimate, posterior_deviation
from gdiff_jax.schedule import Schedule, make_betas

SHAPE = (4, 5, 1)
S = 0.5  # standard deviation of the pixels
ABAR = float32(np.cumprod(1 - make_betas()))
MEAN = jnp.full(SHAPE, 0.3)


def exact(x_t, t):
    """eps of pixels drawn from N(0, S^2)."""
    return jnp.sqrt(1 - ABAR[t]) / (S**2 * ABAR[t] + 1 - ABAR[t]) * x_t, None


def estimate(std, steps=100, clip=False, image=None):
    image = 0.3 * jax.random.normal(jax.random.key(0), SHAPE) if image is None else image
    schedule = Schedule.create(make_betas(), steps)
    return image, jax.jit(lambda std: denoise_estimate(exact, schedule, image, std, MEAN, clip=clip))(std)


@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("std", [0.02, 0.0733, 0.3, 1.0, 5.0])
def test_it_is_the_posterior_mean(std, steps):
    """Between kept steps too: only t is rounded, the level of the noise is not."""
    image, found = estimate(std, steps)
    np.testing.assert_allclose(found, image * S**2 / (S**2 + std**2), rtol=0.02, atol=2e-3)


def test_the_ends_of_the_schedule():
    image, found = estimate(1e-3)
    np.testing.assert_array_equal(found, image)
    for std in (1e4, np.inf):
        np.testing.assert_array_equal(estimate(std)[1], MEAN)
    np.testing.assert_array_equal(estimate(np.inf, image=jnp.full(SHAPE, jnp.nan))[1], MEAN)


def test_it_is_clipped_on_demand():
    image = jnp.full(SHAPE, 3.0)
    assert np.abs(estimate(1e-3, clip=True, image=image)[1]).max() == 1.0
    assert np.abs(estimate(0.1, image=image)[1]).min() > 2


def deviation(denoise, std, seed=0, shape=SHAPE):
    schedule = Schedule.create(make_betas(), 100)
    image = 0.3 * jax.random.normal(jax.random.key(1), shape)
    return jax.jit(lambda std: posterior_deviation(jax.random.key(seed), denoise, schedule, image, std))(std)


@pytest.mark.parametrize("std", [0.02, 0.0733, 0.3, 1.0, 5.0])
def test_the_deviation_is_that_of_the_posterior(std):
    np.testing.assert_allclose(deviation(exact, std), np.full(SHAPE, S * std / np.hypot(S, std)), rtol=0.02)


def test_the_deviation_of_pixels_that_hang_together():
    """Within a row and over channels, and the lower they lie the more they vary: what probes see of each other averages out."""
    shape, std = (6, 12, 3), 0.3
    row = 0.8 ** np.abs(np.subtract.outer(np.arange(12), np.arange(12)))
    scale = np.repeat(np.linspace(0.4, 0.6, 6), 36)
    covariance = np.kron(np.eye(6), np.kron(row, 0.5 * np.eye(3) + 0.5)) * np.outer(scale, scale)
    values, vectors = map(float32, np.linalg.eigh(covariance))

    def denoise(x_t, t):
        weights = jnp.sqrt(1 - ABAR[t]) / (values * ABAR[t] + 1 - ABAR[t])
        return (vectors @ (weights * (vectors.T @ x_t.ravel()))).reshape(shape), None

    posterior = np.linalg.inv(np.linalg.inv(covariance) + np.eye(covariance.shape[0]) / std**2)
    true = np.sqrt(np.diag(posterior)).reshape(shape)
    found = jax.vmap(lambda seed: deviation(denoise, std, seed, shape))(jnp.arange(64))
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(found), 0)), true, rtol=0.1)
    assert np.abs(found / true[None] - 1).mean() < 0.1  # one draw of signs is enough
    np.testing.assert_allclose(np.mean(np.square(found), (1, 2, 3)), np.mean(true**2), rtol=0.1)


def test_the_deviation_at_the_ends_of_the_schedule():
    np.testing.assert_allclose(deviation(exact, 1e-3), 1e-3, rtol=1e-6)
    np.testing.assert_array_equal(deviation(exact, 0.0), 0.0)
    for std in (1e4, np.inf):
        assert np.isnan(deviation(exact, std)).all()
