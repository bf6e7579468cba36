"""The proximal sampler: its steps in closed form, and that it ends in what was measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdiff_jax as gd
from gdiff_jax.samplers import proximal

N = 6


def linear():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(9, N)), jnp.float32), jnp.asarray(rng.normal(size=9), jnp.float32)


def test_a_step_of_a_linear_residual_is_ridge_regression():
    a, b = linear()
    x0, variance = jnp.arange(N, dtype=jnp.float32), jnp.float32(0.3)
    x = proximal.gauss_newton(lambda x: [a @ x - b], jnp.zeros(N), x0, variance, iterations=30)
    expected = np.linalg.solve(a.T @ a + np.eye(N) / 0.3, a.T @ b + x0 / 0.3)
    np.testing.assert_allclose(x, expected, atol=1e-4)


@pytest.mark.parametrize("residual", [lambda x: [jnp.where(x > 0.5, jnp.nan, x)], lambda x: [jnp.full(N, jnp.nan)]])
def test_a_step_never_leads_where_nothing_is_finite(residual):
    x = proximal.gauss_newton(residual, jnp.full(N, 0.4), jnp.full(N, 3.0), jnp.float32(0.1), iterations=5)
    assert (x <= 0.5).all()


def test_a_step_shortens_until_it_descends():
    """Of atan, whose full Gauss-Newton step from 2 overshoots."""
    x = proximal.gauss_newton(lambda x: [10 * jnp.arctan(x)], jnp.full(N, 2.0), jnp.zeros(N), jnp.float32(1e6), iterations=5)
    assert (jnp.abs(x) < 2.0).all()


def test_it_ends_in_what_was_measured(gaussian):
    """With the exact prior and a measurement that determines the image up to a small error."""
    truth = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 1)) * 0.3, jnp.float32)
    schedule = gd.Schedule.create(num_steps=20)
    measured = lambda x, variance: lambda x: [(x - truth) / 0.01]
    sample = lambda key, truth: proximal.proximal_sample(
        key, gaussian, schedule, measured, truth.shape, levels=7, clip=False, truth=truth
    )
    x, trace = jax.jit(sample)(jax.random.key(0), truth)
    np.testing.assert_allclose(x, truth, atol=0.02)
    taken = ~np.isnan(trace.misfit)
    assert taken.sum() == 7
    assert taken[0]
    assert taken[-1]
    assert trace.x0_error[-1] < 1e-4


def test_a_misfit_of_too_small_deviations_is_reported(gaussian):
    """Two measurements that contradict each other by a hundred of their deviations."""
    schedule = gd.Schedule.create(num_steps=10)
    measured = lambda x, variance: lambda x: [(x - 0.1) / 1e-3, (x + 0.1) / 1e-3]
    _, trace = jax.jit(
        lambda key: proximal.proximal_sample(key, gaussian, schedule, measured, (2, 3, 1), levels=5, clip=False)
    )(jax.random.key(0))
    assert trace.misfit[-1] > 90
