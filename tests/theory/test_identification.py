"""The best attacker among K candidates: closed forms, the bound that none passes, and where it is met."""

import math

import numpy as np
import pytest
from scipy.special import ndtr

from gdiff_jax import intervals
from gdiff_jax.theory import identification
from gdiff_jax.theory.privacy import gaussian_guarantee

DRAWS = 40_000


def share(gram, sigma, count, draws=DRAWS, seed=0):
    """Success and its interval of 99.99 %: each test makes a few comparisons."""
    rng = np.random.default_rng(seed)
    ((hits,),) = identification.expected_hits(rng, np.asarray(gram, float), (sigma,), (count,), draws)
    return intervals.clopper_pearson(hits, draws, 1e-4)


def holds(interval, value):
    return interval.low < value < interval.high


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_of_two_the_success_is_that_of_their_distance(sigma):
    g = np.random.default_rng(1).normal(size=(2, 5))
    assert holds(share(g @ g.T, sigma, 2), ndtr(np.linalg.norm(g[0] - g[1]) / (2 * sigma)))


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
def test_opposite_gradients_meet_the_bound(mu):
    """The worst-case pair, in closed form: gamma(1/2) itself."""
    bound = gaussian_guarantee(1 / mu, 1e-5).reconstruction_bound(0.5)
    assert identification.simplex_success(2, mu) == pytest.approx(bound, abs=1e-9)
    assert holds(share([[1, -1], [-1, 1]], 1 / mu, 2), bound)


@pytest.mark.parametrize(("count", "mu"), [(3, 1.0), (10, 2.0), (100, 3.0)])
def test_orthogonal_and_simplex_gradients_have_their_integrals(count, mu):
    assert holds(share(np.eye(count), 1 / mu, count), identification.orthogonal_success(count, mu))
    simplex = (np.eye(count) * count - 1) / (count - 1)
    assert holds(share(simplex, 1 / mu, count), identification.simplex_success(count, mu))


def test_the_integral_is_the_one_of_a_grid():
    """And keeps its digits where it is small: a rule with other nodes."""
    x = np.linspace(-14, 14, 400_001)
    for count, mu in ((2, 0.0), (10, 1.0), (1000, 0.5), (10_000, 6.0)):
        grid = np.trapezoid(np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * ndtr(x + mu) ** (count - 1), x)
        assert identification.orthogonal_success(count, mu) == pytest.approx(grid, rel=1e-6)


@pytest.mark.parametrize("count", [2, 10, 100, 1000, 10_000])
@pytest.mark.parametrize("mu", [0.27, 1.0, 2.0, 4.0, 6.0])
def test_the_best_gradients_known_come_near_the_bound_and_not_above(count, mu):
    bound = gaussian_guarantee(1 / mu, 1e-5).reconstruction_bound(1 / count)
    assert 0.87 * bound < identification.simplex_success(count, mu) <= bound * (1 + 1e-9)


def test_no_gradients_in_the_ball_pass_the_bound():
    """Of any shape: alike, spread, some zero, in few dimensions; the bound is of the mean over all candidates."""
    rng = np.random.default_rng(2)
    for trial in range(40):
        count, dimensions, mu = int(rng.integers(2, 40)), int(rng.integers(1, 30)), rng.uniform(0.2, 5)
        g = rng.normal(size=(count, dimensions)) + rng.uniform(0, 3) * rng.normal(size=dimensions)
        g *= np.minimum(1, rng.uniform(0.2, 3) / np.linalg.norm(g, axis=1))[:, None]
        g /= max(1, np.linalg.norm(g, axis=1).max())
        g[rng.uniform(size=count) < 0.1] = 0
        bound = gaussian_guarantee(1 / mu, 1e-5).reconstruction_bound(1 / count)
        assert share(g @ g.T, 1 / mu, count, 2000, trial).low < bound


def test_candidates_are_drawn_from_a_larger_pool():
    """Of orthogonal ones any K are as good as any others, and equal ones are named by chance."""
    assert holds(share(np.eye(50), 0.5, 10), identification.orthogonal_success(10, 2.0))
    assert holds(share(np.ones((50, 50)), 0.5, 10), 0.1)
    assert holds(share(np.zeros((50, 50)), 0.5, 10), 0.1)


def test_several_noise_levels_and_counts_at_once():
    rng = np.random.default_rng(3)
    hits = identification.expected_hits(rng, np.eye(30), (0.3, 1.0), (2, 10, 30), DRAWS)
    for row, mu in zip(hits, (1 / 0.3, 1.0), strict=True):
        for found, count in zip(row, (2, 10, 30), strict=True):
            assert holds(intervals.clopper_pearson(found, DRAWS, 1e-4), identification.orthogonal_success(count, mu))


def test_scores_say_who_is_named():
    order = np.array([[2, 0, 1], [0, 1, 2]])
    scores = np.array([[1.0, 5.0, 3.0], [4.0, 2.0, 3.0]])
    rng = np.random.default_rng(0)
    found = identification.identified(rng, scores, order, (1, 2, 3))
    assert found.tolist() == [[True, True, False], [True, True, True]]


def test_orders_hold_no_candidate_twice_and_any_first():
    order = identification.orders(np.random.default_rng(0), 500, 7, 5)
    assert order.shape == (500, 5)
    assert all(len(set(row)) == 5 for row in order.tolist())
    assert set(order[:, 0].tolist()) == set(range(7))
