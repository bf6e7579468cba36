"""Gauss-Newton steps inside the reverse loop, against the closed form of a linear residual and on one that is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdiff_jax.samplers import gauss_newton_sample, start_from
from gdiff_jax.samplers.gauss_newton import proximal
from gdiff_jax.schedule import Schedule, make_betas

SHAPE = (3, 2, 1)
MATRIX = jax.random.normal(jax.random.key(0), (4, 6))
ABAR = jnp.asarray(np.cumprod(1 - make_betas()), jnp.float32)


def exact(x_t, t):
    """eps of pixels drawn from N(0, 0.5^2)."""
    return jnp.sqrt(1 - ABAR[t]) / (0.25 * ABAR[t] + 1 - ABAR[t]) * x_t, None


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_of_a_linear_residual_the_update_is_the_closed_form(sigma):
    """Where noise is more than the residual."""
    leak, x0, precision = jnp.arange(4.0) / 10, jnp.full(SHAPE, 0.1), 3.0
    found = jax.jit(lambda x0: proximal(lambda x: [MATRIX @ x.ravel() - leak], x0, precision, sigma))(x0)
    damping = precision * sigma**2
    expected = np.linalg.solve(MATRIX.T @ MATRIX + damping * np.eye(6), MATRIX.T @ leak + damping * x0.ravel())
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-4)


def test_no_step_makes_it_worse():
    """A residual whose steps go much too far: a saturating one, far out."""
    residual, x0 = lambda x: jnp.tanh(3 * x) - 0.999, jnp.full(SHAPE, -1.5)
    x = proximal(residual, x0, jnp.asarray(1e-6), 0.0)
    assert float(jnp.sum(jnp.square(residual(x)))) <= float(jnp.sum(jnp.square(residual(x0))))


def test_it_ends_where_a_smooth_leak_says():
    truth = 0.4 * jax.random.normal(jax.random.key(1), SHAPE)
    leak_of = lambda x: jnp.tanh(jnp.concatenate([MATRIX, MATRIX[::-1] ** 2]) @ x.ravel())
    schedule = Schedule.create(make_betas(), 20)
    start = start_from(jax.random.key(2), schedule, truth + 0.05, 0.1)
    run = lambda key: gauss_newton_sample(
        key, exact, lambda x: leak_of(x) - leak_of(truth), schedule, SHAPE, 1e-3, start=start, truth=truth
    )
    image, trace = jax.jit(run)(jax.random.key(3))
    np.testing.assert_allclose(image, truth, atol=0.02)
    assert np.isnan(trace.distance[0])  # above the start
    assert float(trace.distance[-1]) < 0.05 < float(jnp.linalg.norm(leak_of(truth + 0.05) - leak_of(truth))) / 3
