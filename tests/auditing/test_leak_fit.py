"""A leak against a gradient: what noise explains, and what it does not, over many draws."""

import numpy as np
import pytest

from gdiff_jax.auditing.leak_fit import fit

COUNT = 4000


def drawn(seed, factor=1.0, sigma=0.0, other=False):
    """A gradient of norm about 1, and a leak that is `factor` times it, or another gradient, with noise."""
    rng = np.random.default_rng(seed)
    own, another, noise = rng.normal(size=(3, COUNT)) / np.sqrt(COUNT)
    leak = factor * (another if other else own) + np.sqrt(COUNT) * sigma * noise
    cut = lambda a: {"a": a[:3000].reshape(30, 100), "b": a[3000:]}
    return fit(cut(leak), cut(own), sigma)


@pytest.mark.parametrize("sigma", [0.0, 0.001, 0.02, 0.1, 1.0])
def test_the_own_gradient_is_never_taken_for_another(sigma):
    assert all(drawn(seed, sigma=sigma).is_own for seed in range(50))


@pytest.mark.parametrize("sigma", [0.0, 0.001, 0.02, 0.1])
@pytest.mark.parametrize("other", [dict(other=True), dict(factor=37.0), dict(factor=0.1), dict(factor=-1.0)])
def test_another_gradient_is_never_taken_for_it(sigma, other):
    found = [drawn(seed, sigma=sigma, **other) for seed in range(50)]
    assert not any(f.is_own for f in found)
    if "factor" in other and abs(other["factor"]) > 5 * sigma:
        assert all(f.is_scaled for f in found)
        assert np.mean([f.factor for f in found]) == pytest.approx(other["factor"], abs=5 * sigma)
    assert not any(f.is_scaled for f in found if other.get("other"))


def test_noise_that_hides_all_tells_nothing():
    found = drawn(0, sigma=1.0, other=True)
    assert found.is_own
    assert not found.tells


def test_the_numbers_of_a_fit_are_those_of_its_parts():
    own, rest = np.array([3.0, 0.0, 0.0]), np.array([0.0, 4.0, 0.0])
    found = fit({"a": 2 * own + rest}, {"a": own}, 0.3)
    assert (found.factor, found.error, found.count) == (2.0, pytest.approx(0.1), 3)
    assert found.cosine == pytest.approx(6 / np.sqrt(52))
    assert found.off == pytest.approx(5 / 3)
    assert found.off_scaled == pytest.approx(4 / 6)
    assert fit({"a": 0 * own}, {"a": own}, 0.0).cosine == 0
