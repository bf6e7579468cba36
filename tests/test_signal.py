"""The share of signal in a guidance: closed forms on a victim whose gradient is linear in the image."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import float32

import gdiff_jax as gd
from gdiff_jax.mechanisms import Chain, Clip, GaussianNoise, LaplaceNoise, RandomSparsification, Sign, TopK
from gdiff_jax.pytrees import pytree
from gdiff_jax.samplers import SignalInfo, Start, StepInfo, dsg_sample, dsg_step, mean_of_chains, posterior_mean
from gdiff_jax.samplers.base import Share, guided_posterior
from gdiff_jax.schedule import Schedule
from gdiff_jax.theory import jacobian

SHAPE, P = (2, 3, 1), 40
A = float32(np.random.default_rng(0).normal(size=(P, 6)))


def loss(w, x, y):
    """<w, A x>: its gradient in w is A x, so J = A."""
    return w @ (A @ x.ravel())


@jax.jit
def leak_of(x, mechanism, key):
    return mechanism(key, gd.victim_gradient(loss, jnp.ones(P), x, 0))


def matched(x, mechanism, key):
    return gd.GradientMatching(jnp.ones(P), 0, leak_of(x, mechanism, key), loss, mechanism=mechanism)


def image(seed):
    return float32(np.random.default_rng(seed).uniform(-1, 1, SHAPE))


@jax.jit
def share(match, x0, seed=5):
    distance, gradient = jax.value_and_grad(match)(x0)
    return gd.NoiseCalibration(match)(jax.random.key(seed), 0, jnp.nan, x0, distance, gradient)


def mean_share(mechanism, x0, draws):
    """Over draws of the leak of image 0 and of the noise beside it."""
    one = lambda k: share(matched(image(0), mechanism, jax.random.key(k)), x0, k + 100)[0]
    return float(jax.jit(jax.vmap(one))(jnp.arange(draws)).mean())


def test_it_is_the_ratio_of_two_pulls():
    mechanism = GaussianNoise(0.7)
    match, x0 = matched(image(0), mechanism, jax.random.key(1)), image(1)
    noise = mechanism(jax.random.key(5), jnp.zeros(P))
    pull, drawn = A.T @ (A @ x0.ravel() - match.leak), A.T @ noise
    expected = 1 - (drawn @ drawn) / (pull @ pull)
    assert 0 < expected < 1
    signal, *parts, curvature = share(match, x0)
    np.testing.assert_allclose(signal, expected, rtol=1e-4)
    np.testing.assert_allclose(parts, [jnp.linalg.norm(pull), jnp.linalg.norm(drawn)], rtol=1e-4)
    np.testing.assert_allclose(curvature, jnp.square(A @ pull).sum() / (pull @ pull), rtol=1e-4)


def test_the_pull_of_noise_has_the_energy_that_the_vulnerability_says():
    mechanism = GaussianNoise(0.3)
    match = matched(image(0), mechanism, jax.random.key(1))
    pulls = jax.jit(jax.vmap(lambda k: gd.NoiseCalibration(match).noise_pull(k, image(1))))
    rv, _ = jax.jit(lambda params, x: jacobian.frobenius_exact(loss, params, x, 0))(match.params, image(1))
    energy = np.square(np.asarray(pulls(jax.random.split(jax.random.key(2), 4000)))).sum((1, 2, 3))
    np.testing.assert_allclose(energy.mean(), 0.3**2 * float(rv) ** 2, rtol=0.05)


def test_it_is_one_for_a_clean_leak_and_falls_with_the_noise_and_near_the_truth():
    shares = [mean_share(GaussianNoise(sigma), image(1), 40) for sigma in (0.0, 0.3, 3.0)]
    assert shares[0] == 1
    assert 1 > shares[1] > shares[2]
    assert mean_share(GaussianNoise(0.3), image(0), 100) < 0.4  # at the truth, where nothing but noise is left


@pytest.mark.parametrize("noise", [GaussianNoise, LaplaceNoise])
def test_what_happened_before_the_noise_is_passed_through(noise):
    mechanism = Chain((Clip(0.5), noise(0.1)))
    match, x0 = matched(image(0), mechanism, jax.random.key(1)), image(1)
    found = jax.jit(lambda key, x: gd.NoiseCalibration(match).noise_pull(key, x))(jax.random.key(3), x0)
    sent = jax.jit(lambda mechanism, key: mechanism(key, A @ x0.ravel()))
    drawn = sent(mechanism, jax.random.key(3)) - sent(Clip(0.5), jax.random.key(0))

    def clipped(x):
        g = A @ x.ravel()
        return g * jnp.minimum(1.0, 0.5 / jnp.linalg.norm(g))

    expected = jax.jit(jax.grad(lambda x: clipped(x) @ drawn))(x0)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mechanism", [TopK(0.3), RandomSparsification(0.3), Sign(), Chain((Clip(0.5), TopK(0.3)))], ids=str)
def test_what_is_kept_back_is_no_noise(mechanism):
    """The attacker reads off the leak what was kept, here other coordinates than of a draw at the candidate."""
    for seed in range(3):
        match = matched(image(0), mechanism, jax.random.key(seed))
        assert share(match, image(1))[0] == 1


def test_noise_under_a_mask_is_noise():
    shares = [mean_share(Chain((GaussianNoise(sigma), TopK(0.3))), image(1), 20) for sigma in (0.0, 1.0, 30.0)]
    assert shares[0] == 1
    assert shares[0] > shares[1] > shares[2] + 0.1, shares


def test_a_draw_serves_several_steps(gaussian):
    schedule, mechanism = Schedule.create(num_steps=10), GaussianNoise(0.5)
    match = matched(image(0), mechanism, jax.random.key(1))

    def changes(every, **options):
        signal = gd.NoiseCalibration(match, every)
        _, trace = dsg_sample(jax.random.key(4), gaussian, match, schedule, SHAPE, signal=signal, **options)
        noise_pull = np.asarray(trace.noise_pull)[~np.isnan(trace.noise_pull)]
        np.testing.assert_allclose(trace.signal, np.clip(1 - np.square(trace.noise_pull / trace.pull), 0, 1), rtol=1e-5)
        return [0, *(np.flatnonzero(np.diff(noise_pull)) + 1)], len(noise_pull)

    assert changes(1) == (list(range(10)), 10)
    assert changes(4) == ([0, 4, 8], 10)
    assert changes(2, interval=3) == ([0, 2], 4)  # the guided steps are 9, 6, 3 and 0
    assert changes(2, start=Start(jnp.zeros(SHAPE), jnp.array(6))) == ([0, 2, 4, 6], 7)
    with pytest.raises(ValueError, match="every 0 must be at least 1"):
        gd.NoiseCalibration(match, 0)


@pytree
class Fixed:
    signal: float
    curvature: float

    def __call__(self, key, steps_before, last_noise_pull, x0, distance, gradient):
        return Share(jnp.float32(self.signal), jnp.float32(1.0), jnp.float32(0.5), jnp.float32(self.curvature))


def test_a_step_turns_by_the_root_of_the_share_and_no_further_than_the_distance_falls(gaussian):
    schedule = Schedule.create(num_steps=10)
    match = matched(image(0), GaussianNoise(0.5), jax.random.key(1))
    rest = (image(3), jnp.array(5), gaussian, match, schedule)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def step(rate, signal=None, curvature=1e-3):
        judge = signal and functools.partial(Fixed(signal, curvature), None, 0, 0.0)
        return dsg_step(jax.random.key(4), *rest, guidance_rate=rate, share=judge)

    plain, info = step(0.4)
    assert type(info) is StepInfo
    np.testing.assert_array_equal(step(0.4, 1.0)[0], plain)
    quarter, judged = step(0.4, 0.25)
    np.testing.assert_allclose(quarter, step(0.2)[0], rtol=1e-5)
    np.testing.assert_array_equal(judged, SignalInfo(*info, 0.25, 1.0, 0.5, np.float32(1e-3)))
    assert np.abs(quarter - plain).max() > 1e-3
    # signal pull / curvature = 0.25 of length, on a sphere of radius sqrt(n) std
    radius = float(schedule.posterior_std(5, None)) * 6**0.5
    np.testing.assert_allclose(step(1.0, 0.25, 1.0 / (0.1 * radius))[0], step(0.25 * 0.1)[0], rtol=1e-4, atol=1e-6)


def test_where_each_pixel_has_a_deviation_of_its_own_the_length_is_that_of_the_step(gaussian):
    """A learned variance makes an ellipsoid of the sphere: the turn is measured where the guidance points."""
    schedule = Schedule.create(num_steps=10, variance="learned_range")
    prior = dataclasses.replace(gaussian, v=jnp.linspace(-1.0, 1.0, 6).reshape(SHAPE))
    rest = (image(3), jnp.array(5), prior, matched(image(0), GaussianNoise(0.5), jax.random.key(1)), schedule)

    @jax.jit
    def guidance(x):
        p, grad, _, _ = guided_posterior(*rest[2:], x, rest[1])
        return p.std, grad

    std, grad = jax.device_get(guidance(rest[0]))
    away = 6**0.5 * std * grad / np.linalg.norm(grad)
    length = float(0.3 * np.linalg.norm(away))

    @functools.partial(jax.jit, static_argnums=1)
    def turn(rate, limit=False):
        share = functools.partial(Fixed(1.0, 1.0 / length), None, 0, 0.0) if limit else None
        return dsg_step(jax.random.key(4), *rest, guidance_rate=rate, share=share)[0]

    limited = turn(1.0, True)
    np.testing.assert_allclose(limited, turn(0.3), rtol=1e-4, atol=1e-6)
    assert np.abs(limited - turn(0.35)).max() > 1e-3


def test_without_noise_the_length_is_that_of_an_exact_line_search():
    match, x0 = matched(image(0), GaussianNoise(0.0), jax.random.key(1)), image(1)
    away = jax.grad(lambda x: jnp.square(A @ x.ravel() - match.leak).sum())(x0)
    along = lambda a: jnp.square(A @ (x0 - a * away / jnp.linalg.norm(away)).ravel() - match.leak).sum()
    found = share(match, x0).length()
    assert along(found) < min(along(0.98 * found), along(1.02 * found), along(0.0))
    np.testing.assert_allclose(jax.grad(along)(found), 0, atol=1e-3)


def test_the_curvature_is_of_what_is_compared():
    clip, x0 = Clip(0.5), image(1)
    weights = jnp.linspace(0.5, 2.0, P)
    match = dataclasses.replace(matched(image(0), clip, jax.random.key(1)), weights=weights)
    u = image(2) / jnp.linalg.norm(image(2))
    small = 1e-2
    seen = lambda x: weights * clip(jax.random.key(0), A @ x.ravel())
    expected = jnp.square((seen(x0 + small * u) - seen(x0 - small * u)) / (2 * small)).sum()
    np.testing.assert_allclose(gd.NoiseCalibration(match).curvature(x0, u), expected, rtol=1e-2)


def test_other_distances_and_clients_are_refused():
    match = matched(image(0), GaussianNoise(0.1), jax.random.key(0))
    for wrong in (dict(distance=gd.cosine), dict(client=gd.LocalSGD(0.1, 2)), dict(mechanism=None)):
        with pytest.raises(ValueError, match="l2 distance to one gradient of a known mechanism"):
            gd.NoiseCalibration(dataclasses.replace(match, **wrong))


def test_the_combined_image_has_the_least_error():
    """Of exchangeable samples and truth m + z + e: the closed form of the best linear weight, and its error."""
    d, k, shared, own = 4000, 4, 0.6, 0.8
    rng = np.random.default_rng(0)
    m, z = rng.normal(size=d), shared * rng.normal(size=d)
    truth, *samples = (m + z + own * rng.normal(size=d) for _ in range(1 + k))
    image, weight = posterior_mean(jnp.asarray(samples), jnp.asarray(m))
    best = shared**2 / (shared**2 + own**2 / k)
    np.testing.assert_allclose(weight, best, atol=0.03)
    error = lambda a: np.square(np.asarray(a) - truth).mean()
    np.testing.assert_allclose(error(image), own**2 + shared**2 * (1 - best), rtol=0.05)
    assert error(image) < min(error(m), error(np.mean(samples, 0)), *map(error, samples))


def test_the_images_of_a_group_are_combined_each_with_itself():
    """A chain may find them in any order."""
    group = jnp.stack([image(k) for k in range(3)])
    trace = jnp.zeros(1)

    def chain(key):
        return jax.random.permutation(key, group), trace

    run = jax.jit(lambda key: mean_of_chains(key, chain, jnp.zeros(SHAPE), chains=6)[0])
    gap = np.abs(np.asarray(run(jax.random.key(0)))[:, None] - np.asarray(group)[None]).max((2, 3, 4))
    np.testing.assert_allclose(gap.min(1), 0, atol=1e-5)
    assert sorted(gap.argmin(1).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("needed", [0, 1, 2, 3])
def test_no_more_chains_run_than_are_needed(needed):
    """Those are the first of all, and their mean is that of these alone."""
    ran, mean = [], image(7)

    def chain(key):
        bits = jax.random.key_data(jax.random.clone(key))
        jax.debug.callback(lambda bits: ran.append(tuple(bits.tolist())), bits)
        return jax.random.uniform(key, SHAPE), jnp.sum(bits).astype(jnp.float32)

    run = jax.jit(lambda needed: mean_of_chains(jax.random.key(0), chain, mean, 3, needed))
    found, trace = jax.block_until_ready(run(needed))
    keys = jax.random.split(jax.random.key(0), 3)
    bits = np.asarray(jax.random.key_data(jax.random.clone(keys)))
    assert ran == [tuple(key.tolist()) for key in bits[:needed]]
    samples = jax.vmap(lambda key: jax.random.uniform(key, SHAPE))(keys)[:needed]
    expected = mean if needed == 0 else samples[0] if needed == 1 else posterior_mean(samples, mean)[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(trace, np.float32(bits[0].sum(dtype=np.uint32)) if needed else np.nan)


def test_samples_that_agree_are_kept_and_others_are_not_believed():
    same = jnp.broadcast_to(image(0), (3, *SHAPE))
    kept, weight = posterior_mean(same, jnp.zeros(SHAPE))
    np.testing.assert_allclose(kept, image(0), rtol=1e-5)
    assert weight == pytest.approx(1, abs=1e-5)
    opposed, weight = posterior_mean(jnp.stack([image(0), -image(0)]), jnp.full(SHAPE, 0.0))
    assert weight == 0
    np.testing.assert_array_equal(opposed, jnp.zeros(SHAPE))
    with pytest.raises(ValueError, match="two or more"):
        posterior_mean(same[:1], jnp.zeros(SHAPE))
