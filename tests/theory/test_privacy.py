"""The figures of method.md's table, dp_accounting's own to 1e-9, and independent derivations."""

import math

import dp_accounting
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from gdiff_jax.mechanisms import Chain, Clip, GaussianNoise, LaplaceNoise, PruneRepresentation, Sign, TopK, UniformNoise
from gdiff_jax.theory import privacy
from gdiff_jax.theory.privacy import gaussian_guarantee, guarantee, laplace_guarantee

# z, epsilon at delta 1e-5, advantage, TPR at 1 % FPR, gamma at kappa = 1e-4, with the digits that were written down.
TABLE = [
    ("0.3", "19.13", ".904", ".843", ".350"),
    ("0.5", "10.00", ".683", ".372", ".0428"),
    ("1", "4.38", ".383", ".0924", ".00327"),
    ("2", "1.99", ".197", ".0339", "6.4e-4"),
    ("4", ".926", ".0995", ".0189", "2.6e-4"),
]


def digits(text):
    """Half a unit of the last digit written."""
    mantissa, _, exponent = text.partition("e")
    return 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"z={r[0]}")
def test_the_table(row):
    g = gaussian_guarantee(float(row[0]), 1e-5)
    found = (g.epsilon, g.advantage, g.tpr(0.01), g.reconstruction_bound(1e-4))
    for value, text in zip(found, row[1:], strict=True):
        assert value == pytest.approx(float(text), abs=1.001 * digits(text))


@pytest.mark.parametrize("z", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_epsilon_delta_and_sigma_are_one_relation(z, delta):
    epsilon = privacy.gaussian_epsilon(z, delta)
    assert epsilon == pytest.approx(dp_accounting.get_epsilon_gaussian(z, delta), abs=1e-9)
    assert privacy.gaussian_delta(z, epsilon) == pytest.approx(delta, rel=1e-6)
    sigma = privacy.gaussian_noise_multiplier(epsilon, delta)
    assert sigma == pytest.approx(dp_accounting.get_sigma_gaussian(epsilon, delta), abs=1e-9)
    assert sigma == pytest.approx(z, rel=1e-6)


@pytest.mark.parametrize(("z", "epsilon"), [(0.5, 1.0), (1.0, 3.0), (2.0, 0.0)])
def test_delta_is_the_hockey_stick_divergence(z, epsilon):
    """Integrated from the two densities, which knows nothing of the closed form."""
    p, q = scipy.stats.norm(1, z), scipy.stats.norm(0, z)
    edge = z**2 * epsilon + 0.5  # where p = e^eps q
    found = scipy.integrate.quad(lambda t: p.pdf(t) - math.exp(epsilon) * q.pdf(t), edge, edge + 60 * z)[0]
    assert privacy.gaussian_delta(z, epsilon) == pytest.approx(found, abs=1e-9)


def test_tpr_and_advantage_are_the_likelihood_ratio_tests():
    """Of N(0, z^2) against N(1, z^2), by counting."""
    rng, z = np.random.default_rng(0), 0.7
    out, inside = rng.normal(0, z, 400_000), rng.normal(1, z, 400_000)
    g = gaussian_guarantee(z, 1e-5)
    for fpr in (0.01, 0.1):
        assert (inside > np.quantile(out, 1 - fpr)).mean() == pytest.approx(g.tpr(fpr), abs=0.005)
    best = max((inside > t).mean() - (out > t).mean() for t in np.linspace(0, 1, 21))
    assert best == pytest.approx(g.advantage, abs=0.005)


def test_steps_compose_as_one_gaussian():
    """And dp_accounting's composition of privacy loss distributions says the same, rounded up a little."""
    g = gaussian_guarantee(2.0, 1e-5, steps=16)
    assert (g.mu, g.epsilon) == (2.0, privacy.gaussian_epsilon(0.5, 1e-5))
    loss = dp_accounting.pld.privacy_loss_distribution.from_gaussian_mechanism(2.0).self_compose(16)
    assert loss.get_epsilon_for_delta(1e-5) == pytest.approx(g.epsilon, rel=1e-3)
    assert privacy.gaussian_noise_multiplier(g.epsilon, 1e-5, steps=16) == pytest.approx(2.0, rel=1e-6)


def test_subsampled_dp_sgd_equals_dp_accounting():
    z, q, steps, delta = 1.0, 0.01, 500, 1e-5
    g = gaussian_guarantee(z, delta, steps, q)
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z)), steps)
    theirs = dp_accounting.pld.PLDAccountant().compose(event)
    assert g.epsilon == pytest.approx(theirs.get_epsilon(delta), abs=1e-9)
    assert g.epsilon < gaussian_guarantee(z, delta, steps).epsilon / 10  # what subsampling is for
    assert g.mu is None
    # A bound on the power of every test: it is 0 and 1 at the ends, grows, and lies above chance.
    rates = np.array([0.0, 1e-4, 0.01, 0.1, 0.5, 1.0])
    powers = np.array([g.tpr(a) for a in rates])
    assert np.all(np.diff(powers) > 0)
    assert np.all(powers >= rates)
    assert powers[-1] == 1
    assert max(powers - rates) <= g.advantage + 1e-9


def test_the_numerical_power_bound_agrees_with_the_closed_form():
    """For the Gaussian both are known."""
    exact = gaussian_guarantee(0.8, 1e-5)
    loss = dp_accounting.pld.privacy_loss_distribution.from_gaussian_mechanism(0.8)
    numerical = privacy.Guarantee(exact.epsilon, 1e-5, _loss=loss)
    for fpr in (1e-4, 0.01, 0.1, 0.5, 0.9):
        assert numerical.tpr(fpr) == pytest.approx(exact.tpr(fpr), rel=2e-3)
        assert numerical.tpr(fpr) >= exact.tpr(fpr) - 1e-9
    assert numerical.advantage == pytest.approx(exact.advantage, rel=1e-3)


def test_laplace_is_pure():
    g = laplace_guarantee(math.sqrt(2) * 2.0, l1_sensitivity=1.0, delta=1e-5)  # scale b = 2
    assert g.epsilon == pytest.approx(0.5)
    assert g.reconstruction_bound(1e-4) == pytest.approx(1e-4 * math.exp(0.5))
    p = scipy.stats.laplace(1, 2)
    q = scipy.stats.laplace(0, 2)
    best = max(p.sf(t) - q.sf(t) for t in np.linspace(0, 1, 11))
    assert g.advantage >= best - 1e-12


def test_which_mechanisms_have_a_guarantee():
    size, delta = 10_000, 1e-5
    clipped = guarantee(Chain((Clip(2.0), GaussianNoise(1.0))), size, delta)
    assert clipped == gaussian_guarantee(0.5, delta)
    # Post-processing is free; what lets norms shrink only leaves the sensitivity as it was.
    assert guarantee(Chain((Clip(2.0), GaussianNoise(1.0), TopK(0.1), Sign())), size, delta) == clipped
    assert guarantee(Chain((Clip(2.0), TopK(0.1), GaussianNoise(1.0))), size, delta) == clipped
    assert guarantee(Chain((PruneRepresentation(None, "fc.kernel"), Clip(2.0), GaussianNoise(1.0))), size, delta) == clipped
    assert guarantee(Chain((Sign(), GaussianNoise(100.0))), size, delta) == gaussian_guarantee(1.0, delta)
    laplace = guarantee(Chain((Clip(2.0), LaplaceNoise(1.0))), size, delta)
    assert laplace.epsilon == pytest.approx(100 * 2.0 * math.sqrt(2))
    for mechanism, reason in (
        (GaussianNoise(1.0), "no clipping"),
        (Chain((GaussianNoise(1.0), Clip(1.0))), "no clipping before the noise"),
        # Without the example the first noise would be clipped and sent all the same: 2 C apart, not C.
        (Chain((GaussianNoise(1.0), Clip(1.0), GaussianNoise(1.0))), "no clipping before the noise"),
        (Chain((Clip(1.0), GaussianNoise(1.0), PruneRepresentation(None, "fc.kernel"))), "the pruned features"),
        (Chain((Clip(1.0), GaussianNoise(0.0))), "no noise"),
        (Clip(1.0), "no noise"),
        (Chain((Clip(1.0), UniformNoise(1.0))), "uniform noise"),
        (Chain(()), "no noise"),
    ):
        g = guarantee(mechanism, size, delta)
        assert (bool(g), g.epsilon, g.tpr(0.01), g.advantage) == (False, math.inf, 1.0, 1.0)
        assert str(g).startswith(f"none: {reason}")


@pytest.mark.parametrize(
    ("call", "value"),
    [
        (lambda: gaussian_guarantee(0.0, 1e-5), "z 0.0"),
        (lambda: gaussian_guarantee(1.0, 0.0), "delta 0.0"),
        (lambda: gaussian_guarantee(1.0, 1e-5, sampling_probability=1.5), "1.5"),
        (lambda: privacy.gaussian_noise_multiplier(-1.0, 1e-5), "-1.0"),
        (lambda: gaussian_guarantee(1.0, 1e-5).tpr(2.0), "2.0"),
        (lambda: guarantee(GaussianNoise(1.0), 10, 1.0), "delta 1.0"),
    ],
)
def test_bad_numbers_are_refused(call, value):
    with pytest.raises(ValueError, match=value):
        call()
