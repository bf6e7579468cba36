"""One call of the denoiser, against the posterior mean of Gaussian pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import float32

from gdiff_jax.samplers import denoise_estimate
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
