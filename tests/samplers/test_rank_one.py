"""Message passing in a rank-one matrix: what it says of its own error is right, and it ends where a known delta would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import float32

from gdiff_jax.samplers import RankOne, rank_one_mean
from gdiff_jax.schedule import Schedule, make_betas

SHAPE, NEURONS = (20, 20, 3), 200
S = 0.5  # standard deviation of the pixels
ABAR = float32(np.cumprod(1 - make_betas()))
MEAN = jnp.zeros(SHAPE)


def exact(x_t, t):
    """eps of pixels drawn from N(0, S^2)."""
    return jnp.sqrt(1 - ABAR[t]) / (S**2 * ABAR[t] + 1 - ABAR[t]) * x_t, None


def reached(sigma, cosine=0.7, scale=1.0, shift=0.0, seed=0):
    """Truth, what was found, deviations and trace; the network's delta errs by a random direction of the same length."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x = S * jax.random.normal(keys[0], SHAPE)
    delta, other = jnp.linalg.qr(jax.random.normal(keys[1], (NEURONS, 2)))[0].T
    network = cosine * delta + (1 - cosine**2) ** 0.5 * other
    rows = jnp.outer(jnp.append(scale * x + shift, 1.0), delta)
    rows += sigma * jax.random.normal(keys[2], rows.shape)
    leak = RankOne(rows[:-1], rows[-1], sigma, scale, shift)
    schedule = Schedule.create(make_betas(), 100)
    away = lambda image: jnp.linalg.norm(image - x)
    return x, *jax.jit(
        lambda leak: rank_one_mean(
            keys[3], exact, schedule, leak, lambda image: network, away, MEAN, clip=False, steps=8, truth=x
        )
    )(leak)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5])
def test_what_the_denoiser_is_told_of_the_error_is_right(sigma):
    """Without the term that takes off what the last image owes to the noise, it is not where the noise is large."""
    x, found, deviation, trace = reached(sigma)
    std = float(trace.guidance_norm[-1])
    estimate = found * (S**2 + std**2) / S**2  # the denoiser is linear
    assert np.sqrt(np.mean(np.square(estimate - x))) == pytest.approx(std, rel=0.1)
    assert float(jnp.vdot(estimate, x) / jnp.vdot(x, x)) == pytest.approx(1, abs=0.15)  # nor is its scale off
    assert np.sqrt(np.mean(np.square(found - x))) == pytest.approx(float(jnp.sqrt(jnp.mean(deviation**2))), rel=0.1)


@pytest.mark.parametrize(("sigma", "most"), [(0.03, 1.05), (0.1, 1.1), (0.3, 1.2)])
def test_it_ends_near_where_a_known_delta_would(sigma, most):
    *_, trace = reached(sigma)
    assert float(trace.x0_error[-1]) < most * S**2 * sigma**2 / (S**2 + sigma**2)


def test_a_network_that_is_wrong_is_not_believed_under_noise():
    """As with a wrong label: what then agrees is noise with itself."""
    believed = [bool(jnp.any(reached(0.8, cosine, seed=seed)[1] != MEAN)) for cosine in (0.9, 0.0) for seed in range(3)]
    assert believed == [True] * 3 + [False] * 3


def test_it_is_exact_without_noise_whatever_the_network_says():
    for cosine in (0.9, 0.1):
        x, found, deviation, _ = reached(0.0, cosine)
        np.testing.assert_allclose(found, x, atol=1e-4)
        np.testing.assert_array_equal(deviation, 0.0)


def test_what_lies_before_the_layer_is_undone():
    scale, shift = jnp.array([[[2.0, 2.1, 1.9]]]), jnp.array([[[0.3, -0.2, 0.1]]])
    x, found, deviation, trace = reached(0.2, scale=scale, shift=shift)
    assert np.sqrt(np.mean(np.square(found - x))) == pytest.approx(float(jnp.sqrt(jnp.mean(deviation**2))), rel=0.1)
    assert float(trace.x0_error[-1]) < 1.3 * S**2 * 0.1**2 / (S**2 + 0.1**2)


def test_where_nothing_is_left_it_is_the_mean_image():
    x, found, deviation, _ = reached(50.0)
    np.testing.assert_array_equal(found, MEAN)
    assert np.isnan(deviation).all()
    run = lambda value: rank_one_mean(
        jax.random.key(0), exact, Schedule.create(make_betas(), 100), RankOne(*value, 0.1), lambda x: jnp.ones(NEURONS),
        lambda x: jnp.zeros(()), MEAN + 0.2,
    )[0]  # fmt: skip
    shapes = (x.size, NEURONS), (NEURONS,)
    np.testing.assert_allclose(run([jnp.zeros(s) for s in shapes]), MEAN + 0.2)
    assert not np.isfinite(run([jnp.full(s, jnp.inf) for s in shapes])).any()
