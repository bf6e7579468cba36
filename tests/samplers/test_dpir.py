"""Plug-and-play restoration: its steps in closed form, and that it ends in what was measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import float32

import gdiff_jax as gd
from gdiff_jax.samplers.dpir import ITERATIONS, LAST, LEAST, SETTLING, gauss_newton, last_level, plug_and_play

N = 6
SHAPE = (2, 3, 1)


def linear():
    rng = np.random.default_rng(0)
    return float32(rng.normal(size=(9, N))), float32(rng.normal(size=9))


def test_a_step_of_a_linear_residual_is_ridge_regression():
    a, b = linear()
    x0, variance = jnp.arange(N, dtype=jnp.float32), jnp.float32(0.3)
    x = gauss_newton(lambda x: [a @ x - b], jnp.zeros(N), x0, variance, iterations=30, tolerance=1e-6)
    expected = np.linalg.solve(a.T @ a + np.eye(N) / 0.3, a.T @ b + x0 / 0.3)
    np.testing.assert_allclose(x, expected, atol=1e-4)


def test_what_is_measured_two_hundred_times_less_well_is_reached():
    """As under little noise, where 40 conjugate gradients a step are too few."""
    scales = jnp.logspace(0, 2.3, 300).reshape(10, 10, 3)
    true = float32(0.5 * np.random.default_rng(1).normal(size=(10, 10, 3)))
    zero, prior = jnp.zeros_like(true), jax.tree_util.Partial(lambda x, t: (jnp.zeros_like(x), None))
    measured, schedule = lambda *_: lambda x: [scales * (x - true)], gd.Schedule.create(num_steps=50)
    end = lambda n: plug_and_play(zero, prior, schedule, measured, zero, first=1.0, ratio=0.9, clip=False, iterations=n)
    error = lambda n: jnp.linalg.norm(jax.jit(end, static_argnums=0)(n) - true) / jnp.linalg.norm(true)
    assert error(ITERATIONS) < 0.02 < error(40)


@pytest.mark.parametrize("residual", [lambda x: [jnp.where(x > 0.5, jnp.nan, x)], lambda x: [jnp.full(N, jnp.nan)]])
def test_a_step_never_leads_where_nothing_is_finite(residual):
    x = gauss_newton(residual, jnp.full(N, 0.4), jnp.full(N, 3.0), jnp.float32(0.1), iterations=5)
    assert (x <= 0.5).all()


def test_a_step_shortens_until_it_descends():
    """Of atan, whose full Gauss-Newton step from 2 overshoots."""
    x = gauss_newton(lambda x: [10 * jnp.arctan(x)], jnp.full(N, 2.0), jnp.zeros(N), jnp.float32(1e6), iterations=5)
    assert (jnp.abs(x) < 2.0).all()


def restored(prior, start, measured, **options):
    schedule, settings = gd.Schedule.create(num_steps=50), dict(first=0.5, ratio=0.73, clip=False) | options
    return jax.jit(lambda x: plug_and_play(x, prior, schedule, measured, jnp.zeros_like(x), **settings))(start)


def test_it_ends_in_what_was_measured(gaussian):
    """Of a curved residual, from far off."""
    truth = float32(np.random.default_rng(1).normal(size=SHAPE) * 0.3)
    measured = lambda x, level: lambda x: [(jnp.tanh(x) - jnp.tanh(truth)) / 1e-3]
    x = restored(gaussian, truth + 0.5, measured)
    np.testing.assert_allclose(x, truth, atol=2e-3)


def test_momentum_goes_farther_along_a_valley_that_bends():
    """In as many steps, of Rosenbrock's valley; and where there is one end, it is that."""
    flat = jax.tree_util.Partial(lambda x, t: (jnp.zeros_like(x), None))  # expects each image as it is
    start, settings = float32([[[-1.2], [1.0]]]), dict(first=0.3, last=0.11, ratio=0.98)
    valley = lambda *_: lambda x: [10 * (x[0, 1] - jnp.square(x[0, 0])), 1 - x[0, 0]]
    left = lambda measured, momentum: jnp.abs(1 - restored(flat, start, measured, momentum=momentum, **settings)).max()
    assert left(valley, 0.9) < 0.1 * left(valley, 0.0)
    straight = lambda *_: lambda x: [3 * (x - 1)]
    assert left(straight, 0.9) < 0.01


def test_momentum_that_leads_where_nothing_is_finite_is_given_up():
    """It begins anew where it was: behind the end lies nan."""
    flat = jax.tree_util.Partial(lambda x, t: (jnp.zeros_like(x), None))
    measured = lambda *_: lambda x: [jnp.where(x > 0.5, jnp.nan, 3 * (x - 0.45))]
    x = restored(flat, jnp.full(SHAPE, -1.0), measured, first=0.3, last=0.11, ratio=0.98, momentum=0.9)
    np.testing.assert_allclose(x, 0.45, atol=1e-3)


def test_without_levels_above_it_momentum_changes_nothing(gaussian):
    measured, start = lambda *_: lambda x: [(jnp.tanh(x) - 0.2) / 1e-3], jnp.zeros(SHAPE)
    ends = [restored(gaussian, start, measured, first=SETTLING, last=0.01, momentum=momentum) for momentum in (0.0, 0.9)]
    np.testing.assert_array_equal(*ends)


def test_what_is_measured_badly_is_nearer_to_what_the_prior_expects(gaussian):
    """Between the prior's mean and the measurement, as the mean of a posterior is; and of all starts the same."""
    truth = 2 * gaussian.mean.reshape(SHAPE)  # two means from zero
    measured = lambda x, level: lambda x: [(x - truth) / 0.5]
    ends = [restored(gaussian, start, measured, ratio=0.92) for start in (truth, jnp.zeros(SHAPE))]
    mean = gaussian.mean.reshape(SHAPE)
    for x in ends:
        assert jnp.linalg.norm(x - truth) < jnp.linalg.norm(mean - truth)
        assert jnp.linalg.norm(x - mean) < jnp.linalg.norm(mean - truth)


def test_blocks_that_contradict_each_other_count_by_their_sizes(gaussian):
    """A block whose deviations are a thousand times too small does not outweigh one that is right."""
    one, other = jnp.full(SHAPE, 0.2), jnp.full(SHAPE, -0.2)
    measured = lambda x, level: lambda x: [(x - one) / 0.05, (x - other) / 1e-4]
    x = restored(gaussian, jnp.zeros(SHAPE), measured)
    tempered = jnp.abs(x - one).max()
    assert tempered < 0.35


@pytest.mark.parametrize("start", [0.1, jnp.nan])
def test_without_a_finite_residual_the_start_is_returned(gaussian, start):
    measured = lambda x, level: lambda x: [jnp.full(SHAPE, jnp.nan)]
    x = restored(gaussian, jnp.full(SHAPE, start), measured)
    np.testing.assert_array_equal(x, jnp.full(SHAPE, start))


def test_the_last_level_falls_with_the_noise_between_its_bounds():
    levels = [float(last_level(jnp.float32(noise), jnp.float32(2.0))) for noise in (0.0, 1e-5, 0.02, 0.04, 1.0)]
    np.testing.assert_allclose(levels, [LEAST, LEAST, 0.003, 0.006, LAST], rtol=1e-5)
    assert float(last_level(jnp.float32(1.0), jnp.float32(0.0))) == pytest.approx(LAST)


def test_under_less_noise_it_ends_closer_and_each_trial_by_its_own(gaussian):
    """Each lane of a vmap as many steps as its own last level asks for."""
    truth = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE) * 0.3, jnp.float32)
    asked = lambda last: restored(gaussian, truth + 0.5, lambda x, level: lambda x: [(x - truth) / 0.05], last=last)
    lasts = jnp.array([0.2, 0.01])
    ends = jax.vmap(asked)(lasts)
    for end, last in zip(ends, lasts, strict=True):
        np.testing.assert_allclose(end, asked(last), atol=1e-5)
    errors = [float(jnp.abs(end - truth).max()) for end in ends]
    assert errors[1] < 0.3 * errors[0]


def test_levels_that_do_not_fall_are_refused(gaussian):
    with pytest.raises(ValueError, match=r"ratio 1\.0"):
        restored(gaussian, jnp.zeros(SHAPE), lambda x, level: lambda x: [x], ratio=1.0)
