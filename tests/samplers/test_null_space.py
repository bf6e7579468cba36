"""A null space that is filled: the system's part stays, inequalities hold, and zeros that round its sizes change nothing."""

import jax
import numpy as np
from objectives import float32

from gdiff_jax import Schedule
from gdiff_jax.samplers import NullSpace, null_space_of, null_space_sample
from gdiff_jax.schedule import make_betas

SHAPE, OPEN = (4, 4, 1), 5
RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.normal(size=(16, OPEN)))[0]
MATRIX, BOUND = RNG.normal(size=(3, OPEN)), np.array([-0.1, 0.05, 0.2])
IMAGE = (np.eye(16) - BASIS @ BASIS.T) @ RNG.uniform(-1, 1, 16)


def sampled(space):
    schedule = Schedule.create(make_betas(), 50)
    denoise = lambda x, t: (0.3 * x, None)
    sample = lambda key: null_space_sample(key, denoise, schedule, float32(IMAGE.reshape(SHAPE)), space)[0]
    return np.asarray(jax.jit(sample)(jax.random.key(0))).ravel()


def test_zeros_that_round_the_sizes_change_nothing():
    plain = NullSpace(*(float32(a) for a in (BASIS, MATRIX, BOUND)))
    padded = null_space_of(BASIS, MATRIX, BOUND, multiple=8)
    assert padded.basis.shape == (16, 8)
    assert padded.matrix.shape == (8, 8)
    np.testing.assert_allclose(sampled(padded), sampled(plain), atol=1e-5)


def test_the_systems_part_stays_and_the_inequalities_hold():
    away = sampled(null_space_of(BASIS, MATRIX, BOUND)) - IMAGE
    np.testing.assert_allclose(away, BASIS @ (BASIS.T @ away), atol=1e-5)
    assert (MATRIX @ (BASIS.T @ away) <= BOUND + 0.02).all()
    assert np.abs(BASIS.T @ away).max() > 0.01


def test_a_space_without_inequalities_is_filled():
    away = sampled(null_space_of(BASIS, np.zeros((0, OPEN)), np.zeros(0))) - IMAGE
    np.testing.assert_allclose(away, BASIS @ (BASIS.T @ away), atol=1e-5)
