"""The best attacker among K candidates: closed forms, the bound that none passes, and where it is met."""

import math

import numpy as np
import pytest
import scipy.optimize
from scipy.special import ndtr, ndtri

from gdiff_jax import intervals
from gdiff_jax.auditing.enough import robust_noise_multiplier
from gdiff_jax.theory import identification
from gdiff_jax.theory.privacy import gaussian_guarantee

DRAWS = 40_000


def share(gram, sigma, count, draws=DRAWS, seed=0):
    """Success and its interval of 99.99 %: each test makes a few comparisons."""
    rng = np.random.default_rng(seed)
    critical = identification.critical_noise(rng, np.asarray(gram, float), (count,), draws)
    return intervals.clopper_pearson((critical >= sigma).sum(), draws, 1e-4)


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
    critical = identification.critical_noise(rng, np.eye(30), (2, 10, 30), DRAWS)
    for mu in (1 / 0.3, 1.0):
        for found, count in zip((critical >= 1 / mu).sum(0), (2, 10, 30), strict=True):
            assert holds(intervals.clopper_pearson(found, DRAWS, 1e-4), identification.orthogonal_success(count, mu))


def test_a_draw_is_named_up_to_its_critical_noise_and_not_above():
    """By the scores of the leak itself, of gradients that are given, some of them twice."""
    g = np.random.default_rng(4).normal(size=(6, 3))
    g[5] = g[0]
    critical = identification.critical_noise(np.random.default_rng(5), g @ g.T, (3, 6), 500)
    rng = np.random.default_rng(5)
    order, noise = identification.orders(rng, 500, 6, 6), rng.standard_normal((500, 6))
    values, vectors = np.linalg.eigh(g @ g.T)
    products = noise @ (vectors * np.sqrt(np.maximum(values, 0))).T  # <n, g_j>
    for row, inner, limits in zip(order, products, critical, strict=True):
        score = lambda sigma, i=row[0], inner=inner: g @ g[i] + sigma * inner - np.square(g).sum(1) / 2
        for k, limit in zip((3, 6), limits, strict=True):
            if 0 < limit < np.inf:
                others = row[1:k]
                assert (score(limit * 0.999)[row[0]] > score(limit * 0.999)[others] - 1e-6 * limit).all()
                assert (score(limit * 1.001)[row[0]] < score(limit * 1.001)[others]).any()
    twice = np.isin(order[:, 0], (0, 5))
    assert 0.4 < (critical[twice, 1] == 0).mean() < 0.6
    assert (critical[~twice] > 0).all()


@pytest.mark.parametrize(("count", "share"), [(2, 0.9), (10, 0.5), (20, 0.3)])
def test_the_noise_where_success_crosses_a_share_is_that_of_closed_forms(count, share):
    """Of the simplex; of two it is d / (2 Phi^-1(share)), which is the root of gamma(1/2) too."""
    simplex = (np.eye(count) * count - 1) / (count - 1)
    critical = identification.critical_noise(np.random.default_rng(6), simplex, (count,), 100_000)
    found = intervals.upper_quantile(critical[:, 0], share)
    root = scipy.optimize.brentq(lambda sigma: identification.simplex_success(count, 1 / sigma) - share, 0.1, 10)
    assert found.value == pytest.approx(root, rel=0.01)
    assert found.low < root < found.high
    if count == 2:
        assert root == pytest.approx(1 / ndtri(share))
        assert root == pytest.approx(robust_noise_multiplier(share, 0.5))


def test_the_interval_of_a_quantile_covers_it():
    rng = np.random.default_rng(7)
    for draws, share in ((10, 0.1), (200, 0.1), (30, 0.9)):
        found = [intervals.upper_quantile(-np.log(rng.uniform(size=draws)), share) for _ in range(1000)]
        missed = np.mean([not f.low < -np.log(share) <= f.high for f in found])
        assert missed < 0.05 + 3 * math.sqrt(0.05 / 1000)
    assert intervals.upper_quantile(np.arange(10.0), 0.3) == (7.0, 3.0, math.inf)
    assert intervals.upper_quantile(np.array([1.0, 2.0]), 0.4) == (2.0, 0.0, math.inf)


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
