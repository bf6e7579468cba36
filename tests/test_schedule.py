"""The schedule against the forward chain it comes from, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from gdiff_jax.parametrisation import EDM, Score
from gdiff_jax.schedule import Schedule, _kept, make_betas, zero_terminal_snr

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def kept(num_steps: int, total: int = 1000) -> np.ndarray:
    return np.rint(np.linspace(0, total - 1, num_steps)).astype(int) if num_steps > 1 else np.array([total - 1])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 100, 999, 1000])
def test_respacing_keeps_the_forward_process(name: str, num_steps: int) -> None:
    """abar of the kept steps is the full product, and the respaced betas multiply up to it."""
    betas = make_betas(name)
    s = Schedule.create(betas, num_steps)
    full = [np.prod(1 - betas[: t + 1]) for t in kept(num_steps)]
    np.testing.assert_array_equal(s.t, kept(num_steps))
    np.testing.assert_allclose(s.abar, full, rtol=1e-6)
    np.testing.assert_array_equal(s.abar_prev[1:], s.abar[:-1])
    assert s.abar_prev[0] == 1
    respaced = np.exp(np.asarray(s.log_beta, np.float64))
    # log_beta is stored in float32; the cosine schedule's last betas are near 1, where 1 - beta keeps 3 digits of it.
    np.testing.assert_allclose(np.cumprod(1 - respaced), full, rtol=2e-3 if name == "squaredcos_cap_v2" else 1e-4)


@pytest.mark.parametrize("num_steps", [2, 3, 50, 1000])
def test_first_and_last_timestep_are_kept(num_steps: int) -> None:
    t = np.asarray(Schedule.create(num_steps=num_steps).t)
    assert (t[0], t[-1], len(t)) == (0, 999, num_steps)
    assert np.all(np.diff(t) > 0)


def test_a_single_step_starts_from_pure_noise() -> None:
    s = Schedule.create(num_steps=1)
    assert (int(s.t[0]), float(s.abar_prev[0])) == (999, 1.0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [20, 1000])
def test_posterior_is_gaussian_conditioning_of_the_forward_chain(name: str, num_steps: int) -> None:
    """q(x_{t-1} | x_t, x0) by conditioning the joint of (x_{t-1}, x_t), which the betas alone are run through."""
    betas = make_betas(name)
    s = Schedule.create(betas, num_steps)
    steps = kept(num_steps)
    for i in sorted({1, 2, num_steps // 2, num_steps - 1}):
        # x_s = a_s x0 + noise, Cov(x_{t-1}, x_t): one beta after the other, from x0 to the kept step below, then on to t.
        a, var = 1.0, 0.0
        for beta in betas[: steps[i - 1] + 1]:
            a, var = a * np.sqrt(1 - beta), var * (1 - beta) + beta
        a_prev, var_prev, cross = a, var, var
        for beta in betas[steps[i - 1] + 1 : steps[i] + 1]:
            a, var, cross = a * np.sqrt(1 - beta), var * (1 - beta) + beta, cross * np.sqrt(1 - beta)
        gain = cross / var
        x0, x_t = 0.7, -1.3
        expected = a_prev * x0 + gain * (x_t - a * x0)
        np.testing.assert_allclose(s.posterior_mean(jnp.float32(x0), jnp.float32(x_t), i), expected, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(s.posterior_std(i), np.sqrt(var_prev - gain * cross), rtol=1e-5)


def test_the_last_posterior_is_x0() -> None:
    """At t = 0 the posterior given x0 is x0 itself, without noise."""
    s = Schedule.create(num_steps=30)
    np.testing.assert_allclose(s.posterior_mean(jnp.float32(0.4), jnp.float32(9.0), 0), 0.4, rtol=1e-6)
    assert (float(s.mean_x0[0]), float(s.mean_xt[0])) == (1.0, 0.0)


def test_fixed_large_is_the_respaced_beta() -> None:
    """Not betas[t]: 20 kept steps of 1000 have far larger ones."""
    s = Schedule.create(num_steps=20, variance="fixed_large")
    abar = np.cumprod(1 - make_betas())[kept(20)]
    expected = np.sqrt(1 - abar[1:] / abar[:-1])
    np.testing.assert_allclose([s.posterior_std(i) for i in range(1, 20)], expected, rtol=1e-5)


@pytest.mark.parametrize(("v", "end"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_learned_range_ends_at_the_fixed_variances(v: float, end: str) -> None:
    learned, fixed = (Schedule.create(num_steps=20, variance=kind) for kind in ("learned_range", end))
    for i in range(20):
        std = learned.posterior_std(i, jnp.full((2, 2, 1), v))
        np.testing.assert_allclose(std, np.full((2, 2, 1), fixed.posterior_std(i)), rtol=1e-6)


def test_learned_range_interpolates_the_logs() -> None:
    learned, small, large = (Schedule.create(num_steps=9, variance=v) for v in ("learned_range", "fixed_small", "fixed_large"))
    v = jnp.array([-0.5, 0.0, 0.9])
    frac = (np.asarray(v) + 1) / 2
    expected = np.asarray(large.posterior_std(4)) ** frac * np.asarray(small.posterior_std(4)) ** (1 - frac)
    np.testing.assert_allclose(learned.posterior_std(4, v), expected, rtol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_the_last_step_adds_no_noise(variance: str, num_steps: int) -> None:
    s = Schedule.create(num_steps=num_steps, variance=variance)
    assert np.all(np.asarray(s.posterior_std(jnp.int32(0), jnp.zeros((2, 2, 1)))) == 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in (s.log_beta, s.log_beta_tilde, s.mean_x0, s.mean_xt))


def test_x0hat_of_the_added_noise_inverts_add_noise() -> None:
    """For the noise that was added; float32 loses 1 / sqrt(abar), 160 at the noisiest step."""
    s = Schedule.create(num_steps=10)
    x0, eps = jnp.linspace(-1, 1, 5), jnp.array([0.3, -2.0, 1.0, 0.0, 0.5])
    for i in range(10):
        x0hat = s.parametrisation.x0(s.add_noise(x0, eps, i), eps, jnp.sqrt(s.abar[i]), s.noise[i])
        np.testing.assert_allclose(x0hat, x0, atol=1e-4)


def test_add_noise_has_unit_variance_for_unit_images() -> None:
    s = Schedule.create(num_steps=10)
    one = jnp.float32(1)
    for i in range(10):
        signal, noise = s.add_noise(one, 0 * one, i), s.add_noise(0 * one, one, i)
        np.testing.assert_allclose(signal**2 + noise**2, 1, rtol=1e-6)
        np.testing.assert_allclose(signal**2, s.abar[i], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_steps=0), "num_steps 0 "),
        (dict(num_steps=1001), r"1001 is outside 1\.\.1000"),
        (dict(betas=np.array([0.1, 1.1])), r"0\.1\.\.1\.1"),
        (dict(betas=np.array([0.1, 1.0])), "x0hat cannot be had by Epsilon"),
        (dict(betas=zero_terminal_snr(make_betas()), parametrisation=EDM()), "x0hat cannot be had by EDM"),
        (dict(betas=zero_terminal_snr(make_betas()), parametrisation=Score()), "x0hat cannot be had by Score"),
        (dict(betas=np.array([0.0, 0.1])), "betas must lie"),
        (dict(variance="fixed_smal"), "'fixed_smal' is not known"),
    ],
)
def test_bad_values_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.create(**arguments)


def test_unknown_beta_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="'cosine' is not known"):
        make_betas("cosine")


def test_learned_range_needs_a_variance_output() -> None:
    with pytest.raises(ValueError, match="this one has none"):
        Schedule.create(num_steps=3, variance="learned_range").posterior_std(1)


def test_trailing_spacing_is_that_of_diffusers():
    """Counted down from the last: at 48 steps of 1000 halves round otherwise than counted up, to 186 and 436."""
    t = np.asarray(Schedule.create(None, 48, spacing="trailing").t)
    assert (t[0], t[-1], 186 in t, 436 in t) == (20, 999, True, True)
    for num in range(1, 1001):
        kept = _kept(1000, num, "trailing")
        assert len(np.unique(kept)) == num == len(kept)
        assert (kept.min() >= 0, kept[-1]) == (True, 999)


@pytest.mark.parametrize("num", [1, 2, 20, 100, 999, 1000])
def test_quadratic_spacing(num):
    """Both ends kept, no timestep twice, as many as asked for, and denser towards 0; all of them when all are asked for."""
    t = np.asarray(Schedule.create(None, num, spacing="quadratic").t)
    assert len(t) == num
    assert t[-1] == 999
    assert np.all(np.diff(t) >= 1)
    if num > 1:
        assert t[0] == 0
    if num in (20, 100):
        assert np.all(np.diff(t, 2) >= -1)  # gaps grow, up to rounding
        assert np.diff(t)[0] < 999 / (num - 1) < np.diff(t)[-1]
    if num == 1000:
        np.testing.assert_array_equal(t, np.arange(1000))
