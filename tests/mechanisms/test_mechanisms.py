"""Mechanisms do what their papers say: moments, norms, masks; and what the attacker expects of them is their derivative."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from objectives import float32

from gdiff_jax import GradientMatching, l2, mechanisms, victim_gradient, victims
from gdiff_jax.mechanisms import (
    Chain,
    Clip,
    GaussianNoise,
    LaplaceNoise,
    PruneRepresentation,
    RandomSparsification,
    Sign,
    StochasticQuantisation,
    TopK,
    UniformNoise,
    dp_sgd_gradient,
    soteria_mask,
)

NOISES = {"gaussian": GaussianNoise, "laplace": LaplaceNoise, "uniform": UniformNoise}
DISTRIBUTIONS = {
    "gaussian": scipy.stats.norm(0, 0.3),
    "laplace": scipy.stats.laplace(0, 0.3 / math.sqrt(2)),
    "uniform": scipy.stats.uniform(-0.3 * math.sqrt(3), 0.6 * math.sqrt(3)),
}


def gradient(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {"fc.bias": (7,), "fc.kernel": (20, 7), "conv.kernel": (3, 3, 2, 5)}
    return {k: float32(scale * rng.normal(size=s)) for k, s in shapes.items()}


def flat(tree):
    return np.concatenate([a.ravel() for a in jax.tree.leaves(jax.device_get(tree))])


# Compiled whole: operation by operation each is a program of its own.
send = jax.jit(lambda mechanism, key, g: mechanism(key, g))


SIZE = flat(gradient()).size


@pytest.mark.parametrize("name", NOISES)
def test_noise_has_its_distribution_and_standard_deviation(name):
    zeros = {"a": jnp.zeros((300, 100)), "b": jnp.zeros(10_000)}
    noise = flat(send(NOISES[name](0.3), jax.random.key(3), zeros))
    assert noise.std() == pytest.approx(0.3, rel=0.02)
    assert scipy.stats.kstest(noise, DISTRIBUTIONS[name].cdf).pvalue > 0.01
    others = [DISTRIBUTIONS[other] for other in NOISES if other != name]
    assert all(scipy.stats.kstest(noise, other.cdf).pvalue < 1e-6 for other in others)


def test_noise_by_the_parameters_that_others_use():
    assert float(LaplaceNoise.from_scale(0.5).sigma) == pytest.approx(scipy.stats.laplace(scale=0.5).std())
    assert float(UniformNoise.from_half_width(0.5).sigma) == pytest.approx(scipy.stats.uniform(-0.5, 1).std())


@pytest.mark.parametrize("name", NOISES)
def test_noise_of_a_key_is_proportional_to_sigma(name):
    g = gradient()
    leaks = [flat(send(NOISES[name](s), jax.random.key(1), g)) - flat(g) for s in (0.1, 0.4)]
    np.testing.assert_allclose(leaks[1], 4 * leaks[0], atol=1e-5)


def test_clip_bounds_the_norm_and_keeps_the_direction():
    for scale, expected in ((1.0, 2.0), (1e-3, None)):
        g = gradient(scale=scale)
        norm = np.linalg.norm(flat(g))
        clipped = flat(send(Clip(2.0), jax.random.key(0), g))
        assert np.linalg.norm(clipped) == pytest.approx(expected or norm, rel=1e-5)
        np.testing.assert_allclose(clipped / np.linalg.norm(clipped), flat(g) / norm, atol=1e-6)
    assert np.all(
        np.isfinite(flat(jax.jit(jax.grad(lambda g: Clip(1.0).simulate(g, g)["fc.bias"].sum()))(gradient(scale=0.0))))
    )


def test_topk_keeps_the_largest():
    g = gradient()
    kept = flat(send(TopK(0.1), jax.random.key(0), g))
    count = round(0.1 * SIZE)
    order = np.argsort(-np.abs(flat(g)))
    assert set(np.flatnonzero(kept)) == set(order[:count])
    np.testing.assert_array_equal(kept[order[:count]], flat(g)[order[:count]])
    np.testing.assert_array_equal(flat(send(TopK(1.0), jax.random.key(0), g)), flat(g))


UNBIASED = {"random": RandomSparsification(0.25), "qsgd": StochasticQuantisation(4)}


@pytest.mark.parametrize("name", UNBIASED)
def test_random_compression_is_unbiased(name):
    g = gradient()
    draws = jax.jit(jax.vmap(lambda k: UNBIASED[name](k, g)))(jax.random.split(jax.random.key(5), 4000))
    draws = np.concatenate([a.reshape(4000, -1) for a in jax.tree.leaves(jax.device_get(draws))], axis=1)
    error = (draws.mean(0) - flat(g)) / (draws.std(0) / 4000**0.5 + 1e-6)
    assert np.abs(error).max() < 5


def test_qsgd_sends_whole_levels_of_the_norm():
    g = jax.device_get(gradient())
    sent = jax.device_get(send(StochasticQuantisation(4), jax.random.key(0), g))
    for name, array in sent.items():
        levels = array / np.linalg.norm(g[name]) * 4
        np.testing.assert_allclose(levels, np.round(levels), atol=1e-5)
        assert np.all(np.abs(np.abs(levels) - 4 * np.abs(g[name]) / np.linalg.norm(g[name])) < 1 + 1e-5)
    zeros = jax.tree.map(np.zeros_like, g)
    assert not flat(send(StochasticQuantisation(4), jax.random.key(0), zeros)).any()


def test_sign():
    g = gradient() | {"fc.bias": jnp.array([0.0, -2.0, 3.0, 0.5, -0.1, 1.0, 0.0])}
    sent = send(Sign(), jax.random.key(0), g)
    np.testing.assert_array_equal(sent["fc.bias"], [0, -1, 1, 1, -1, 1, 0])
    assert set(np.unique(flat(sent))) <= {-1.0, 0.0, 1.0}


MECHANISMS = {
    "clip": Clip(0.7),
    "topk": TopK(0.2),
    "random": RandomSparsification(0.5),
    "sign": Sign(),
    "qsgd": StochasticQuantisation(2),
    "prune": PruneRepresentation(jnp.arange(20) % 3 > 0, "fc.kernel"),
    "clip, top-k": Chain((Clip(0.7), TopK(0.2))),
    "qsgd, clip": Chain((StochasticQuantisation(1), Clip(3.0))),
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_norm_bound_holds(name):
    """For gradients of many sizes and shapes; a bound that nothing comes near would not be told from a wrong one."""
    mechanism, closest = MECHANISMS[name], 0.0
    for seed in range(20):
        g = gradient(seed, 10.0 ** (seed % 5 - 2))
        norm = float(np.linalg.norm(flat(g)))
        out = np.linalg.norm(flat(send(mechanism, jax.random.key(seed), g)))
        bound = mechanism.norm_bound(norm, SIZE)
        assert out <= bound * (1 + 1e-5)
        closest = max(closest, out / bound)
    assert closest > (0.25 if "qsgd" in name or name == "random" else 0.5)
    assert math.isinf(TopK(0.2).norm_bound(math.inf, SIZE))


def test_a_chain_applies_the_first_first():
    g = gradient()
    clipped_last = send(Chain((GaussianNoise(5.0), Clip(1.0))), jax.random.key(0), g)
    clipped_first = send(Chain((Clip(1.0), GaussianNoise(5.0))), jax.random.key(0), g)
    assert np.linalg.norm(flat(clipped_last)) == pytest.approx(1.0, rel=1e-5)
    assert np.linalg.norm(flat(clipped_first)) > 10


simulated = jax.jit(lambda mechanism, g, leak: mechanism.simulate(g, leak))


def test_what_declares_itself_differentiable_is_its_own_expectation():
    """`simulate` on the true gradient reproduces the leak, noise apart; of the others it is a stand-in."""
    g = gradient()
    for name, mechanism in MECHANISMS.items():
        leak = send(mechanism, jax.random.key(2), g)
        same = np.allclose(flat(simulated(mechanism, g, leak)), flat(leak), atol=1e-5)
        assert same == (mechanism.differentiable or name == "sign"), name
    noisy = GaussianNoise(0.5)
    assert noisy.differentiable
    np.testing.assert_array_equal(flat(noisy.simulate(g, noisy(jax.random.key(0), g))), flat(g))


def loss(params, x, y):
    h = jnp.tanh(params["w1"] @ x.ravel() + params["b1"])
    return -jax.nn.log_softmax(params["w2"] @ h)[y]


gradient_of = jax.jit(functools.partial(victim_gradient, loss))
value = jax.jit(lambda match, x: match(x))
pull_of = jax.jit(lambda match, x: jax.grad(lambda x: match(x))(x))


def matched(mechanism):
    """A client's leak through the mechanism, and the attacker's objective, in float64."""
    rng = np.random.default_rng(4)
    shapes = {"w1": (5, 16), "b1": (5,), "w2": (3, 5)}
    params = {name: jnp.asarray(rng.uniform(-1, 1, s)) for name, s in shapes.items()}
    image = jnp.asarray(rng.uniform(-1, 1, (4, 4, 1)))
    leak = send(mechanism, jax.random.key(1), gradient_of(params, image, jnp.array(1)))
    return image, GradientMatching(params, jnp.array(1), leak, loss, l2, mechanism)


ADAPTIVE = {
    "clip": Clip(0.1),
    "topk": TopK(0.3),
    "random": RandomSparsification(0.5),
    "prune": PruneRepresentation(jnp.array([1.0, 0.0, 1.0]), "w2"),
    "chain": Chain((TopK(0.5), Clip(0.1))),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_matching_through_a_mechanism_is_differentiated_exactly(x64, name):
    """The truth is at distance 0 for the attacker who knows, not for the other; derivatives agree with differences."""
    image, match = matched(ADAPTIVE[name])
    assert float(value(match, image)) < 1e-12
    assert float(value(dataclasses.replace(match, mechanism=None), image)) > 1e-3
    candidate = np.random.default_rng(8).uniform(-1, 1, image.shape)
    found = np.asarray(pull_of(match, candidate)).ravel()
    for i in range(16):
        step = 1e-6 * np.eye(16)[i].reshape(image.shape)
        difference = (float(value(match, candidate + step)) - float(value(match, candidate - step))) / 2e-6
        assert found[i] == pytest.approx(difference, abs=1e-8)


def test_signs_are_matched_straight_through(x64):
    """Where the signs agree the truth is at distance 0; elsewhere the pull is J^T of the differing signs, unit length."""
    image, match = matched(Sign())
    assert float(value(match, image)) == 0

    @jax.jit
    def by_hand(candidate):
        g, pull = jax.vjp(lambda x: victim_gradient(loss, match.params, x, match.label), candidate)
        residual = jax.tree.map(lambda a, s: jnp.sign(a) - s, g, match.leak)
        return pull(residual)[0] / jnp.sqrt(sum(jnp.vdot(r, r) for r in jax.tree.leaves(residual)))

    np.testing.assert_allclose(pull_of(match, -image), by_hand(-image), atol=1e-12)


def test_mechanisms_vmap_and_compile_once():
    """Numbers are leaves: a grid of clip norms and sigmas is one compilation, and equal to single calls."""
    g = gradient()
    traces = []

    @jax.jit
    def leak(mechanism, key):
        traces.append(1)
        return mechanism(key, g)

    grid = [Chain((Clip(c), GaussianNoise(s))) for c, s in ((1.0, 0.1), (2.0, 0.3))]
    single = [leak(m, jax.random.key(0)) for m in grid]
    assert len(traces) == 1
    stacked = jax.tree.map(lambda *a: np.stack(a).astype(np.float32), *grid)
    both = jax.device_get(jax.jit(jax.vmap(lambda m: m(jax.random.key(0), g)))(stacked))
    for i in range(2):
        np.testing.assert_allclose(flat(jax.tree.map(lambda a, i=i: a[i], both)), flat(single[i]), atol=1e-6)


def test_soteria_prunes_what_tells_most():
    """Against the full Jacobian of the features, in a case where the scores are far apart."""
    rng = np.random.default_rng(0)
    weights = float32(rng.normal(size=(12, 9)) * np.geomspace(0.1, 10, 12)[:, None])
    offset = float32(rng.uniform(1, 2, 12) * 3)
    features = lambda x: weights @ x.ravel() + offset
    x = float32(rng.normal(size=(3, 3, 1)) * 0.01)
    score = np.abs(features(x)) / np.linalg.norm(weights, axis=1)
    mask = np.asarray(jax.jit(lambda key, x: soteria_mask(key, features, x, 0.25, probes=512))(jax.random.key(0), x))
    assert set(np.flatnonzero(mask == 0)) == set(np.argsort(-score)[:3])
    assert soteria_mask(jax.random.key(0), features, x, 0.0).all()


@pytest.mark.parametrize(
    "make",
    [victims.mlp, *(pytest.param(make, marks=pytest.mark.long) for make in (victims.lenet, victims.resnet, victims.vit_tiny))],
)
def test_soteria_zeroes_rows_of_a_victims_last_kernel(make, random_params):
    victim = make((16, 16, 3), 10)
    params = random_params(victim)
    x = np.random.default_rng(0).uniform(-1, 1, (16, 16, 3)).astype(np.float32)

    @jax.jit
    def all_of(key, params, x):
        mask = soteria_mask(key, functools.partial(victim.features, params), x, 0.25)
        g = victim_gradient(victim.loss, params, x, jnp.array(3))
        sent = PruneRepresentation(mask, victim.last_kernel)(jax.random.key(2), g)
        return victim.features(params, x), victim.logits(params, x), mask, g, sent

    features, logits, mask, g, sent = jax.device_get(all_of(jax.random.key(1), params, x))
    kernel = np.asarray(params[victim.last_kernel])
    assert kernel.shape == (features.size, 10)
    bias = np.asarray(params[victim.last_kernel.replace("kernel", "bias")])
    np.testing.assert_allclose(features @ kernel + bias, logits, atol=1e-5)
    pruned = mask == 0
    assert pruned.sum() == round(0.25 * features.size)
    np.testing.assert_array_equal(sent[victim.last_kernel][pruned], 0)
    np.testing.assert_array_equal(sent[victim.last_kernel][~pruned], g[victim.last_kernel][~pruned])


def test_dp_sgd_clips_each_example_not_their_sum():
    rng = np.random.default_rng(1)
    params = {k: float32(rng.normal(size=s)) for k, s in (("w1", (5, 4)), ("b1", (5,)), ("w2", (3, 5)))}
    x, y = float32(rng.normal(size=(6, 2, 2, 1))), jnp.asarray(rng.integers(0, 3, 6))
    expected = 0
    for image, label in zip(np.asarray(x), np.asarray(y), strict=True):
        g = flat(gradient_of(params, image, label))
        expected = expected + g * min(1, 0.5 / np.linalg.norm(g)) / 6
    sgd = lambda key, noise: dp_sgd_gradient(key, loss, params, x, y, 0.5, noise)
    quiet = jax.jit(sgd)(jax.random.key(0), 0.0)
    np.testing.assert_allclose(flat(quiet), expected, atol=1e-6)
    noisy = jax.jit(jax.vmap(lambda k: sgd(k, 2.0)))(jax.random.split(jax.random.key(1), 2000))
    spread = np.concatenate([a.reshape(2000, -1).std(0) for a in jax.tree.leaves(jax.device_get(noisy))])
    np.testing.assert_allclose(spread, 2.0 / 6, rtol=0.1)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: TopK(0.0), "0.0"),
        (lambda: TopK(1.5), "1.5"),
        (lambda: RandomSparsification(-1.0), "-1.0"),
        (lambda: StochasticQuantisation(0), "0"),
        (lambda: soteria_mask(jax.random.key(0), jnp.ravel, jnp.ones((2, 2, 1)), 1.0), "1.0"),
    ],
)
def test_bad_numbers_are_refused(make, value):
    with pytest.raises(ValueError, match=value):
        make()


def test_everything_public_is_a_mechanism():
    for name in mechanisms.__all__:
        thing = getattr(mechanisms, name)
        if isinstance(thing, type) and name not in ("Mechanism", "Gradient"):
            assert all(hasattr(thing, part) for part in ("norm_bound", "simulate", "differentiable", "__call__")), name


def test_a_mask_that_later_noise_hides_is_not_read_off_the_leak():
    """The attacker then expects the mean of random sparsification, and sparsifies the candidate as the client does."""
    g = gradient()
    top = TopK(0.1)
    for later in (GaussianNoise(0.1), StochasticQuantisation(4), RandomSparsification(0.5)):
        chain = Chain((RandomSparsification(0.1), later))
        leak = chain(jax.random.key(0), g)
        np.testing.assert_array_equal(flat(chain.simulate(g, leak)), flat(later.simulate(g, leak)))
        chain = Chain((top, later))
        leak = chain(jax.random.key(0), g)
        kept = flat(top(jax.random.key(0), g)) != 0
        assert not flat(chain.simulate(g, leak))[~kept].any()
    # Noise apart, the truth then explains the leak, and better than the bare gradient does.
    noisy = Chain((top, GaussianNoise(0.01)))
    leak = flat(noisy(jax.random.key(0), g))
    assert np.abs(flat(noisy.simulate(g, None)) - leak).max() < 0.06 < np.abs(flat(g) - leak).max()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Clip(0), "Clip: norm 0 must be above 0"),
        (lambda: Clip(-1.0), "Clip: norm -1.0 must be above 0"),
        (lambda: Clip(math.nan), "Clip: norm nan must be above 0"),
        (lambda: GaussianNoise(-0.1), "GaussianNoise: sigma -0.1 must be 0 or more"),
        (lambda: LaplaceNoise(math.nan), "LaplaceNoise: sigma nan must be 0 or more"),
    ],
)
def test_numbers_that_make_another_mechanism_are_refused(make, words):
    """A norm of zero lets nothing through, and one below zero turns the sign."""
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("mechanism", [Clip(1.0), Clip(1e4), StochasticQuantisation(2**12)], ids=str)
def test_a_gradient_of_half_precision_is_measured_in_single(mechanism):
    """Its squares overflow from 256 on, which a loss scale of 1024 soon makes of it."""
    gradient = {"w": jnp.linspace(-300.0, 300.0, 64).astype(jnp.float16)}
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
    leak = mechanism(jax.random.key(0), gradient)["w"]
    assert leak.dtype == jnp.float16
    np.testing.assert_allclose(leak, mechanism(jax.random.key(0), wide)["w"], rtol=2e-3, atol=1)
    assert l2(gradient, jax.tree.map(jnp.zeros_like, gradient)) == pytest.approx(float(jnp.linalg.norm(wide["w"])), rel=1e-6)
    np.testing.assert_allclose(
        mechanisms.noise_of(Chain((mechanism, GaussianNoise(0.3), LaplaceNoise(0.4))), 1.0), 0.5, rtol=1e-6
    )
    assert mechanisms.noise_of(mechanism, 1.0) == 1.0
