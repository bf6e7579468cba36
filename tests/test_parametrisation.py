"""Every parametrisation of one prior whose posterior is known: pixels drawn from N(0, S^2).

Each network is written in the coordinates of the paper that defines it, and knows nothing of ours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK_COMPILE

import gdiff_jax as gd
from gdiff_jax.parametrisation import EDM, Epsilon, Flow, Sample, Score, V
from gdiff_jax.priors.schedulers import read_scheduler
from gdiff_jax.samplers import denoise_estimate, start_from
from gdiff_jax.samplers.base import predict, predict_kept
from gdiff_jax.schedule import Schedule, make_betas, zero_terminal_snr

S = 0.7
SHAPE = (2, 2, 1)
ABAR = np.cumprod(1 - make_betas())
ZERO = np.cumprod(1 - zero_terminal_snr(make_betas()))


def of_timesteps(kind, abar):
    """x0 and n to be expected of x_t = signal x0 + noise n, in the combination that is predicted."""
    table = jnp.asarray(np.sqrt(np.stack([abar, 1 - abar])), jnp.float32)

    def network(x_t, t):
        signal, noise = table[0, t], table[1, t]
        scale = S**2 * signal**2 + noise**2
        x0, n = signal * S**2 / scale * x_t, noise / scale * x_t
        return {"epsilon": n, "sample": x0, "v": signal * n - noise * x0}[kind], None

    return network


def edm(x_in, c_noise, data=0.5):
    """F = (D(x) - c_skip x) / c_out, D(x) = S^2 / (S^2 + sigma^2) x (Karras et al., Table 1)."""
    sigma = jnp.exp(4 * c_noise)
    x = x_in * jnp.sqrt(sigma**2 + data**2)
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / jnp.sqrt(sigma**2 + data**2)
    return (S**2 / (S**2 + sigma**2) - c_skip) * x / c_out, None


def flow(x_s, t):
    """E[n - x0 | x_s], x_s = (1 - s) x0 + s n at t = 1000 s."""
    s = t / 1000
    return (s - (1 - s) * S**2) / (S**2 * (1 - s) ** 2 + s**2) * x_s, None


def score(y, sigma):
    """Of y = y0 + sigma n, y0 in [0, 1] drawn from N(1/2, S^2 / 4)."""
    return -(y - 0.5) / (S**2 / 4 + sigma**2), None


EDM_BETAS, FLOW_BETAS, SCORE_BETAS = (
    read_scheduler({"_class_name": f"{name}Scheduler", "sigma_max": 80}).betas
    for name in ("EDMEuler", "FlowMatchEulerDiscrete", "ScoreSdeVe")
)
KINDS = {
    "epsilon": (Epsilon(), of_timesteps("epsilon", ABAR), make_betas()),
    "sample": (Sample(), of_timesteps("sample", ZERO), zero_terminal_snr(make_betas())),
    "v": (V(), of_timesteps("v", ZERO), zero_terminal_snr(make_betas())),
    "edm": (EDM(0.5), functools.partial(edm, data=0.5), EDM_BETAS),
    "edm of other data": (EDM(1.3), functools.partial(edm, data=1.3), EDM_BETAS),
    "edm, its sign turned": (EDM(0.5, -1.0), lambda x, t: (-edm(x, t)[0], None), EDM_BETAS),
    "flow": (Flow(), flow, FLOW_BETAS),
    "score": (Score(), score, SCORE_BETAS),
}


def schedule(kind, steps):
    return Schedule.create(KINDS[kind][2], steps, parametrisation=KINDS[kind][0])


def kept(kind, steps):
    return np.rint(np.linspace(0, len(KINDS[kind][2]) - 1, steps)).astype(int)


@pytest.mark.parametrize("kind", KINDS)
def test_x0hat_is_the_posterior_mean_at_every_level(kind):
    s, x = schedule(kind, 20), jax.random.normal(jax.random.key(0), SHAPE)
    for i in range(20):
        x0, _ = predict_kept(KINDS[kind][1], s, x, i, clip=False)
        signal = np.sqrt(np.cumprod(1 - KINDS[kind][2])[kept(kind, 20)[i]])
        expected = signal * S**2 / (S**2 * signal**2 + 1 - signal**2) * np.asarray(x)
        # Tweedie's formula magnifies the rounding of x_t by 1 / signal, 160 at the noisiest step; most others do not.
        np.testing.assert_allclose(x0, expected, rtol=1e-5, atol=2e-6 + (1e-6 / signal if kind in ("epsilon", "score") else 0))


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_is_denoised_at_its_own_level(kind):
    """Networks that are continuous in time are asked at that very level, the others at the timestep nearest to it."""
    image = 0.3 * jax.random.normal(jax.random.key(0), SHAPE)
    asked = jax.jit(lambda std: denoise_estimate(KINDS[kind][1], schedule(kind, 100), image, std, image + 9, clip=False))
    for std in (0.0333, 0.4, 3.0):
        rtol = 1e-5 if kind.startswith(("edm", "flow", "score")) else 0.02
        np.testing.assert_allclose(asked(std), image * S**2 / (S**2 + std**2), rtol=rtol, atol=1e-6)
    np.testing.assert_array_equal(asked(1e4), image + 9)


@pytest.mark.parametrize("kind", ["v", "edm", "flow", "score"])
def test_samples_have_the_variance_that_a_linear_network_gives(kind):
    """Each step is linear, x <- a x + std z, so the variance is a recursion; of 16,000 pixels it errs by 1.1 %."""
    s = schedule(kind, 50)
    sample = lambda key: gd.unguided_sample(key, KINDS[kind][1], s, SHAPE, clip=False)[0]
    x = jax.jit(jax.vmap(sample), compiler_options=QUICK_COMPILE)(jax.random.split(jax.random.key(0), 4000))
    abar = np.cumprod(1 - KINDS[kind][2])[kept(kind, 50)]
    before, variance = np.append(1.0, abar[:-1]), 1.0
    for i in range(49, -1, -1):
        slope = np.sqrt(abar[i]) * S**2 / (S**2 * abar[i] + 1 - abar[i])  # of x0hat in x_t
        beta = 1 - abar[i] / before[i]
        a = (np.sqrt(before[i]) * beta * slope + np.sqrt(1 - beta) * (1 - before[i])) / (1 - abar[i])
        variance = a**2 * variance + (beta * (1 - before[i]) / (1 - abar[i]) if i else 0)
    assert 0.3 < variance < 0.6
    assert abs(np.square(x).mean() / variance - 1) < 0.045


def test_guidance_passes_through_every_parametrisation_alike():
    """d x0hat / d x_t, by which a guided step pulls back: of one posterior it is one number, whatever is predicted."""
    std = jnp.float32(0.6)
    signal = 1 / jnp.sqrt(1 + std**2)
    for kind, (p, network, _) in KINDS.items():
        s = schedule(kind, 1000)
        t = p.time(signal, std * signal)
        t = jnp.round(jnp.interp(jnp.log(std), s.levels(), jnp.float32(s.t))).astype(int) if t is None else t
        slope = jax.grad(lambda x: predict(network, s, x, signal, std * signal, t)[0].sum())(jnp.ones(SHAPE))  # noqa: B023
        np.testing.assert_allclose(slope, signal * S**2 / (S**2 * signal**2 + std**2 * signal**2), rtol=5e-3, err_msg=kind)


def test_guided_samples_are_the_same_whatever_the_network_predicts():
    match = lambda x: jnp.linalg.norm((x - 0.3).ravel())
    x0 = {}
    for kind in ("sample", "v"):
        run = lambda key, s: gd.dsg_sample(key, KINDS[kind][1], match, s, SHAPE, guidance_rate=0.3)[0]  # noqa: B023
        x0[kind] = jax.jit(run, compiler_options=QUICK_COMPILE)(jax.random.key(0), schedule(kind, 20))
    np.testing.assert_allclose(x0["v"], x0["sample"], atol=1e-4)
    assert match(x0["v"]) < 0.7  # of four pixels of the prior 1.5


def test_a_start_at_the_noisiest_step_is_noise_alone_where_nothing_is_left_of_the_image():
    start = start_from(jax.random.key(0), schedule("v", 10), jnp.full(SHAPE, 5.0), 1e9)
    np.testing.assert_array_equal(start.x, jax.random.normal(jax.random.key(0), SHAPE))
    assert int(start.step) == 9


def test_a_zero_terminal_snr_ends_at_nothing_and_keeps_its_first_step():
    betas = zero_terminal_snr(make_betas())
    assert betas[-1] == 1
    np.testing.assert_allclose(betas[0], make_betas()[0])
    assert np.all((betas > 0) & (betas[:-1] < 1).all())
    with pytest.raises(ValueError, match=r"x0hat cannot be had by Epsilon; .* predicts v, the sample or a flow"):
        Schedule.create(betas)


def test_edm_is_sampled_at_the_levels_of_its_paper():
    """Eq. 5 for 18 steps of 80 .. 0.002, kept uniformly from the table of a thousand."""
    total, n = 18 * 53 + 1, 19
    s = Schedule.create(read_scheduler({"_class_name": "EDMEulerScheduler", "num_train_timesteps": total}).betas, n)
    u = np.linspace(0, 1, n)
    sigma = (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    np.testing.assert_allclose(np.exp(s.levels()), sigma, rtol=1e-5)


@pytest.mark.parametrize("num", [1, 7, 50, 1000])
def test_trailing_timesteps_end_at_the_noisiest(num):
    t = np.asarray(Schedule.create(num_steps=num, spacing="trailing").t)
    np.testing.assert_array_equal(t, np.round(np.arange(1, num + 1) * 1000 / num) - 1)
    assert (t[-1], len(t)) == (999, num)
