"""Jensen's gap and the limits where everything is known: a Gaussian prior, a victim linear in the image, Gaussian noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK_RUN
from objectives import float32

from gdiff_jax import GradientMatching, Schedule, dps_sample, dsg_sample, l2, squared_l2
from gdiff_jax.samplers import base, dps_step
from gdiff_jax.schedule import make_betas
from gdiff_jax.theory import jensen, limits

SHAPE = (2, 3, 1)
SIGMA = 0.3
TRIALS = 4000


def linear_loss(params, x, y):
    """<W, y x>: the label y holds the matrix M, the gradient is M x."""
    return params @ (y @ x.ravel())


@pytest.fixture(scope="module")
def bed(gaussian):
    """Mean m, covariance C, matrix M; private images of the prior and their leaks; the limit."""
    rng = np.random.default_rng(11)
    m, c = (np.asarray(a, np.float64) for a in (gaussian.mean, gaussian.cov))
    matrix = rng.normal(size=(8, 6))
    truth = rng.multivariate_normal(m, c, 20 * TRIALS)
    leak = truth @ matrix.T + SIGMA * rng.normal(size=(20 * TRIALS, 8))
    with jax.enable_x64(True):
        limit = float(limits.van_trees(jnp.asarray(matrix.T @ matrix), SIGMA, jnp.linalg.inv(jnp.asarray(c))))
    return m, c, matrix, truth, leak, limit


def posterior_mean(bed):
    m, c, matrix, _, leak, _ = bed
    gain = c @ matrix.T @ np.linalg.inv(matrix @ c @ matrix.T + SIGMA**2 * np.eye(8))
    return m + (leak - m @ matrix.T) @ gain.T


def error(reconstruction, truth):
    """Mean of || x - xhat ||^2 and its standard error."""
    squares = np.square(reconstruction - truth).sum(1)
    return squares.mean(), squares.std() / len(squares) ** 0.5


def test_van_trees_is_reached_by_the_posterior_mean_and_by_no_less(bed):
    """The limit must equal the error of the best attack: were either wrong by 5 %, this would fail."""
    _, _, _, truth, _, limit = bed
    mean, standard_error = error(posterior_mean(bed), truth)
    assert standard_error < 0.015 * limit
    assert mean == pytest.approx(limit, abs=3 * standard_error)
    assert abs(mean / 1.05 - limit) > 3 * standard_error / 1.05  # an optimistic error of 5 % would be caught
    assert abs(mean * 1.05 - limit) > 3 * standard_error * 1.05


def attacks(gaussian, bed):
    """Every sampler on the first TRIALS leaks, as (TRIALS, 6)."""
    _, _, matrix, _, leak, _ = bed
    schedule = Schedule.create(num_steps=100)
    make = functools.partial(GradientMatching, jnp.zeros(8), float32(matrix), loss=linear_loss)
    l2_of, squared_of = (functools.partial(make, distance=d) for d in (l2, squared_l2))
    samplers = {
        "dps l2": lambda k, g: dps_sample(k, gaussian, l2_of(leak=g), schedule, SHAPE, zeta=0.1, clip=False),
        "dps squared": lambda k, g: dps_sample(k, gaussian, squared_of(leak=g), schedule, SHAPE, zeta=0.05, clip=False),
        "dsg": lambda k, g: dsg_sample(k, gaussian, l2_of(leak=g), schedule, SHAPE, guidance_rate=0.2, clip=False),
    }
    leaks = float32(leak[:TRIALS])
    for name, sample in samplers.items():
        keys = jax.random.split(jax.random.key(3), TRIALS)
        found = jax.jit(jax.vmap(lambda k, g, s=sample: s(k, g)[0]), compiler_options=QUICK_RUN)(keys, leaks)
        yield name, np.asarray(found, np.float64).reshape(TRIALS, 6)


def test_no_attack_beats_van_trees_on_average(gaussian, bed):
    _, _, matrix, truth, leak, limit = bed
    found = dict(attacks(gaussian, bed))
    found["least squares"] = leak @ np.linalg.pinv(matrix).T
    for name, reconstruction in found.items():
        mean, standard_error = error(reconstruction, truth[: len(reconstruction)])
        assert mean > limit - 2 * standard_error, name


def test_mean_of_exact_likelihood_samples_is_the_closed_form_and_reaches_the_limit(gaussian, bed):
    """One leak each for a few private images: DPS with the exact likelihood at each step, averaged over many samples."""
    _, c, matrix, _, leak, limit = bed
    betas = make_betas()
    schedule, whitening = Schedule.create(), []
    for abar in np.cumprod(1 - betas):
        cov_x0 = np.linalg.inv(np.linalg.inv(c) + abar / (1 - abar) * np.eye(6))
        whitening.append(np.linalg.inv(np.linalg.cholesky(SIGMA**2 * np.eye(8) + matrix @ cov_x0 @ matrix.T)))
    w = np.stack(whitening)
    matrices = float32(w @ matrix)
    zeta = float32(betas / np.sqrt(1 - betas) / 2)

    def sample(key, leaks):
        def step(key, x, i):
            match = GradientMatching(jnp.zeros(8), matrices[i], leaks[i], linear_loss, squared_l2)
            return dps_step(key, x, i, gaussian, match, schedule, zeta=zeta[i], clip=False)

        return base.reverse(key, step, schedule, SHAPE)[0]

    few, draws = 6, 400
    run = jax.jit(jax.vmap(jax.vmap(sample, (0, None)), (None, 0)), compiler_options=QUICK_RUN)
    leaks = float32(np.einsum("tij,nj->nti", w, leak[:few]))
    samples = np.asarray(run(jax.random.split(jax.random.key(5), draws), leaks), np.float64).reshape(few, draws, 6)
    closed = posterior_mean(bed)[:few]
    spread = samples.std(1) / draws**0.5
    assert np.all(np.abs(samples.mean(1) - closed) < 5 * spread + 0.02 * np.sqrt(np.diag(c)).max())
    # A single sample of the posterior errs twice as much as its mean.
    own = np.square(samples - closed[:, None]).sum(2).mean()
    assert own == pytest.approx(limit, rel=0.1)


def test_cramer_rao_is_the_error_of_least_squares(bed):
    """Which is unbiased and efficient here; and a singular J^T J admits no unbiased attack."""
    _, _, matrix, truth, leak, limit = bed
    mean, standard_error = error(leak @ np.linalg.pinv(matrix).T, truth)
    values = np.linalg.eigvalsh(matrix.T @ matrix)
    bound = float(limits.cramer_rao(float32(values), SIGMA))
    assert mean == pytest.approx(bound, abs=4 * standard_error)
    assert bound > limit
    assert np.isinf(limits.cramer_rao(jnp.array([0.0, 1.0, 2.0]), SIGMA))
    assert np.isinf(limits.cramer_rao(jnp.array([1e-9, 1.0, 2.0]), SIGMA))


def test_covariance_of_many_and_of_few_images():
    rng = np.random.default_rng(0)
    images = float32(rng.normal(size=(50, 2, 2, 1)))
    mean, covariance = limits.shrunk_covariance(images, 0.0)
    np.testing.assert_allclose(covariance, np.cov(np.reshape(images, (50, 4)).T), atol=1e-5)
    np.testing.assert_allclose(mean, np.reshape(images, (50, 4)).mean(0), atol=1e-6)
    _, few = limits.shrunk_covariance(images[:2], 0.1)
    assert np.linalg.eigvalsh(few).min() > 0
    assert np.trace(few) == pytest.approx(np.trace(np.cov(np.reshape(images[:2], (2, 4)).T)), rel=1e-5)
    with pytest.raises(ValueError, match=r"1\.5"):
        limits.shrunk_covariance(images, 1.5)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix", "leak"], meta_fields=[])
class Squared:
    """|| M x - g ||^2."""

    def __init__(self, matrix, leak):
        self.matrix, self.leak = matrix, leak

    def __call__(self, x):
        return jnp.square(self.matrix @ x.ravel() - self.leak).sum()


@pytest.mark.parametrize("i", [200, pytest.param(600, marks=pytest.mark.long)])
def test_jensen_gap_in_closed_form_and_between_its_bounds(gaussian, bed, i):
    """f = || M x - g ||^2 has the gap tr(M C_t M^T), C_t the covariance of x0 given x_t; Theorem 2 and its counterpart hold."""
    m, c, matrix, truth, leak, _ = bed
    schedule = Schedule.create()
    abar = float(schedule.abar[i])
    x_t = np.sqrt(abar) * truth[0] + np.sqrt(1 - abar) * np.random.default_rng(2).normal(size=6)
    given = np.linalg.inv(np.linalg.inv(c) + abar / (1 - abar) * np.eye(6))
    f = Squared(float32(matrix), float32(leak[0]))
    static = ("i", "samples", "clip", "batch")
    draw = jax.jit(jensen.draw_given, static_argnames=static, compiler_options=QUICK_RUN)
    start, n = float32(x_t).reshape(SHAPE), 8000
    hat, x0 = draw(jax.random.key(1), gaussian, schedule, start, i=i, samples=n, clip=False, batch=n)
    expected = m + np.sqrt(abar) * c @ np.linalg.solve(abar * c + (1 - abar) * np.eye(6), x_t - np.sqrt(abar) * m)
    np.testing.assert_allclose(np.ravel(hat), expected, atol=1e-4)
    found = jensen.gap(f, hat, x0)
    trace = np.trace(given)
    assert float(found.trace_covariance.value) == pytest.approx(trace, rel=0.05)
    truth_gap = np.trace(matrix @ given @ matrix.T)
    # Both terms: sampling, and the reverse process in finite steps.
    assert float(found.gap.value) == pytest.approx(truth_gap, abs=3 * float(found.gap.standard_error) + 0.03 * truth_gap)
    values = np.linalg.eigvalsh(matrix.T @ matrix)
    lower = float(jensen.theorem2_lower_bound(values[0], trace))
    upper = float(jensen.gauss_newton_upper_bound(values[-1], trace))
    assert lower < float(found.gap.value) < upper
    assert lower < truth_gap < upper
    assert float(found.m1.value) ** 2 <= float(found.trace_covariance.value)


def test_prior_error_in_closed_form(gaussian, bed):
    """tr(Sigma) at each step is the trace of the covariance of x0 given x_t."""
    _, c, _, truth, _, _ = bed
    schedule = Schedule.create(num_steps=5)
    images = float32(truth[:1500]).reshape(-1, *SHAPE)
    m1, trace = jensen.prior_error(jax.random.key(0), gaussian, schedule, images, clip=False)
    for i in range(5):
        abar = float(schedule.abar[i])
        exact = np.trace(np.linalg.inv(np.linalg.inv(c) + abar / (1 - abar) * np.eye(6)))
        assert float(trace.value[i]) == pytest.approx(exact, abs=4 * float(trace.standard_error[i]))
    assert np.all(np.asarray(m1.value) <= np.sqrt(np.asarray(trace.value)))


def test_theorem_1_as_printed_peaks_at_1_and_is_no_bound():
    """A counterexample in one dimension; the Gaussian's own Lipschitz constant holds there."""
    factor = [float(jensen.theorem1_upper_bound(1, s, 1.0, 1.0)) for s in (0.5, 1.0, 2.0)]
    assert factor[1] > max(factor[0], factor[2])
    s = 0.1
    x0 = np.random.default_rng(0).normal(0, 0.05, 100_000)  # given x_t: x0hat = 0; A(x) = x, the leak is 0
    density = lambda x: np.exp(-(x**2) / (2 * s**2)) / np.sqrt(2 * np.pi * s**2)
    gap = abs(density(x0).mean() - density(0.0))
    m1 = np.abs(x0).mean()
    assert gap > 0.3
    assert float(jensen.theorem1_upper_bound(1, s, 1.0, m1)) < 1e-20
    assert gap < np.exp(float(jensen.likelihood_gap_bound(1, s, 1.0, m1)))
    slope = np.abs(np.diff(density(np.linspace(-1, 1, 20_001)))).max() / 1e-4
    assert np.exp(float(jensen.likelihood_gap_bound(1, s, 1.0, 1.0))) == pytest.approx(slope, rel=1e-3)


def test_a_gap_of_one_image_is_refused():
    with pytest.raises(ValueError, match="1 image"):
        jensen.gap(jnp.sum, jnp.zeros(SHAPE), jnp.zeros((1, *SHAPE)))
