"""What may be expected to come back of an image, without an attack, of a leak that is linear in the pixels: closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import float32

from gdiff_jax.schedule import Schedule, make_betas
from gdiff_jax.theory import expected, spectrum

SHAPE, SLOPE, STD = (8, 8, 3), 4.0, 0.25
ABAR = float32(np.cumprod(1 - make_betas()))
SCHEDULE = Schedule.create(make_betas(), 100)
MEAN = jnp.zeros(SHAPE)
IMAGE = jnp.clip(STD * jax.random.normal(jax.random.key(5), SHAPE), -1, 1)


def denoise(x_t, t):
    """eps of pixels drawn from N(0, STD^2)."""
    return jnp.sqrt(1 - ABAR[t]) / (STD**2 * ABAR[t] + 1 - ABAR[t]) * x_t, None


def linear(params, x, y):
    """Whose gradient is SLOPE times the pixels."""
    return SLOPE * y * jnp.vdot(params["w"], x.ravel())


@jax.jit
def told(sigmas, y=1.0, clip_norm=None):
    params = {"w": jnp.zeros(IMAGE.size)}
    key = jax.random.key(0)
    return expected.expected_psnr(key, linear, params, IMAGE, y, sigmas, denoise, SCHEDULE, MEAN, clip_norm=clip_norm)


def test_what_noise_hides_is_the_trace():
    values = jnp.array([0.0, 0.01, 0.3, 2.0, 9.0, 100.0])
    starts = jax.random.rademacher(jax.random.key(0), (2, 6), jnp.float32)
    ritz = jax.jit(jax.vmap(lambda start: spectrum.lanczos(lambda v: values * v, start, 6)))(starts)
    for sigma in (0.1, 1.0, 10.0):
        hidden = float(expected.hidden_share(ritz, sigma, 0.25))
        assert hidden == pytest.approx(float((1 / (1 + 0.25 * values / sigma**2)).mean()), rel=1e-3)
        s = float(expected.equal_noise(hidden, 0.25))
        assert s**2 / (s**2 + 0.25) == pytest.approx(hidden, rel=1e-4)


def test_of_a_linear_leak_it_is_the_posterior_mean():
    """Whatever variance the spectrum was judged by: here noise is alike in all directions."""
    sigmas = np.array([0.2, 0.8, 4.0], np.float32)
    s = sigmas / SLOPE
    error = s**2 * STD**2 / (s**2 + STD**2)
    np.testing.assert_allclose(told(sigmas), 10 * np.log10(4 / error), atol=0.6)


def test_clipping_is_as_much_more_noise_as_it_shortens():
    norm = SLOPE * float(jnp.linalg.norm(IMAGE.ravel()))
    sigmas = np.array([0.2, 0.8], np.float32)
    np.testing.assert_allclose(told(sigmas, clip_norm=norm / 5), told(5 * sigmas), atol=1e-3)
    np.testing.assert_allclose(told(sigmas, clip_norm=2 * norm), told(sigmas), atol=1e-3)


def test_a_steeper_gradient_shows_more_and_none_shows_nothing_but_the_mean():
    sigmas = np.array([0.0, 0.8], np.float32)
    flat, one, ten = (told(sigmas, y=y) for y in (0.0, 1.0, 10.0))
    assert one[1] + 5 < ten[1]
    assert one[0] > 100
    of_mean = -10 * np.log10(float(jnp.square(IMAGE).mean()) / 4)
    assert flat[1] == pytest.approx(of_mean, abs=1e-3)
